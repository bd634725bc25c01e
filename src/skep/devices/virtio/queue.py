"""The split virtqueue, device side (virtio 1.2, 2.7), with indirect descriptors and event indices.

Everything in a virtqueue is written by the guest while we look at it, and may be anything. So each word is loaded once,
as one load, and checked before it is used; what the driver must not do raises :class:`DriverError`, and the device then
asks to be reset. Work is bounded by the queue's size.

Words are little-endian, as are the hosts that we run on: they are read and written through casts of memory views, each
a single load or store. ``struct.pack_into`` is not, and another CPU would see its intermediate zero.
"""

from __future__ import annotations

from skep.devices.virtio.fence import make_fence
from skep.memory import GuestMemory, MemoryFault
from skep.state import Fields

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

_LONGEST = 1 << 32  # 2.7.5: bytes in one chain


class DriverError(Exception):
    """The driver broke a rule of the specification, and the device cannot go on (virtio 1.2, 2.1.2)."""


class Chain:
    """A buffer that the driver made available: views of guest memory, valid until the chain is pushed back."""

    __slots__ = ("at", "head", "queue", "readable", "writable", "written_to")

    def __init__(self, queue: Queue, head: int, at: int) -> None:
        self.queue = queue
        self.head = head
        self.at = at
        """The index in the available ring where it was found."""
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.written_to: list[tuple[int, int]] = []
        """Where the writable pieces lie: (guest-physical address, length)."""


