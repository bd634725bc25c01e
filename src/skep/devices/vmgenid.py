"""The virtual machine generation identifier (Microsoft, "Virtual Machine Generation ID", 2012).

A random number of 128 bits in guest memory. It stays what it is while the machine runs, and through resets; it becomes
another when the machine's past forks, as when a snapshot is started a second time. A guest that is told so reseeds
its random numbers, and no longer trusts what it believed to be unique.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ClassVar

from skep.contracts.device import Passive
from skep.memory import GuestMemory
from skep.state import Fields

SIZE = 16


class VmGenId(Passive, Fields):
    """``gpa`` is where the identifier lies, in a page that the guest takes for no RAM.

    ``notify`` tells the guest that it has changed; it is called under the board lock.
    """

    name = "vmgenid"
    state_fields: ClassVar[tuple[str, ...]] = ("guid",)

    def __init__(self, memory: GuestMemory, gpa: int, notify: Callable[[], None]) -> None:
        self._memory = memory
        self._gpa = gpa
        self._notify = notify
        self.guid = os.urandom(SIZE)

    def reset(self) -> None:
        """A reset is no fork."""

    def place(self) -> None:
        """Put the identifier into memory, which was cleared."""
        self._memory.write(self._gpa, self.guid)

    def renew(self) -> None:
        """The machine is another one from now on. Under the board lock."""
        self.guid = os.urandom(SIZE)
        self.place()
        self._notify()
