"""What is said where KVM refuses: to open, to make a VM, to enter a guest, to go on with one."""

from __future__ import annotations

import errno
import grp
import os

from skep.engine.amd64.registers import Cr4
from skep.engine.kvm import uapi
from skep.errors import HostError

TODO = "use --engine translate, which needs nothing of the host's kernel"

_SUBERRORS = {
    1: "cannot emulate an instruction",
    2: "had an exception while it delivered another",
    3: "cannot go on with an interrupt's delivery",
    4: "left the guest for a reason that it does not know",
}
"""KVM_INTERNAL_ERROR_*"""
_EMULATION_FLAG_INSTRUCTION_BYTES = 1

_OPTIONAL = ("UMIP", "FSGSBASE", "PCIDE", "OSXSAVE", "SMEP", "SMAP")
"""Of CR4, what not every processor has."""


def not_opened(device: str, error: OSError) -> HostError:
    """/dev/kvm does not open."""
    if error.errno in (errno.EACCES, errno.EPERM):
        todo = f"be a member of the group {group_of(device)}, or {TODO}"
        return HostError(f"KVM cannot be used: {error.strerror}", device, todo)
    if error.errno == errno.ENOENT:
        what = "KVM cannot be used: there is no such device; its module (kvm_intel, kvm_amd) is not loaded"
        return HostError(what, device, TODO)
    return HostError(f"KVM cannot be used: {error.strerror}", device, TODO)


def group_of(device: str) -> str:
    """The name, or the number, of those who may open it."""
    gid = os.stat(device).st_gid
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def not_made(device: str, error: OSError) -> HostError:
    """A VM or a vCPU cannot be made."""
    if error.errno == errno.EBUSY:
        what = "another hypervisor of this host has the processor's virtualization"
        return HostError(what, device, f"end it (VirtualBox, VMware), or {TODO}")
    return HostError(f"KVM cannot make this VM: {error.strerror}", device, TODO)


def no_slots(pieces: int, slots: int) -> HostError:
    return HostError(f"KVM on this host maps {slots} pieces of memory, and the VM has {pieces}", "memory.size", TODO)


def no_ring(most: int) -> HostError:
    what = f"KVM on this host has rings of {most} dirty pages at most" if most else "this KVM has no dirty rings"
    return HostError(what, "kvm.dirty_ring", "use 0")


def no_rom() -> HostError:
    return HostError("this KVM knows no memory that a guest may only read", None, TODO)


def not_set(cr4: int) -> HostError:
    """KVM_SET_SREGS: the processor, or the guest's CPUID here, has not what a saved state uses."""
    used = ", ".join(name for name in _OPTIONAL if cr4 & getattr(Cr4, name))
    what = f"KVM refuses the processor's state: what it uses ({used}), this host's processor has not, or not all"
    return HostError(what, None, "let it go on where it can, or begin anew")


def entry(reason: int) -> str:
    """KVM_EXIT_FAIL_ENTRY: the processor refused the state; ``reason`` is VMX's or SVM's."""
    invalid = {0x80000021: ", invalid guest state", 0xFFFF_FFFF_FFFF_FFFF: ", invalid guest state"}.get(reason, "")
    return f"the processor refuses to enter the guest, reason {reason:#x}{invalid}"


def internal(error: uapi.ExitInternal, bits: int) -> str:
    """KVM_EXIT_INTERNAL_ERROR; ``bits`` is the size of code."""
    words = [int(word) for word in error.data[: min(error.ndata, len(error.data))]]
    text = f"KVM {_SUBERRORS.get(error.suberror, f'has internal error {error.suberror}')}"
    if error.suberror == 1 and len(words) > 2 and words[0] & _EMULATION_FLAG_INSTRUCTION_BYTES:
        raw = b"".join(word.to_bytes(8, "little") for word in words[1:3])
        data = raw[1 : 1 + min(raw[0], 15)]
        return f"{text}: {_disassembled(data, bits)}"
    data_words = " ".join(f"{word:#x}" for word in words)
    return f"{text} ({data_words})" if words else text


def _disassembled(data: bytes, bits: int) -> str:
    """The first instruction, with its bytes; only these where there is no disassembler."""
    try:
        from iced_x86 import Decoder
    except ImportError:
        return data.hex(" ")
    instruction = Decoder(bits, data).decode()
    return f"{instruction} ({data[: instruction.len].hex(' ')})" if instruction else data.hex(" ")
