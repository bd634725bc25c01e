"""How guest accesses reach devices, and how devices reach the guest's interrupt controllers."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


class IoRegion(Protocol):
    """A window of ports or of MMIO that a device answers.

    ``offset`` is in bytes from the window's start, ``size`` is 1, 2, 4 or 8, and values are
    unsigned little-endian integers of that size. A region never raises on what a guest sends:
    a read nobody understands gives what the hardware would give, usually all ones.
    """

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class IoSpace(Protocol):
    """Everything outside RAM, as an engine sees it. The bus implements it.

    An engine calls it from a vCPU thread, in the middle of the instruction that needs the value:
    an instruction may have two accesses, and a read's value may decide the next one.
    """

    def port_read(self, port: int, size: int) -> int: ...

    def port_write(self, port: int, size: int, value: int) -> None: ...

    def mmio_read(self, gpa: int, size: int) -> int: ...

    def mmio_write(self, gpa: int, size: int, value: int) -> None: ...


class IrqLine(Protocol):
    """One wire into an interrupt controller. ``set`` may be called from any thread, repeatedly."""

    def set(self, level: bool) -> None: ...


class MsiSink(Protocol):
    """Where message-signalled interrupts go: a 32-bit write of ``data`` to ``address``."""

    def signal(self, address: int, data: int) -> None: ...


@runtime_checkable
class BoundSink(MsiSink, Protocol):
    """One that can take a message that is sent often from an eventfd, without anybody's help. Under the board lock."""

    def bind(self, fd: int, address: int, data: int) -> bool:
        """From now on what is added to ``fd`` sends this message, as does what was added before. False: it does not."""

    def unbind(self, fd: int) -> None:
        """No longer; ``fd`` may be closed."""


class PostedWrites(Protocol):
    """Guest writes that may wait until a vCPU next leaves guest code, where an engine can keep them back."""

    def add(self, port: int) -> None:
        """From now on bytes that are written to this port wait. They are made before whatever any vCPU of the VM leaves
        guest code for afterwards, and when the VM stands still."""

    def add_stream(self, port: int) -> None:
        """The same, but only while many bytes are written there one after the other, and for some milliseconds at
        most."""


class Doorbells(Protocol):
    """Guest writes that only wake somebody, where an engine can do that without leaving guest code for it."""

    def add(self, gpa: int, fd: int) -> None:
        """From now on a write at ``gpa``, of any size and value, adds 1 to the eventfd ``fd``, and does no more."""

    def remove(self, gpa: int, fd: int) -> None: ...
