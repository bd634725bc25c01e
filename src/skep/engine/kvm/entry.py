"""KVM_RUN as a function of Python's, which goes back into the guest by itself where that has read a byte from a port
whose value is known (:class:`skep.contracts.constantports.ConstantPorts`)."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

from skep.engine.amd64.native import Builtin, ioctl_of_edi
from skep.engine.kvm import uapi

_WANTED = uapi.Run.request_interrupt_window.offset
"""With immediate_exit behind it."""
_REASON, _EXIT = uapi.Run.exit_reason.offset, uapi.Run.exit.offset
_IN, _BYTE = 0, 1
"""Direction and size, the first two bytes of struct kvm_run's io; the port, the count and where the data is follow."""
_FD, _RUN, _TABLE, _ANSWERED = range(4)


def _code() -> bytes:
    """r12: the numbers of :class:`Entry`."""
    again = bytes.fromhex("418b3c24") + ioctl_of_edi(uapi.RUN)  # mov edi, [r12]; KVM_RUN
    leave_unless = [  # what is looked at, and the jump to the end
        (bytes.fromhex("4885c0"), 0x75),  # test rax, rax: it did not fail
        (bytes((0x83, 0x7D, _REASON, uapi.EXIT_IO)), 0x75),  # cmp dword [rbp + exit_reason], KVM_EXIT_IO
        (bytes((0x66, 0x81, 0x7D, _EXIT, _IN, _BYTE)), 0x75),  # cmp word [rbp + io.direction], ...
        (bytes((0x83, 0x7D, _EXIT + 4, 1)), 0x75),  # cmp dword [rbp + io.count], 1
        (bytes((0x66, 0x83, 0x7D, _WANTED, 0)), 0x75),  # cmp word [rbp + request_interrupt_window], 0
        (bytes.fromhex("498b4c2410 4885c9"), 0x74),  # mov rcx, [r12 + 16]; test rcx, rcx: a table
        # movzx edx, word [rbp + io.port]; movzx edx, word [rcx + rdx * 2]; test dh, 1: PRESENT
        (bytes((0x0F, 0xB7, 0x55, _EXIT + 2)) + bytes.fromhex("0fb71451 f6c601"), 0x74),
    ]
    # mov rcx, [rbp + io.data_offset]; mov [rbp + rcx], dl; inc qword [r12 + 24]
    answer = bytes((0x48, 0x8B, 0x4D, _EXIT + 8)) + bytes.fromhex("88540d00 49ff442418")
    left = sum(len(look) + 2 for look, _ in leave_unless) + len(answer) + 2
    code = bytes.fromhex("498b6c2408") + again  # mov rbp, [r12 + 8]
    back = len(again) + left
    for look, jump in leave_unless:
        left -= len(look) + 2
        code += look + bytes((jump, left))
    return code + answer + b"\xeb" + (256 - back).to_bytes(1, "little")  # jmp again


_enter = Builtin(_code())


class Entry:
    """One vCPU's. Calling ``run`` enters the guest; it gives 0, or minus the error."""

    def __init__(self, fd: int, mapping: mmap.mmap) -> None:
        self._pin = ctypes.c_char.from_buffer(mapping)
        self._numbers = (ctypes.c_uint64 * 4)(fd, ctypes.addressof(self._pin), 0, 0)
        self.run: Callable[[], int] = _enter(ctypes.addressof(self._numbers))

    def answer(self, table: int) -> None:
        """From the table at that address; 0: all comes to us. While the vCPU does not run."""
        self._numbers[_TABLE] = table

    @property
    def answered(self) -> int:
        """How many reads were."""
        return self._numbers[_ANSWERED]

    def close(self) -> None:
        """Before the mapping."""
        del self._pin
