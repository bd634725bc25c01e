"""From a disk's options to an open backend."""

from __future__ import annotations

from skep.block.backend import BlockBackend
from skep.block.options import BlockOptions
from skep.block.raw import open_raw
from skep.block.record import Recorder


def open_image(options: BlockOptions) -> BlockBackend:
    """Open, check and lock a disk image. Raises UserError, and leaves nothing open then."""
    image = open_raw(options)
    if options.record is None:
        return image
    try:
        return Recorder(image, options.record)
    except BaseException:
        image.close()
        raise
