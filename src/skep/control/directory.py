"""Where the VMs of this user are to be found: a directory with two files for each, ``NAME.sock`` and ``NAME.lock``.

A VM holds its lock from before it is made until after it is closed. The kernel lets go of it however the process ends,
so a lock that can be had is a dead VM's, and whoever notices removes both files.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time

from skep.chardev.unix import LONGEST
from skep.errors import UserError

_SOCKET, _LOCK = ".sock", ".lock"
_PATIENCE = 0.5
"""Seconds that a lock may be held by somebody who only cleans up."""


def directory() -> str:
    """This user's, made where it is missing: ``$XDG_RUNTIME_DIR/skep``, ``/run/user/UID/skep`` or ``/tmp/skep-UID``.

    Raises UserError where somebody else could have a hand in it.
    """
    me = os.geteuid()
    for base in (os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{me}"):
        # One that is another's is not for us, who may be root by way of sudo.
        if os.path.isabs(base) and _owner(base) == me:
            return _private(f"{base}/skep")
    return _private(f"/tmp/skep-{me}")


def _owner(path: str) -> int | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_uid if stat.S_ISDIR(status.st_mode) else None


def _private(path: str) -> str:
    try:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        status = os.lstat(path)
    except OSError as error:
        raise UserError((error.strerror or str(error)).lower(), path) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise UserError("not a directory of this user's alone", path, "remove it, or set XDG_RUNTIME_DIR")
    return path


class NameTaken(UserError):
    """Another VM of this user has the name."""


class Claim:
    """A name that is ours until ``release``. Raises NameTaken, and UserError for what is wrong with the directory."""

    def __init__(self, name: str, patience: float = _PATIENCE) -> None:
        self.name = name
        base = directory()
        self.socket = f"{base}/{name}{_SOCKET}"
        self._lock = f"{base}/{name}{_LOCK}"
        if len(os.fsencode(self.socket)) > LONGEST:
            raise UserError(f"is longer than the {LONGEST} bytes that a socket's name may have", self.socket)
        deadline = time.monotonic() + patience
        while (fd := _try(self._lock)) is None:
            if time.monotonic() >= deadline:
                who = _process(self._lock)
                raise NameTaken(f"a VM of that name is running{who}", name, "give this one another name")
            time.sleep(0.01)
        self._fd = fd
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            _remove(self.socket)
        except OSError as error:
            self.release()
            raise UserError((error.strerror or str(error)).lower(), self._lock) from None

    @classmethod
    def any_of(cls, base: str) -> Claim:
        """The first of ``base``, ``base-2``, ``base-3``... that is free."""
        name, number = base, 1
        while True:
            try:
                return cls(name, patience=0)
            except NameTaken:
                number += 1
                name = f"{base}-{number}"

    def release(self) -> None:
        """Free the name; more than once does nothing more."""
        if self._fd >= 0:
            _remove(self.socket)
            _remove(self._lock)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def names() -> list[str]:
    """The VMs that have a name here and live, sorted. What dead ones left is removed."""
    base = directory()
    found = []
    for file in os.listdir(base):
        if not file.endswith(_LOCK):
            continue
        name, lock = file.removesuffix(_LOCK), f"{base}/{file}"
        fd = _try(lock)
        if fd is None:
            found.append(name)
        else:
            _remove(f"{base}/{name}{_SOCKET}")
            _remove(lock)
            os.close(fd)
    return sorted(found)


def socket_of(name: str) -> str:
    return f"{directory()}/{name}{_SOCKET}"


def _try(path: str) -> int | None:
    """The lock of ``path``, as a descriptor that holds it; None while another has it."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise UserError((error.strerror or str(error)).lower(), path) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        try:
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # who had it has removed it: the file of that name is another one


def _process(lock: str) -> str:
    try:
        with open(lock, encoding="utf-8") as file:
            return f" (process {int(file.read())})"
    except (OSError, ValueError):
        return ""


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
