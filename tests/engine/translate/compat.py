"""One 32-bit instruction on the host CPU, in compatibility mode: ``python -m tests.engine.translate.compat``.

Reads cases of (code, eax, edx, rflags) as a pickle and writes (eax, edx, rflags) of each. A process of its own, since a
host whose kernel has no 32-bit code segment kills it.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
import subprocess
import sys
from pathlib import Path

from tests.engine.assemble import assemble

Case = tuple[bytes, int, int, int]
Result = tuple[int, int, int]

MAP_32BIT = 0x40
USER32, USER64, USER_DATA = 0x23, 0x33, 0x2B  # Linux's, arch/x86/include/asm/segment.h


def run(cases: list[Case]) -> list[Result] | None:
    """None where the host cannot."""
    root = Path(__file__).resolve().parents[3]
    worker = subprocess.run(
        [sys.executable, "-m", "tests.engine.translate.compat"],
        input=pickle.dumps(cases), stdout=subprocess.PIPE, cwd=root, timeout=60, check=False,
    )  # fmt: skip
    if worker.returncode < 0:
        return None
    worker.check_returncode()
    results: list[Result] = pickle.loads(worker.stdout)
    return results


class Compat:
    """A page of code, and one of data and stack, below 4 GiB. The code page is never writable and executable both."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self.code = self._map()
        self.data = self._map()
        saved = ("rbx", "rbp", "r12", "r13", "r14", "r15")
        middle, last = self.code + 0x100, self.code + 0x200
        self._start = assemble(
            "\n".join(f"push {name}" for name in saved)
            + f"""
            mov ebx, {self.data}
            mov [rbx + 16], rsp
            mov esp, {self.data + 4096}
            push {USER32}
            push {middle}
            RETFQ
            """,
            self.code,
        ).code
        self._before = assemble(
            f"""
            mov eax, {USER_DATA}
            mov ds, ax
            mov ebx, {self.data}
            mov edx, [ebx + 4]
            push dword [ebx + 8]
            popfd
            mov eax, [ebx]
            """,
            middle, bits=32,
        ).code  # fmt: skip
        self._after = assemble(
            f"""
            mov [ebx], eax
            mov [ebx + 4], edx
            pushfd
            pop dword [ebx + 8]
            xor eax, eax
            mov ds, ax
            jmp far {USER64}:{last}
            """,
            middle, bits=32,
        ).code  # fmt: skip
        self._end = assemble(
            f"mov ebx, {self.data}\nmov rsp, [rbx + 16]\n"
            + "\n".join(f"pop {name}" for name in reversed(saved))
            + "\ncld\nret",
            last,
        ).code
        self._enter = ctypes.CFUNCTYPE(None)(self.code)

    def _map(self) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_32BIT
        address = self._libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        assert address != ctypes.c_void_p(-1).value
        return int(address)

    def run(self, case: Case) -> Result:
        instruction, eax, edx, rflags = case
        middle = self._before + instruction + self._after
        page = self._start.ljust(0x100, b"\xcc") + middle.ljust(0x100, b"\xcc") + self._end
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
        ctypes.memmove(self.code, page, len(page))
        self._protect(mmap.PROT_READ | mmap.PROT_EXEC)
        words = (ctypes.c_uint32 * 3).from_address(self.data)
        words[:] = eax, edx, rflags
        self._enter()
        return words[0], words[1], words[2]

    def _protect(self, rights: int) -> None:
        assert not self._libc.mprotect(ctypes.c_void_p(self.code), ctypes.c_size_t(4096), rights)


if __name__ == "__main__":
    cases: list[Case] = pickle.load(sys.stdin.buffer)
    compat = Compat()
    sys.stdout.buffer.write(pickle.dumps([compat.run(case) for case in cases]))
