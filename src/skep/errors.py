"""One exception tree. A message says what is wrong, where, and what to do about it, on one line."""

from __future__ import annotations


class SkepError(Exception):
    """Anything that Skep raises on purpose. ``exit_status`` is what the command line ends with."""

    exit_status = 4


class UserError(SkepError):
    """The user's mistake: shown as one line, without a traceback, exit status 2.

    ``what`` is wrong, ``where`` (a file, a key, an option) and ``todo``, the way out.
    """

    exit_status = 2

    def __init__(self, what: str, where: object = None, todo: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.todo = todo
        text = what if self.where is None else f"{self.where}: {what}"
        if todo is not None:
            text = f"{text}; {todo}"
        super().__init__(" ".join(text.split()))


class HostError(UserError):
    """This host lacks something that was asked for: a CPU feature, a device node, memory."""


class EngineLimit(SkepError):
    """The guest did what its engine cannot do yet; the VM has ended. One line; exit status 4."""


class InternalError(SkepError):
    """Ours: Skep is wrong, whatever the user and the guest did. Exit status 4."""
