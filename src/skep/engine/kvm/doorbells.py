"""Doorbells in the kernel (api.rst, KVM_IOEVENTFD): a write there costs no return from KVM_RUN."""

from __future__ import annotations

from skep.engine.kvm import uapi
from skep.engine.kvm.uapi import ioctl


class KvmDoorbells:
    """See :class:`skep.contracts.io.Doorbells`."""

    def __init__(self, fd: int) -> None:
        """``fd`` is the VM's."""
        self._fd = fd

    def add(self, gpa: int, fd: int) -> None:
        ioctl(self._fd, uapi.IOEVENTFD, uapi.Ioeventfd(addr=gpa, fd=fd))

    def remove(self, gpa: int, fd: int) -> None:
        ioctl(self._fd, uapi.IOEVENTFD, uapi.Ioeventfd(addr=gpa, fd=fd, flags=uapi.IOEVENTFD_FLAG_DEASSIGN))
