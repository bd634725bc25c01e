"""The command line. It only writes configuration trees and asks the VM for things.

Nothing is imported before it is needed: ``skep --version`` has 100 ms, and every VM's start pays for imports.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from skep import __version__
from skep.errors import EngineLimit, UserError

EXIT_USER = 2
EXIT_OURS = 4
EXIT_INTERRUPTED = 130
"""128 and SIGINT, as shells have it: Ctrl-C before there was a VM to stop."""


def _occupy_standard_descriptors() -> None:
    """Where we were started without one of them, the next file we open would take its number: guest memory for standard
    output, say."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    # Python has None for them then, which `print` takes for standard output.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def command() -> NoReturn:
    """The process ``skep``: :func:`main`, and the end.

    By then a VM has given back all it had, and the kernel takes the rest. To have the interpreter take itself apart
    object by object first would be a sixth of a short VM's processor time.
    """
    if sys.argv[1:2] == ["run"]:
        gc.disable()  # which run.py does too, but a third of all imports is behind it then
    status = main()
    threads = sys.modules.get("threading")
    if threads is not None and any(not one.daemon for one in threads.enumerate()[1:]):
        sys.exit(status)  # which waits for them
    import atexit

    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:  # whoever read it has gone
            pass
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; ours and the user's mistakes end here."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"skep {__version__}")
        return 0
    try:
        _occupy_standard_descriptors()
        if arguments[:1] == ["image"]:  # which has no use for what a VM needs, and is run by scripts again and again
            from skep.cli.image import image

            status = image(arguments[1:])
        else:
            from skep.cli.parser import run_command

            status = run_command(arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"skep: {error}", file=sys.stderr)
        return EXIT_USER
    except EngineLimit as error:
        print(f"skep: {error}", file=sys.stderr)
        return EXIT_OURS
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more when it flushes at exit.
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:
        import traceback

        traceback.print_exc()
        print("skep: internal error, please report it", file=sys.stderr)
        return EXIT_OURS
