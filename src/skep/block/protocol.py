"""The protocol layer, whichever it is: what a name means, opened or made. A file of this host's, or an NBD export."""

from __future__ import annotations

from skep.block.backend import File
from skep.block.bytewise import Bytewise
from skep.block.file import HostFile, create_file, open_file
from skep.block.naming import REMOTE, scheme_of
from skep.errors import UserError


def open_protocol(
    name: str,
    *,
    read_only: bool = False,
    no_cache: bool = False,
    synchronous: bool = False,
    lock: bool = True,
    volatile: bool = False,
) -> File:
    """Raises UserError, and leaves nothing open then."""
    if scheme_of(name) in REMOTE:
        from skep.block.nbd.client import open_nbd

        return whole_bytes(open_nbd(name, read_only=read_only, write_cache=not synchronous))
    path = name.removeprefix("file:")
    return open_file(
        path, read_only=read_only, no_cache=no_cache, synchronous=synchronous, lock=lock, volatile=volatile
    )


def create_protocol(name: str, size: int = 0) -> File:
    """A file of ``size`` bytes; what there is no making of must be as long. Raises UserError."""
    if scheme_of(name) not in REMOTE:
        return create_file(name.removeprefix("file:"), size)
    file = open_protocol(name)
    if file.size < size:
        file.close()
        raise UserError(f"the export has {file.size} bytes, and the image needs {size}", name)
    return file


def whole_bytes(file: File) -> File:
    """The same, so that it takes any offset and length."""
    return Bytewise(file) if file.alignment > 1 and not isinstance(file, HostFile) else file
