"""What the guest's CPUs wrote, for :mod:`skep.memory.dirty`: the marks that they leave before a page's first store."""

from __future__ import annotations

from skep.engine.translate.blocks import Cache
from skep.memory.dirty import Mark


class WrittenPages:
    """A :class:`~skep.memory.dirty.DirtySource`. A vCPU that gets the right to store to a page marks it (walk_runtime.
    announce); so when all lose that right, the next store to each page marks it again."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def start_dirty(self) -> None:
        self._cache.take_written()

    def collect_dirty(self, mark: Mark) -> None:
        mark(0, self._cache.take_written())

    def stop_dirty(self) -> None:
        """The marks cost nothing."""
