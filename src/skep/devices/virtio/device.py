"""What every virtio device has, whatever it does and however the guest reaches it (virtio 1.2, chapters 2 and 3).

A :class:`VirtioDevice` is the configuration half: status, features, queues, configuration space. A transport
calls it, under the board lock, for the guest's register accesses. Its data half is a :class:`Worker`, which takes
requests from the queues and gives each to :meth:`VirtioDevice.serve`.

A reset by the guest, a status of 0, does not wait for requests that are under way: status keeps its value until they
are done, as 4.1.4.3.1 allows, and drivers wait for the 0; it is the same with the reset of one queue. A reset by the
board does wait.

A driver that breaks a rule, and a mistake of ours on the worker's thread, end the same way: the device needs a reset,
and tells why.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Protocol

from skep.devices.virtio.queue import Chain, DriverError, Queue
from skep.devices.virtio.worker import Worker
from skep.locks import Lock
from skep.memory import GuestMemory
from skep.state import Fields

# 2.1, device status.
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
_DRIVERS_BITS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED

# 6, features that are no particular device's.
F_INDIRECT_DESC, F_EVENT_IDX, F_VERSION_1, F_RING_RESET = 1 << 28, 1 << 29, 1 << 32, 1 << 40

PUT_BACK, HAND_OVER = -1, -2
"""What :meth:`VirtioDevice.serve` gives for a request that it could not finish now, or not on a visitor's thread."""

_TURN_NS = 100_000
"""How long a worker serves requests before it considers an interrupt: what the first of them waits at most, but for the
time that the last takes."""
_COMPLAINTS = 8
"""The last so many are kept: a driver may make as many as it likes."""


class Transport(Protocol):
    """What a device asks of its transport; under the board lock, from any thread."""

    def queue_interrupt(self, index: int) -> None:
        """Used buffer notification (2.3)."""

    def config_interrupt(self) -> None:
        """Configuration change notification (2.3)."""

    def device_reset(self) -> None:
        """The device has been reset, and so must be what the transport keeps for it."""

    def queue_reset(self, index: int) -> None:
        """The same of one queue."""


