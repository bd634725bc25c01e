"""`skep io`: qemu-io's commands on Skep's own disk library, for trying images out and for scripts that do.

``commands`` has what each does, ``interpreter`` calls them, ``session`` is the file that is open and how requests reach
it, ``printing`` has qemu-io's forms of numbers, times and memory.
"""

from __future__ import annotations

import getopt
import sys
from collections.abc import Sequence

from skep.errors import UserError

EXIT_WRONG = 1
_LONG = (
    *("object=", "image-opts", "cmd=", "format=", "read-only", "snapshot", "nocache", "copy-on-read", "misalign"),
    *("native-aio", "aio=", "cache=", "discard=", "force-share", "help"),
)
_USAGE = """\
Usage: skep io [OPTION]... [-c COMMAND]... [FILE]
Reads and writes a disk image by commands: each -c, or else the lines of standard input.

  -c, --cmd COMMAND      do this; `skep io -c help` lists the commands
  -f, --format FORMAT    of the image; otherwise found out
  -r, --read-only        open for reading only
  -s, --snapshot         keep what is written in a temporary file, which is thrown away
  -n, --nocache          as -t none
  -t, --cache MODE       how the host's cache is used: none, writeback, writethrough, directsync or unsafe
  -C, --copy-on-read     keep in the image what is read from below it
  -d, --discard MODE     unmap, or ignore discards
  -m, --misalign         buffers at odd addresses
  -i, --aio MODE         threads, native or io_uring: all the same here; -k is -i native
  -U, --force-share      even if somebody writes to it
      --image-opts       FILE is a list of options: driver=qcow2,file.filename=disk.qcow2
      --object OBJECT    a secret: secret,id=NAME,file=PATH
  -h, --help             this
"""


def io(arguments: Sequence[str]) -> int:
    """All commands, or those on standard input; 1 if one failed, else 0."""
    from skep.block.secrets import read_secrets
    from skep.cli.io.commands import COMMANDS
    from skep.cli.io.interpreter import Interpreter
    from skep.cli.io.session import Opening, Session
    from skep.cli.opening import check_aio, described, discards

    try:
        options, names = getopt.gnu_getopt(list(arguments), "c:f:rsnCmki:t:d:Uh", _LONG)
    except getopt.GetoptError as error:
        return _wrong(f"{error}; see `skep io --help`")
    commands, objects, opening, by_options = [], [], Opening(), False
    try:
        for option, value in options:
            match option:
                case "-h" | "--help":
                    print(_USAGE, end="")
                    return 0
                case "-c" | "--cmd":
                    commands.append(value)
                case "--object":
                    objects.append(value)
                case "--image-opts":
                    by_options = True
                case "-f" | "--format":
                    opening.how = opening.how._replace(format=value)
                case "-i" | "--aio":
                    check_aio(value)
                case "-d" | "--discard":
                    opening.how = opening.how._replace(discard=discards(value))
                case "-t" | "--cache":
                    opening.set_cache(value)
                case "-r" | "--read-only":
                    opening.set("r")
                case "-U" | "--force-share":
                    opening.set("U")
                case "-n" | "--nocache":
                    opening.set("n")
                case "-s" | "--snapshot":
                    opening.set("s")
                case "-C" | "--copy-on-read":
                    opening.set("C")
                case "-m" | "--misalign":
                    opening.set("m")
        if len(names) > 1:
            raise UserError("one image at a time", names[1], "see `skep io --help`")
        if by_options and opening.how.format is not None:
            raise UserError("--image-opts and -f are mutually exclusive")
        opening.how = opening.how._replace(secrets=read_secrets(objects))
        with Session(opening.how.secrets) as session:
            if names:
                if by_options:
                    path, opening.how = described(names[0], opening.how)
                else:
                    path = names[0]
                session.open(path, opening)
            return Interpreter(session, COMMANDS).run(commands, sys.stdin)
    except (UserError, OSError) as error:
        return _wrong(str(error))


def _wrong(message: str) -> int:
    print(f"skep io: {message}", file=sys.stderr)
    return EXIT_WRONG
