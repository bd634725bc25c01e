"""Where guests are kept: a directory for each, which is complete or not there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from skep.errors import UserError
from skep.guest.progress import say


def home_of(name: str) -> Path:
    """The directory of one guest."""
    return _cache_home() / "guest" / name


def _cache_home() -> Path:
    """XDG Base Directory Specification: a relative XDG_CACHE_HOME is to be ignored."""
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (told if told.is_absolute() else Path.home() / ".cache") / "skep"


def complete(home: Path, files: Iterable[str]) -> bool:
    return all((home / name).is_file() for name in files)


def make(home: Path, files: Iterable[str], build: Callable[[Path, Path], None], refresh: bool = False) -> None:
    """See that ``home`` is there and has ``files``; if not, or on ``refresh``, have it built.

    ``build`` gets a scratch directory and the directory to fill. Whoever looks at ``home`` finds a complete guest or
    none. One process builds at a time; another one that wants the same waits for it. What a killed process left is
    removed.
    """
    if not refresh and complete(home, files):
        return
    scratches = f".{home.name}-making-"
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with _locked(home.parent):
            if not refresh and complete(home, files):
                return
            for left in home.parent.glob(f"{scratches}*"):
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(prefix=scratches, dir=home.parent) as scratch:
                made = Path(scratch) / "guest"
                made.mkdir()
                build(Path(scratch), made)
                if home.exists():
                    home.rename(Path(scratch) / "old")
                made.rename(home)
    except OSError as error:
        raise UserError(error.strerror or str(error), error.filename or home.parent) from None


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another skep, which makes a guest")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
