"""What a vCPU does of its local APIC's work by itself, in the compiled language (runtime.py): which interrupt comes
next, EOI, the task priority, the timer's deadline, and interrupts to other vCPUs (SDM 3, 11.5.4, 11.6, 11.8).

All of it only while ``st.apic`` says that this is lent (loan.py). A vCPU *posts* to another: it sets the vector's bit
in the other's state block, then the byte ``brk`` that the other looks at, and has it woken if it sleeps. Who takes
``brk`` away looks at the bits behind it, so none is lost.
"""

from __future__ import annotations

from skep.engine.amd64.msrs import IPI_FIXED, IPI_LOGICAL
from skep.engine.translate.compiler import cas64, fence, inline, ld64, st, st8, st32, st64
from skep.engine.translate.layout import BRK, BRK_STI, EDGES, OFFSETS, POSTED, TAKEN, WAKES
from skep.engine.translate.runtime import resume

M32 = 0xFFFFFFFF
ASLEEP, LISTENING = OFFSETS["asleep"], OFFSETS["listening"]
LOWEST = 16
"""Vectors below it are illegal."""
TO_SELF, TO_OTHERS = 1, 3
"""Destination shorthands; 2 is everyone."""
NOBODY = 1
"""In place of a state block."""
NOTHING, COMES, FOR_PYTHON = 0, 1, 2


def top(word: int) -> int:
    """The number of the highest bit of what is not 0."""
    number = 0
    if word >> 32:
        number = 32
        word = word >> 32
    if word >> 16:
        number = number + 16
        word = word >> 16
    if word >> 8:
        number = number + 8
        word = word >> 8
    if word >> 4:
        number = number + 4
        word = word >> 4
    if word >> 2:
        number = number + 2
        word = word >> 2
    return number + (word >> 1)


def most_urgent() -> int:
    """The highest vector that was posted, or 0."""
    if st.posted3:
        return 192 + top(st.posted3)
    if st.posted2:
        return 128 + top(st.posted2)
    if st.posted1:
        return 64 + top(st.posted1)
    if st.posted0:
        return top(st.posted0)
    return 0


@inline
def priority() -> int:
    """The processor priority's class (SDM 3, 11.8.3.1)."""
    now = (st.apic_service & 0xFF) >> 4
    if st.apic_task >> 4 > now:
        now = st.apic_task >> 4
    return now


def arm_tick(left: int) -> int:
    """See to it that the host's timer goes off at ``apic_deadline``, which is ``left`` ticks ahead, or earlier."""
    if st.apic_armed and st.apic_armed <= st.apic_deadline:
        return 1
    if left > st.tick_most:
        left = st.tick_most
    st.tick_ns = ((left * st.tick_scale) >> 32) + 1
    st.apic_armed = st.apic_deadline
    st.tick_set = 1
    return 1


def set_deadline(now: int, value: int) -> int:
    """IA32_TSC_DEADLINE (SDM 3, 11.5.4.1); ``now`` is the host's counter. 0: an interrupt that is due, before or after,
    stays due whatever is written next: Python sees to that."""
    now = now + st.tsc_offset
    if (st.apic_deadline and st.apic_deadline <= now) or (value and value <= now):
        return 0
    st.apic_deadline = value
    if value:
        return arm_tick(value - now)
    return 1


def choose(now: int) -> int:
    """COMES: the most urgent interrupt that may be taken is on its way, in ``st.inject``. NOTHING: there is none;
    ``st.irq`` says whether one waits for RFLAGS.IF. FOR_PYTHON: more are in service than machine code can count."""
    st.irq = 0
    vector = most_urgent()
    ticks = 0
    deadline = st.apic_deadline
    if deadline:
        now = now + st.tsc_offset
        if now < deadline:
            arm_tick(deadline - now)
        elif st.apic_vector > vector:
            vector = st.apic_vector
            ticks = 1
    if vector >> 4 <= priority():
        return NOTHING
    if st.iflag == 0:
        st.irq = 1
        return NOTHING
    if st.apic_service >> 56:
        st.irq = 1
        st.wanted = 1
        return FOR_PYTHON
    if ticks:
        st.apic_deadline = 0
        st.n_tick = st.n_tick + 1
    else:
        slot = st.self_ + POSTED + (vector >> 6) * 8
        while True:
            bits = ld64(slot)
            if cas64(slot, bits, bits & ~(1 << (vector & 63))):
                break
    slot = st.self_ + EDGES + (vector >> 6) * 8
    st64(slot, ld64(slot) | (1 << (vector & 63)))
    st.apic_service = (st.apic_service << 8) | vector
    st.inject = 0x100 | vector
    st.site = 0
    st.n_irq = st.n_irq + 1
    return COMES


@inline
def look() -> int:
    """Take ``brk`` away: 1 if what it was set for may be machine code's alone."""
    mine = 0
    if st.apic and st.wanted == 0:
        st8(st.self_ + BRK, 0)
        st8(st.self_ + BRK_STI, 0)
        fence()
        mine = 1
        if st.wanted:  # since the first look
            st8(st.self_ + BRK, 1)
            mine = 0
    return mine


