"""Where a VM is asked for things, by its socket's clients, its terminal, a program."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skep.control.actions import Action, Result
    from skep.control.performer import Performer
    from skep.vm import Vm

Reply = dict[str, Any]
"""As it goes over the socket: {"result": ...} or {"error": {"message": ...}}."""


class Controller:
    """One VM's. Most VMs are never asked anything, and all pay for imports: who does what is asked comes with the first
    action."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._guard = threading.Lock()
        self._performer: Performer | None = None

    def submit(self, action: Action, done: Callable[[Reply], None]) -> None:
        """Perform ``action`` and call ``done``, now or from another thread. Never waits: where the VM hangs, so does
        that other thread, and what only looks is answered all the same."""
        self._at_work().submit(action, done)

    def perform(self, action: Action) -> Result:
        """Do it, and wait until it is done. Raises UserError for what the VM's state does not allow."""
        return self._at_work().perform(action)

    def _at_work(self) -> Performer:
        from skep.control.performer import Performer

        with self._guard:
            if self._performer is None:
                self._performer = Performer(self.vm)
            return self._performer
