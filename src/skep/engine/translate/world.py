"""All vCPUs of a VM together: stopping them, so that what they share can change."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from skep.engine.translate.layout import BRK_STOP, EMPTY_JC, JC, JC_ARRAY, JC_SETS, TWINS, TWINS_MASK, StateBlock
from skep.locks import Lock, Order

_Roster = Callable[[ctypes.Array[ctypes.c_uint64], int], None]


class World:
    """The state blocks of a VM's vCPUs, and the lock under which translations change.

    Adding a translation needs the lock only; what vCPUs may be executing or may have looked up needs them stopped::

        with world.stopped():
            ...  # no guest code runs, none will until here
    """

    def __init__(self, stubs: Mapping[str, int]) -> None:
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)
        self._stop: _Roster = prototype(stubs["stop_all"])
        self._go: _Roster = prototype(stubs["go_all"])
        empty = array("Q", range(EMPTY_JC, EMPTY_JC - JC_SETS, -1))
        self._ways = []
        for i in range(3):
            ways = array("Q", [stubs[f"second{i}"]]) * (4 * JC_SETS)
            ways[0::4] = ways[2::4] = empty
            self._ways.append(ways.tobytes())
        self.lock = Lock("translations", Order.ENGINE)
        self.blocks: list[StateBlock] = []
        self._roster = (ctypes.c_uint64 * 0)()
        self._stopped = _Stopped(self)
        self._depth = 0
        self.frozen = False
        self.stops = 0

    def add(self, st: StateBlock) -> None:
        with self.lock:
            self.empty_jumps(st)
            if self._depth:
                self._keep_out(st)
            self.blocks.append(st)
            self._enrol()

    def remove(self, st: StateBlock) -> None:
        with self.lock:
            self.blocks.remove(st)
            self._enrol()

    def _enrol(self) -> None:
        self._roster = (ctypes.c_uint64 * len(self.blocks))(*(st.address for st in self.blocks))

    def stopped(self) -> _Stopped:
        """A context in which the lock is held and no vCPU is in guest code. Any thread may ask; it nests."""
        return self._stopped

    @contextmanager
    def alone(self, st: StateBlock) -> Iterator[None]:
        """As :meth:`stopped`, but the caller's own vCPU may enter guest code."""
        with self._stopped:
            st.stop = 0
            st.bytes[BRK_STOP] = 0
            try:
                yield
            finally:
                if self._depth > 1:
                    self._keep_out(st)

    def freeze(self) -> None:
        """No vCPU is in guest code when it returns, and none will be until :meth:`thaw`, but to finish the one
        instruction that its thread is at. Meanwhile nobody holds the lock. Twice is once."""
        with self.lock:
            if not self.frozen:
                self.stop()
                self.frozen = True

    def thaw(self) -> None:
        with self.lock:
            if self.frozen:
                self.frozen = False
                self.go()

    @staticmethod
    def _keep_out(st: StateBlock) -> None:
        """As stop_all, for a vCPU that is not in guest code."""
        st.stop = 1
        st.bytes[BRK_STOP] = 1

    def stop(self) -> None:
        """The lock is held. Returns when no vCPU is in guest code."""
        self._depth += 1
        if self._depth == 1:
            self.stops += 1
            self._stop(self._roster, len(self.blocks))

    def go(self) -> None:
        """Undo :meth:`stop`."""
        self._depth -= 1
        if self._depth == 0:
            self._go(self._roster, len(self.blocks))

    def empty_jumps(self, st: StateBlock) -> None:
        """A jump cache without targets, and none put away: every way leads to the stub that tries the next one. Nor do
        failing checks know a way."""
        st.kept = 0
        for i, ways in enumerate(self._ways):
            at = JC + i * JC_ARRAY
            st.bytes[at : at + JC_ARRAY] = ways
        st.bytes[TWINS : TWINS + TWINS_MASK + 16] = bytes(TWINS_MASK + 16)


class _Stopped:
    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        self._world.lock.__enter__()
        self._world.stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._world.go()
        self._world.lock.__exit__(kind, error, trace)
