"""A few bytes of host machine code as Python functions: RDTSC, CPUID, XGETBV have no other door, and an exit is to cost
little.

A page is written first and made executable afterwards, never both at once.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

from skep.errors import HostError

_NOARGS = 4
"""METH_NOARGS of CPython's methodobject.h."""
_SYS_IOCTL = 16


class _MethodDef(ctypes.Structure):
    """PyMethodDef of CPython's methodobject.h."""

    _fields_ = (
        ("ml_name", ctypes.c_char_p),
        ("ml_meth", ctypes.c_void_p),
        ("ml_flags", ctypes.c_int),
        ("ml_doc", ctypes.c_char_p),
    )


def function(code: bytes, result: Any, *arguments: Any) -> Callable[..., int]:
    """``code`` (System V calling convention, position independent) as a function of ctypes types.

    It runs with the GIL held, so it must be short. On a host of another architecture it raises :class:`HostError` when
    it is called.
    """
    if not is_amd64():
        return _absent
    page, address = _executable(code)
    made: Any = ctypes.PYFUNCTYPE(result, *arguments)(address)
    made.page = page  # the mapping lives as long as the function
    call: Callable[..., int] = made
    return call


class Builtin:
    """Makes of a number a function without arguments that runs ``code`` without the GIL. ``code`` is position
    independent and finds the number in r12; what it leaves in rax is the result. It may change all registers but rbx
    and rsp.

    The functions are what C calls built-in ones. ctypes' way to libc's ``ioctl``, with what it does for arguments and
    errno, takes a third of all that Python does at an exit. On a host of another architecture they raise
    :class:`HostError`.
    """

    def __init__(self, code: bytes) -> None:
        if not is_amd64():
            return
        self._page, address = _executable(_unlocked(code))
        self._method = _MethodDef(b"native", address, _NOARGS, None)
        self._new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.py_object)(
            ("PyCFunction_NewEx", ctypes.pythonapi)
        )

    def __call__(self, number: int) -> Callable[[], int]:
        if not is_amd64():
            return _absent
        # The last argument is what the function keeps alive: us.
        made: Callable[[], int] = self._new(ctypes.addressof(self._method), number, self)
        return made


def ioctl(request: int) -> bytes:
    """Code of a :class:`Builtin` for a descriptor: ``ioctl(descriptor, request, 0)``, with what the kernel gives, minus
    the error where it refuses."""
    return bytes.fromhex("4489e7") + ioctl_of_edi(request)  # mov edi, r12d


def ioctl_of_edi(request: int) -> bytes:
    """The same of the descriptor in edi."""
    return b"".join((
        b"\x31\xd2\xbe" + request.to_bytes(4, "little"),  # xor edx, edx; mov esi, request
        b"\xb8" + _SYS_IOCTL.to_bytes(4, "little") + b"\x0f\x05",  # mov eax, SYS_ioctl; syscall
    ))


def _unlocked(code: bytes) -> bytes:
    """A built-in function without arguments that is bound to a number."""
    api = ctypes.pythonapi
    return b"".join((
        bytes.fromhex("53 55 4154"),  # push rbx; push rbp; push r12
        _call(api.PyLong_AsLong),  # what it is bound to
        bytes.fromhex("4989c4"),  # mov r12, rax
        _call(api.PyEval_SaveThread),
        bytes.fromhex("4889c3"),  # mov rbx, rax
        code,
        bytes.fromhex("4989c4 4889df"),  # mov r12, rax; mov rdi, rbx
        _call(api.PyEval_RestoreThread),
        bytes.fromhex("4c89e7"),  # mov rdi, r12
        _call(api.PyLong_FromLong),
        bytes.fromhex("415c 5d 5b c3"),  # pop r12; pop rbp; pop rbx; ret
    ))


def _call(c_function: Any) -> bytes:
    """mov rax, c_function; call rax."""
    address = ctypes.cast(c_function, ctypes.c_void_p).value or 0
    return b"\x48\xb8" + address.to_bytes(8, "little") + b"\xff\xd0"


def _executable(code: bytes) -> tuple[mmap.mmap, int]:
    """A page of it, and its address. Raises HostError."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    page[: len(code)] = code
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC):
        raise HostError("this system does not allow memory to become executable", "mprotect",
                        "allow it for this process (SELinux execmem, PaX MPROTECT)")
    return page, address


def is_amd64() -> bool:
    return os.uname().machine == "x86_64"


def _absent(*_arguments: Any) -> int:
    raise HostError("this needs an x86-64 host", os.uname().machine, "run an amd64 guest on an amd64 machine")