class Queue(Fields):
    """One virtqueue. The registers may be set while it is stopped; one thread at a time works on a started one."""

    state_fields = ("size", "enabled", "desc", "driver", "device", "next_avail", "next_used", "signalled")

    def __init__(self, memory: GuestMemory, max_size: int, index: int = 0) -> None:
        """``index`` is its place among its device's queues."""
        self.max_size = max_size
        self.index = index
        self._memory = memory
        self._fence = make_fence()
        self._views: list[memoryview] = []
        self.reset()

    def reset(self) -> None:
        """To power-on state, stopped."""
        self.stop()
        self.size = self.max_size
        self.enabled = False
        self.desc = 0
        self.driver = 0
        self.device = 0
        self.next_avail = 0
        """The index in the available ring that is looked at next; free running, as are the others."""
        self.next_used = 0
        self.signalled = 0
        """What ``next_used`` was when the driver was last considered for an interrupt."""

    @property
    def started(self) -> bool:
        return bool(self._views)

    def start(self, *, indirect: bool, event_idx: bool) -> None:
        """Find the three areas in guest memory (2.7). Raises DriverError."""
        size = self.size
        if not 0 < size <= self.max_size or size & (size - 1):
            raise DriverError(f"queue size {size}")
        if self.desc % 16 or self.driver % 2 or self.device % 4:
            raise DriverError(f"misaligned queue: {self.desc:#x}, {self.driver:#x}, {self.device:#x}")
        self._used_size = 6 + 8 * size
        try:
            desc = self._memory.view(self.desc, 16 * size)
            avail = self._memory.view(self.driver, 6 + 2 * size)
            used = self._memory.view(self.device, self._used_size)
        except MemoryFault as e:
            raise DriverError(f"a queue outside memory: {e}") from None
        self._mask = size - 1
        self._indirect = indirect
        self._event_idx = event_idx
        self._desc = desc.cast("Q")  # two words a descriptor: the address; the length, flags and next
        self._avail = avail.cast("H")  # flags, idx, ring[size], used_event
        self._used = used.cast("H")  # flags, idx, four words for each element, avail_event
        self._elements = used[: 4 + 8 * size].cast("I")  # flags and idx, then id and len of each element
        self._used_event = 2 + size
        self._avail_event = 2 + 4 * size
        for name in ("next_avail", "next_used", "signalled"):  # which may come from a saved state
            setattr(self, name, getattr(self, name) & 0xFFFF)
        self._seen_avail = self.next_avail
        self._views = [desc, avail, used, self._desc, self._avail, self._used, self._elements]

    def stop(self) -> None:
        """Let go of guest memory."""
        views, self._views = self._views, []
        for view in reversed(views):
            view.release()

    def pop(self) -> Chain | None:
        """The next available chain, if there is one (2.7.14). Raises DriverError."""
        at = self.next_avail
        if at == self._seen_avail:
            idx = self._avail[1]
            if idx == at:
                return None
            if (idx - at) & 0xFFFF > self.size:
                raise DriverError(f"available index {idx} is more than a queue ahead of {at}")
            self._seen_avail = idx
        # x86 makes loads in order: the ring's element is not older than the index. The descriptors follow by data.
        chain = Chain(self, self._avail[2 + (at & self._mask)], at)
        self._walk(chain)
        self.next_avail = (at + 1) & 0xFFFF
        return chain

    def put_back(self, chain: Chain) -> None:
        """The chain that was popped last is still available, and popped again next time."""
        self.next_avail = chain.at

    def _walk(self, chain: Chain) -> None:
        """Collect a chain's buffers (2.7.5): at most as many as the queue is long, readable before writable ones."""
        view = self._memory.view
        table, entries = self._desc, self.size
        index = chain.head
        total = 0
        in_indirect = False
        left = self.size
        while True:
            if index >= entries:
                raise DriverError(f"descriptor {index} of {entries}")
            gpa, word = table[2 * index], table[2 * index + 1]
            length = word & 0xFFFF_FFFF
            flags = word >> 32
            try:
                buffer = view(gpa, length)
            except MemoryFault as e:
                raise DriverError(str(e)) from None
            if flags & DESC_F_INDIRECT:
                # 2.7.5.3: one table, at the end of the chain; WRITE is ignored here.
                if not self._indirect or in_indirect or flags & DESC_F_NEXT or not length or length % 16:
                    raise DriverError(f"indirect descriptor: length {length}, flags {flags & 0xFFFF:#x}")
                table, entries, index, in_indirect = buffer.cast("Q"), length // 16, 0, True
                continue
            total += length
            if not left or not length or total > _LONGEST:
                raise DriverError("a chain that is too long, or has an empty buffer")
            left -= 1
            if flags & DESC_F_WRITE:
                chain.writable.append(buffer)
                chain.written_to.append((gpa, length))
            elif chain.writable:
                raise DriverError("a device-readable buffer after a device-writable one")
            else:
                chain.readable.append(buffer)
            if not flags & DESC_F_NEXT:
                return
            index = word >> 48

    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back, of which the first ``written`` bytes of the writable part were written (2.7.8)."""
        dma_write = self._memory.dma_write
        for gpa, length in chain.written_to:
            dma_write(gpa, length)
        at = 1 + 2 * (self.next_used & self._mask)
        self._elements[at] = chain.head
        self._elements[at + 1] = written
        # x86 makes stores in order: who sees the index sees the element and the data.
        self.next_used = (self.next_used + 1) & 0xFFFF
        self._used[1] = self.next_used

    def settle(self) -> bool:
        """After pushing a while: does the driver want an interrupt (2.7.7)?"""
        new, old = self.next_used, self.signalled
        if new == old:
            return False
        self.signalled = new
        # The ring's own pages: told after the stores, since whoever collects dirty pages stops us first.
        self._memory.dma_write(self.device, self._used_size)
        self._fence()
        if self._event_idx:
            return (new - self._avail[self._used_event] - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self._avail[0] & AVAIL_F_NO_INTERRUPT

    def silence(self) -> None:
        """We look at the queue by ourselves: the driver need not notify us (2.7.10)."""
        if not self._event_idx:
            self._used[0] = USED_F_NO_NOTIFY

    def listen(self) -> bool:
        """Ask to be notified of the next chain (2.7.10). True: one came before the driver could have seen that."""
        if self._event_idx:
            self._used[self._avail_event] = self.next_avail
        else:
            self._used[0] = 0
        self._memory.dma_write(self.device, self._used_size)
        self._fence()
        return self._avail[1] != self.next_avail