class VirtioDevice(Fields):
    """Base of every virtio device. A subclass says what it is, serves requests and reads its configuration."""

    state_fields: ClassVar[tuple[str, ...]] = ("status", "driver_features", "generation", "queues")

    device_id: ClassVar[int]
    """5: the device type."""
    class_code: ClassVar[int]
    """PCI's class, subclass and programming interface."""

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        lock: Lock,
        features: int,
        queue_sizes: list[int],
        say: Callable[[str], None] | None = None,
    ) -> None:
        """``lock`` is the board's; ``features`` are the device's own, to which the queue's are added. ``say`` gets a
        line for the user when the device first needs a reset, and returns at once."""
        self.name = name
        self.memory = memory
        self.lock = lock
        self.features = features | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_RING_RESET
        self.queues = [Queue(memory, size, index) for index, size in enumerate(queue_sizes)]
        self.worker = Worker(name, self._turn, self._report, self._count_unfinished, self.fail, self._rung)
        self.status = 0
        self.driver_features = 0
        self.generation = 0
        self._transport: Transport | None = None
        self._dma = False
        self._paused = False
        self._resetting = False
        self._queue_resets: set[int] = set()
        self._config_changed = False
        self._asked = [False] * len(self.queues)
        """Which queues the worker is to look at. It takes a flag back before it looks, and who sets one rings after."""
        self.visited = False
        """The turn under way is on the thread of a vCPU, or another that is not to wait or to work for long."""
        self._unfinished = 0
        self._finished: deque[tuple[Chain, int]] = deque()
        # Written in a turn, taken in the report that follows it.
        self._to_interrupt: set[int] = set()
        self._broken: str | None = None
        self.complaints: deque[str] = deque(maxlen=_COMPLAINTS)
        """What went wrong: what the driver did, what of ours failed, or the host. The last few times."""
        self._say = say
        self._said = False

    # For subclasses.

    def serve(self, chain: Chain) -> int | None:
        """Do what a request asks; returns how many bytes of its writable part were written, counted from the start; or
        None, and :meth:`finish` is called later; or PUT_BACK, and it is served again after the next :meth:`ask`; or,
        where ``visited`` is set, HAND_OVER, and the worker's thread serves it.

        In a worker's turn, without locks. Raises DriverError where the request has no place for an answer.
        """
        raise NotImplementedError

    def ready(self, queue: Queue) -> bool:
        """In a worker's turn: a request of this queue could be served now. Where not, they stay in their ring until
        :meth:`ask`."""
        return True

    def ask(self, index: int) -> None:
        """From any thread: let the worker look at queue ``index``."""
        self._asked[index] = True
        self.worker.ring()

    def finish(self, *done: tuple[Chain, int]) -> None:
        """From any thread, without locks: requests for which ``serve`` gave None are done, each with what ``serve``
        would have given."""
        self._finished.extend(done)
        self.worker.visit()

    def config_read(self, offset: int, size: int) -> int:
        """Device-specific configuration (2.5); what lies outside reads as 0."""
        return 0

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Most have nothing to write."""

    def complain(self, complaint: str) -> None:
        """From any thread: something for the user to know, and not too often."""
        self.complaints.append(complaint)
        if self._say is not None:
            self._say(f"{self.name}: {complaint}")

    def fail(self, error: BaseException) -> None:
        """From any thread: what the device's data half does went wrong, and it is our mistake."""
        self._broken = f"it stops, and needs a reset: {type(error).__name__}: {error}"
        self.worker.ring()

    def negotiated(self) -> None:
        """FEATURES_OK was set: the features are final."""

    def power_on(self) -> None:
        """Reset what is the device's own."""

    def queue_reset(self, index: int) -> None:
        """Reset what the device keeps for one queue."""

    def config_changed(self) -> None:
        """The configuration space reads otherwise than before. Under the board lock."""
        self._config_changed = True
        if self.status & DRIVER_OK and self._transport is not None:
            self._transport.config_interrupt()

    # For transports, under the board lock.

    def attach(self, transport: Transport) -> None:
        self._transport = transport

    def set_dma(self, on: bool) -> None:
        """The device may, or may not, access memory: PCI's bus master bit."""
        if on != self._dma:
            self._dma = on
            self._update()

    def write_features(self, word: int, value: int) -> None:
        """Bits 32 * word and up of what the driver accepts; of those not offered there is no trace."""
        if word < 2 and not self.status & FEATURES_OK:
            shift = 32 * word
            kept = self.driver_features & ~(0xFFFF_FFFF << shift)
            self.driver_features = kept | value << shift & self.features

    def write_status(self, value: int) -> None:
        """2.1. The driver sets bits one after the other, and clears them only all at once, by writing 0."""
        if self._resetting:
            return
        if not value:
            self._resetting = True
            if self.worker.hold():
                self._finish_reset()
            return
        new = value & _DRIVERS_BITS & ~self.status
        if new & FEATURES_OK:
            if self.driver_features & F_VERSION_1:
                self.status |= FEATURES_OK
                self.negotiated()
            new &= ~FEATURES_OK  # 3.1.1: left clear, it says that we do not go along
        if new & DRIVER_OK and not self.status & FEATURES_OK:
            new &= ~DRIVER_OK
        self.status |= new
        if new & DRIVER_OK:
            for queue in self.queues:
                if queue.enabled:
                    self._start(queue)
            self._update()

    def enable_queue(self, index: int) -> None:
        """4.1.4.3.2: its registers are set, and final."""
        queue = self.queues[index]
        if not queue.enabled:
            queue.enabled = True
            if self.status & DRIVER_OK:
                # Worker and queue are strangers until the queue is started; it sees it in its next turn.
                self._start(queue)
                self._update()

    def notify(self, index: int) -> None:
        """Available buffer notification (2.9)."""
        if not self.worker.held and index < len(self.queues):
            self._asked[index] = True
            self.lock.after(self.worker.visit)

    def _rung(self) -> None:
        """The same for some queue or other, on the worker's thread."""
        self._asked[:] = [True] * len(self.queues)

    def reset_queue(self, index: int) -> None:
        """2.6.1: stop, and return to what it was before it was set up. ``queue_resetting`` until that is done."""
        if self.driver_features & F_RING_RESET and self.queues[index].enabled and not self._resetting:
            self._queue_resets.add(index)
            if self.worker.hold():
                self._finish_queue_resets()

    def queue_resetting(self, index: int) -> bool:
        return index in self._queue_resets

    def read_generation(self) -> int:
        """4.1.4.3.1: differs from what it was before the configuration last changed."""
        if self._config_changed:
            self._config_changed = False
            self.generation = (self.generation + 1) & 0xFF
        return self.generation

    # The life of a device. The caller holds no lock.

    def reset(self) -> None:
        with self.lock:
            self._resetting = True
        self.worker.hold()
        self.worker.wait_idle()
        with self.lock:
            self._finish_reset()

    def pause(self) -> None:
        """Requests that were taken from a queue are finished, and their interrupts sent; the others stay there."""
        with self.lock:
            self._paused = True
        self.worker.hold()
        self.worker.wait_idle()
        with self.lock:
            self._take_report()

    def resume(self) -> None:
        with self.lock:
            self._paused = False
            self._update()

    def loaded(self) -> None:
        self._resetting = False
        self._config_changed = False
        for queue in self.queues:
            queue.stop()
            if queue.enabled and self.status & DRIVER_OK and not self.status & NEEDS_RESET:
                self._start(queue)

    def close(self) -> None:
        self.worker.close()
        for queue in self.queues:
            queue.stop()

    # How the above is done, under the board lock.

    def _update(self) -> None:
        """Hold or release the worker, as everything together has it."""
        ready = self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
        if ready and self._dma and not (self._paused or self._resetting or self._queue_resets):
            self._asked[:] = [True] * len(self.queues)
            self.worker.release()
        else:
            self.worker.hold()

    def _start(self, queue: Queue) -> None:
        features = self.driver_features
        try:
            queue.start(indirect=bool(features & F_INDIRECT_DESC), event_idx=bool(features & F_EVENT_IDX))
        except DriverError as e:
            self._ask_for_reset(_against_the_rules(e))

    def _ask_for_reset(self, complaint: str) -> None:
        """2.1.2: nothing more is done until the driver resets us."""
        if self._said:
            self.complaints.append(complaint)
        else:  # the first time only: a guest may do it again and again
            self._said = True
            self.complain(complaint)
        if not self.status & NEEDS_RESET:
            self.status |= NEEDS_RESET
            self.worker.hold()
            if self.status & DRIVER_OK and self._transport is not None:
                self._transport.config_interrupt()

    def _finish_reset(self) -> None:
        """The worker is held and idle."""
        self._resetting = False
        self._queue_resets.clear()
        self._to_interrupt.clear()
        self._broken = None
        self.status = 0
        self.driver_features = 0
        self.generation = 0
        self._config_changed = False
        for queue in self.queues:
            queue.reset()
        self.power_on()
        if self._transport is not None:
            self._transport.device_reset()
        self._update()

    def _finish_queue_resets(self) -> None:
        """The worker is held and idle."""
        for index in self._queue_resets:
            self.queues[index].reset()
            self.queue_reset(index)
            if self._transport is not None:
                self._transport.queue_reset(index)
        self._queue_resets.clear()
        self._update()

    def _report(self) -> None:
        """After each turn, on the worker's thread."""
        if self._to_interrupt or self._broken is not None or self._resetting or self._queue_resets:
            with self.lock:
                self._take_report()

    def _take_report(self) -> None:
        if self._resetting and self.worker.idle:
            self._finish_reset()
        for _ in range(len(self._to_interrupt)):
            index = self._to_interrupt.pop()  # before the interrupt: another thread's turn may want the next one
            if self._transport is not None and index not in self._queue_resets:  # of those no more is told (2.6.1.1.1)
                self._transport.queue_interrupt(index)
        if self._queue_resets and self.worker.idle:
            self._finish_queue_resets()
        if self._broken is not None:
            complaint, self._broken = self._broken, None
            self._ask_for_reset(complaint)

    # The data half.

    def _turn(self, visiting: bool) -> bool:
        self.visited = visiting
        until = time.monotonic_ns() + _TURN_NS
        more = False
        try:
            while self._finished:
                chain, written = self._finished.popleft()
                self._unfinished -= 1
                chain.queue.push(chain, written)
            for index, queue in enumerate(self.queues):
                if not queue.started:
                    continue
                if self._asked[index]:
                    self._asked[index] = False
                    if self._serve_queue(queue, until):
                        self._asked[index] = more = True
                if queue.settle():
                    self._to_interrupt.add(index)
        except DriverError as e:
            self._broken = _against_the_rules(e)
            more = False
        return more

    def _serve_queue(self, queue: Queue, until: int) -> bool:
        """Requests until there are none, the turn's time is over or the worker is held. True: there are more."""
        queue.silence()
        while not self.worker.held and self.ready(queue):
            chain = queue.pop()
            if chain is not None:
                written = self.serve(chain)
                if written is None:
                    self._unfinished += 1
                elif written < 0:
                    queue.put_back(chain)
                    return written == HAND_OVER
                else:
                    queue.push(chain, written)
                if time.monotonic_ns() > until:
                    return True
            elif queue.listen():
                queue.silence()
            else:
                break
        return False

    def _count_unfinished(self) -> int:
        return self._unfinished


def _against_the_rules(error: DriverError) -> str:
    return f"the driver broke the rules, and has to reset it: {error}"
