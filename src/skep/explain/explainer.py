"""What one VM keeps for its explanations, and the making of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from skep.chardev.transcript import Transcript
from skep.config import Settings, Tree
from skep.explain.subject import PANIC, Cause, Seen, Subject
from skep.machine import Board

if TYPE_CHECKING:
    from skep.explain.explanation import Explanation
    from skep.explain.symbols import SystemMap

_STOPPED_ON_PURPOSE = ("reboot: System halted", "reboot: Power down")


class Explainer:
    """The consoles' ``transcript``, and whether this life of the guest was explained already.

    Raises UserError for a System.map that is none.
    """

    def __init__(self, tree: Tree, settings: Settings, transcript: Transcript) -> None:
        self.transcript = transcript
        self._tree = tree
        self._system_map = _system_map(settings.boot_system_map)
        self.done = False
        """This life's failure was explained."""

    def begin(self) -> None:
        """A new life of the guest: power-on, or a reset."""
        self.transcript.forget()
        self.done = False

    def panicked(self) -> bool:
        """The guest's kernel said so, and nobody has explained it yet."""
        return not self.done and PANIC in self.transcript.text()

    def halted_on_purpose(self) -> bool:
        text = self.transcript.text()
        return any(words in text for words in _STOPPED_ON_PURPOSE)

    def explain(self, cause: Cause, board: Board, processors: Sequence[Seen], silent_for: float) -> Explanation:
        """No processor runs meanwhile, and no device changes anything."""
        from skep.explain.looking import explain

        touched = {
            ("port" if record.what in ("in", "out") else "mmio", record.where)
            for seen in processors
            for record in seen.exits
            if record.what in ("in", "out", "read", "write")
        }
        owners = {place: board.bus.owner(*place) for place in touched}
        return explain(
            Subject(
                cause=cause,
                tree=self._tree,
                memory=board.memory,
                processors=processors,
                unanswered=dict(board.bus.unknown),
                owners={place: owner for place, owner in owners.items() if owner},
                said=self.transcript.text(),
                silent_for=silent_for,
                system_map=self._system_map,
            )
        )


def _system_map(path: str | None) -> SystemMap | None:
    if path is None:
        return None
    from skep.explain.symbols import SystemMap

    return SystemMap(path)