def attend(now: int) -> int:
    """Somebody wants the vCPU, which is to go on at ``st.rip``. If it is its own timer or another vCPU: as resume, with
    the interrupt on its way. 0: the rest is Python's, ``st.kind`` being BREAK."""
    if look() == 0:
        return 0
    if choose(now) == FOR_PYTHON:
        return 0
    return resume()


def halted(now: int) -> int:
    """The vCPU is to sleep after HLT, with RFLAGS.IF: NOTHING if it may; COMES where an interrupt does; FOR_PYTHON."""
    if look() == 0:
        return FOR_PYTHON
    return choose(now)


def look_again(now: int) -> int:
    """The processor priority is lower than it was: what was held back may be taken."""
    if most_urgent() or (st.apic_deadline and st.apic_deadline <= now + st.tsc_offset):
        if st.iflag:
            st8(st.self_ + BRK, 1)
        else:
            st.irq = 1
    return 1


def end_interrupt(now: int) -> int:
    """EOI. Nothing of what is lent is a level that an I/O APIC waits for the end of."""
    st.apic_service = st.apic_service >> 8
    return look_again(now)


def set_task_priority(now: int, value: int) -> int:
    st.apic_task = value
    return look_again(now)


def post(block: int, vector: int) -> int:
    """An interrupt for the vCPU of this state block."""
    slot = block + POSTED + (vector >> 6) * 8
    while True:  # even if the bit is set: what was stored before is to be seen by whoever takes it
        bits = ld64(slot)
        if cas64(slot, bits, bits | (1 << (vector & 63))):
            break
    st8(block + BRK, 1)
    fence()
    if ld64(block + ASLEEP):
        st32(block + ASLEEP, 0)
        st64(st.self_ + WAKES + st.wakes * 8, block)
        st.wakes = st.wakes + 1
    if ld64(block + LISTENING) == 0:  # it is Python's since we looked
        st.ring = 1
        st.wanted = 1
        st8(st.self_ + BRK, 1)
    st.n_ipi = st.n_ipi + 1
    return 1


def reach(first: int, mask: int, but: int, vector: int) -> int:
    """Post to the vCPUs whose APIC IDs ``mask`` names from ``first`` on, but not to ``but``. Without a vector: whether
    each of them can be posted to. An ID that nobody has is nobody."""
    while mask:
        if mask & 1 and first < st.vcpus_count:
            block = ld64(st.vcpus + first * 8)
            if block != but:
                if vector:
                    post(block, vector)
                elif block == 0 or ld64(block + LISTENING) == 0:
                    return 0
        mask = mask >> 1
        first = first + 1
    return 1


def reach_all(but: int, vector: int) -> int:
    first = 0
    while first < st.vcpus_count:
        if reach(first, 0xFFFF, but, vector) == 0:
            return 0
        first = first + 16
    return 1


def send_self(vector: int) -> int:
    if vector < LOWEST or vector > 0xFF:
        return 0
    post(st.self_, vector)
    if st.iflag == 0:
        st.irq = 1
    return 1


def send(command: int) -> int:
    """The x2APIC's interrupt command register (SDM 3, 11.12.9): 1, or 0 where that is Python's, with nobody told: what
    is no fixed interrupt, and what is for a vCPU that does not listen, or was never started."""
    vector = command & 0xFF
    if command & M32 & ~IPI_FIXED or vector < LOWEST:
        return 0
    destination = command >> 32
    shorthand = (command >> 18) & 3
    if shorthand == TO_SELF:
        if send_self(vector) == 0:
            return 0
    elif shorthand or destination == M32:
        but = NOBODY
        if shorthand == TO_OTHERS:
            but = st.self_
        if reach_all(but, 0) == 0:
            return 0
        reach_all(but, vector)
    elif command & IPI_LOGICAL:
        first = (destination >> 16) << 4
        if reach(first, destination & 0xFFFF, NOBODY, 0) == 0:
            return 0
        reach(first, destination & 0xFFFF, NOBODY, vector)
    else:
        if reach(destination, 1, NOBODY, 0) == 0:
            return 0
        reach(destination, 1, NOBODY, vector)
    st.apic_command = command
    return 1


def take_posted(block: int) -> int:
    """What was posted to the vCPU of this state block, to TAKEN. For any thread that has the local APIC's lock."""
    i = 0
    while i < 32:
        while True:
            bits = ld64(block + POSTED + i)
            if cas64(block + POSTED + i, bits, 0):
                break
        st64(block + TAKEN + i, bits)
        i = i + 8
    return 0


APIC_ROUTINES = [
    top, most_urgent, arm_tick, set_deadline, choose, attend, halted, look_again, end_interrupt, set_task_priority,
    post, reach, reach_all, send_self, send, take_posted,
]  # fmt: skip
