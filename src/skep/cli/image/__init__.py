"""`skep image`: qemu-img's subcommands and options, on Skep's own disk library.

``parser`` has the words, ``commands`` what each does, ``printing`` how it is shown: to people, or as JSON, both as
qemu-img does. Exit statuses are qemu-img's too.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

from skep.errors import SkepError, UserError

EXIT_WRONG = 1
EXIT_NOT_COMPARED = 2


def image(arguments: Sequence[str]) -> int:
    """One subcommand; returns its exit status, and tells mistakes and the host's errors in a line each."""
    gc.disable()  # modules and words are garbage at the end of the process only
    from skep.block.secrets import read_secrets
    from skep.cli.image.parser import make_parser

    parser = make_parser(arguments[0] if arguments else None)
    gc.freeze()
    gc.enable()
    failed = EXIT_NOT_COMPARED if arguments[:1] == ["compare"] else EXIT_WRONG
    try:
        parsed = parser.parse_args(arguments)
        if not hasattr(parsed, "command"):
            parser.error("a subcommand is missing")
        if parsed.image_opts and parsed.format is not None:
            parser.error("--image-opts and -f are mutually exclusive")
        parsed.secrets = read_secrets(parsed.objects)
        status: int = parsed.command(parsed)
        return status
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        print(f"skep image: {_line(error)}", file=sys.stderr)
        return failed
    except SkepError as error:
        print(f"skep image: {error}", file=sys.stderr)
        return failed


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        where = f"{error.filename}: " if error.filename else ""
        return " ".join(f"{where}{error.strerror}".split())
    return " ".join(str(error).split())
