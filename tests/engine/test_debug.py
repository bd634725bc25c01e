"""A debugger outside the guest: places, steps and INT3, under each engine alike."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from skep.engine.amd64 import hostcpuid
from skep.engine.contract import Exit, ExitReason
from skep.engine.debug import Debug, On, Place
from tests.engine.engines import NAMES, Machines, named
from tests.engine.tiny import MMIO, Tiny

Boot = Callable[..., Tiny]

V = 0x180000
"""What is watched."""
TCG = struct.unpack("<III", b"TCGTCGTCGTCG")
"""QEMU's emulation, as its CPUID has it."""


@pytest.fixture(params=NAMES)
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    with closing(Machines(named(request.param))) as machines:

        def make(text: str, **options: Any) -> Tiny:
            return machines(text, **{"symbols": {"V": V}, **options})

        make.engine = request.param  # type: ignore[attr-defined]
        yield make


def needs(boot: Boot, what: On | None) -> None:
    """Skip where the processor under KVM lacks ``what``, or (None) an INT3 that KVM gets to see."""
    name = boot.engine  # type: ignore[attr-defined]
    if name == "kvm" and what is not On.EXECUTE:
        pytest.skip("KVM's instruction emulator has breakpoints for execution only")
    if name == "hardware" and what is None and hostcpuid.cpuid(0x4000_0000)[1:] == TCG:
        pytest.skip("QEMU's SVM does not intercept INT3")


def stops(guest: Tiny) -> tuple[int, Exit]:
    """Run to where a debugger has something to say."""
    with guest.watched(10):
        left = guest.vcpu.run()
    return guest.reg("rip"), left


def debug(*places: Place, step: bool = False, instruction: bool = False) -> Debug:
    return Debug(step, instruction, places)


def told(left: Exit) -> tuple[tuple[int, ...], bool, bool]:
    assert left.reason is ExitReason.DEBUG, left
    return left.detail["places"], left.detail["step"], left.detail["instruction"]


LOOP = "mov ecx, 3\nagain: inc eax\nhere: inc eax\nloop again\nend: hlt"


def test_a_place_stops_before_its_instruction_each_time(boot: Boot) -> None:
    needs(boot, On.EXECUTE)
    guest = boot(LOOP)
    here = guest.program["here"]
    guest.vcpu.set_debug(debug(Place(0x1234, On.EXECUTE), Place(here, On.EXECUTE)))
    for count in (1, 3, 5):
        at, left = stops(guest)
        assert at == here and told(left) == ((1,), False, False)
        assert guest.reg("rax") == count
    assert guest.run().reason is ExitReason.HALTED and guest.reg("rax") == 6


def test_a_stop_is_passed_after_a_kick_too(boot: Boot) -> None:
    needs(boot, On.EXECUTE)
    guest = boot(LOOP)
    here = guest.program["here"]
    guest.vcpu.set_debug(debug(Place(here, On.EXECUTE)))
    assert stops(guest)[0] == here
    guest.vcpu.request_exit()
    at, left = stops(guest)
    assert left.reason is ExitReason.KICKED and at == here
    assert stops(guest)[0] == here and guest.reg("rax") == 3


def test_whoever_is_moved_to_a_place_stops_there(boot: Boot) -> None:
    """What stopped it elsewhere is another matter."""
    needs(boot, On.EXECUTE)
    guest = boot(LOOP)
    here, again = guest.program["here"], guest.program["again"]
    guest.vcpu.set_debug(debug(Place(here, On.EXECUTE), Place(again, On.EXECUTE)))
    assert stops(guest)[0] == again
    guest.set(rip=here)
    at, left = stops(guest)
    assert at == here and told(left) == ((0,), False, False) and guest.reg("rax") == 0


def test_steps(boot: Boot) -> None:
    guest = boot("mov eax, 5\none: call f\ntwo: mov [V], eax\nthree: jmp four\nf: inc eax\ng: ret\nfour: nop\nend: hlt")
    at = guest.program
    guest.vcpu.set_debug(debug(step=True))
    for name in ("one", "f", "g", "two", "three", "four", "end"):
        where, left = stops(guest)
        assert where == at[name] and told(left) == ((), True, False), name
    assert guest.load(V, 4) == 6
    assert not guest.reg("rflags") & 0x100
    guest.vcpu.set_debug(Debug())
    assert guest.run().reason is ExitReason.HALTED


def test_a_step_over_an_access_to_a_device(boot: Boot) -> None:
    guest = boot("in al, 0x60\none: out 0x80, al\ntwo: mov [rdi], al\nthree: mov ebx, [rdi]\nfour: hlt")
    guest.set(rdi=MMIO)
    guest.io.inputs[0x60] = 0x77
    guest.vcpu.set_debug(debug(step=True))
    for name in ("one", "two", "three", "four"):
        where, left = stops(guest)
        assert where == guest.program[name] and told(left) == ((), True, False), name
    assert [one[0] for one in guest.io.log] == ["in", "out", "write", "read"]
    assert guest.reg("rbx") & 0xFF == 0x77


def test_a_repeated_instruction_is_stepped_by_iterations(boot: Boot) -> None:
    """One at a time, but in KVM's emulator, which does them all and comes back; QEMU's processor comes back, too."""
    guest = boot("mov edi, V\nmov ecx, 3\nmov eax, 0x55\nagain: rep stosb\nnext: hlt")
    guest.vcpu.set_debug(debug(step=True))
    where, counts = 0, []
    while where != guest.program["next"]:
        where, _ = stops(guest)
        if where == guest.program["again"]:
            counts.append(guest.reg("rcx"))
    assert counts in ([3, 2, 1], [3, 0], [3, 2, 1, 0])
    assert guest.read(V, 4) == b"\x55" * 3 + b"\0"


def test_a_step_passes_a_place_and_comes_to_one(boot: Boot) -> None:
    needs(boot, On.EXECUTE)
    guest = boot(LOOP)
    at = guest.program
    places = Place(at["again"], On.EXECUTE), Place(at["here"], On.EXECUTE)
    guest.vcpu.set_debug(debug(*places))
    assert stops(guest)[0] == at["again"]
    guest.vcpu.set_debug(debug(*places, step=True))
    where, left = stops(guest)
    assert where == at["here"] and told(left)[1]
    guest.vcpu.set_debug(debug(*places))
    where, left = stops(guest)
    assert where == at["again"] and told(left) == ((0,), False, False), "the place that a step came to is passed"


def test_no_interrupt_comes_before_a_step(boot: Boot) -> None:
    guest = boot("sti\nnop\none: nop\ntwo: nop\nthree: jmp three\nhandler: cli\nhlt", handlers={0x40: "handler"})
    at = guest.program
    guest.vcpu.set_debug(debug(step=True))
    while stops(guest)[0] != at["one"]:
        pass
    guest.interrupts.raise_vector(0x40)
    for name in ("two", "three", "three"):
        assert stops(guest)[0] == at[name]
    guest.vcpu.set_debug(Debug())
    assert guest.run().reason is ExitReason.HALTED
    assert guest.reg("rip") > at["handler"]


def test_registers_and_memory_are_the_debuggers_while_it_stands(boot: Boot) -> None:
    needs(boot, On.EXECUTE)
    guest = boot("mov eax, 5\nhere: mov [V], eax\nmov ebx, [V + 8]\nhlt")
    guest.vcpu.set_debug(debug(Place(guest.program["here"], On.EXECUTE)))
    stops(guest)
    guest.set(rax=0x1234)
    guest.memory.write(V + 8, b"\x78\x56\0\0")
    guest.vcpu.set_debug(Debug())
    guest.run()
    assert guest.load(V, 4) == 0x1234 and guest.reg("rbx") == 0x5678


@pytest.mark.parametrize(
    ("text", "place", "hit"),
    [
        ("mov [V], al", Place(V, On.WRITE), True),
        ("mov [V + 1], al", Place(V, On.WRITE), False),
        ("mov al, [V]", Place(V, On.WRITE), False),
        ("mov al, [V]", Place(V, On.ACCESS), True),
        ("mov [V + 7], al", Place(V, On.WRITE, 8), True),
        ("mov [V + 8], al", Place(V, On.WRITE, 8), False),
        ("lock inc dword [V]", Place(V, On.ACCESS, 4), True),
    ],
)
def test_watched_data_stops_behind_the_instruction(boot: Boot, text: str, place: Place, hit: bool) -> None:
    needs(boot, place.on)
    guest = boot(f"nop\n{text}\nnext: nop\nhlt")
    guest.vcpu.set_debug(debug(place))
    where, left = stops(guest)
    if hit:
        assert where == guest.program["next"] and told(left) == ((0,), False, False)
        left = guest.run()
    assert left.reason is ExitReason.HALTED


def test_a_watched_place_that_a_step_hits(boot: Boot) -> None:
    needs(boot, On.WRITE)
    guest = boot("mov [V], al\nnext: hlt")
    guest.vcpu.set_debug(debug(Place(V, On.WRITE), step=True))
    where, left = stops(guest)
    assert where == guest.program["next"] and told(left) == ((0,), True, False)


def test_the_breakpoint_instruction(boot: Boot) -> None:
    """As debuggers do it: take it away, step, put it back."""
    needs(boot, None)
    guest = boot(LOOP)
    here = guest.program["here"]
    instruction = guest.read("here", 1)
    for count in (1, 3, 5):
        guest.memory.write(here, b"\xcc")
        guest.vcpu.set_debug(debug(instruction=True))
        where, left = stops(guest)
        assert where == here and told(left) == ((), False, True) and guest.reg("rax") == count
        guest.memory.write(here, instruction)
        guest.vcpu.set_debug(debug(step=True))
        where, left = stops(guest)
        assert where > here and told(left) == ((), True, False)
    guest.vcpu.set_debug(Debug())
    guest.run()
    assert guest.reg("rax") == 6


def test_the_guests_int3_is_its_own_otherwise(boot: Boot) -> None:
    needs(boot, None)
    guest = boot("int3\nhlt")
    guest.vcpu.set_debug(debug(Place(0x1234, On.EXECUTE)))
    guest.run()
    assert guest.exception is not None and guest.exception.vector == 3


def test_the_guest_sees_its_own_debug_registers(boot: Boot) -> None:
    """Which do nothing meanwhile, and work again after it."""
    needs(boot, On.WRITE)
    guest = boot("mov rbx, dr0\nmov rdx, dr7\nhere: nop\nthere: nop\nhlt")
    at = guest.program
    guest.set(dr0=at["here"], dr7=0x402)
    guest.vcpu.set_debug(debug(Place(at["there"], On.EXECUTE)))
    where, left = stops(guest)
    assert where == at["there"] and told(left)[0] == (0,)
    assert (guest.reg("rbx"), guest.reg("rdx")) == (at["here"], 0x402)
    state = guest.state
    assert (state["dr0"], state["dr7"]) == (at["here"], 0x402)
    guest.vcpu.set_debug(Debug())
    guest.set(rip=at["here"])
    guest.run()
    assert guest.exception is not None and (guest.exception.vector, guest.exception.rip) == (1, at["here"])


def test_the_guests_own_single_steps_are_its_own(boot: Boot) -> None:
    """With places elsewhere, which is when KVM leaves each #DB to us."""
    guest = boot("push 0x102\npopfq\nnop\nafter: nop\nhlt")
    guest.vcpu.set_debug(debug(Place(0x1234, On.EXECUTE)))
    guest.run()
    frame = guest.exception
    assert frame is not None and (frame.vector, frame.rip) == (1, guest.program["after"])
    assert guest.reg("dr6") & 0x400F == 0x4000


def test_a_step_that_halts(boot: Boot) -> None:
    """Which of the two it was, engines tell differently."""
    guest = boot("nop\nhere: hlt\nbehind: nop")
    guest.vcpu.set_debug(debug(step=True))
    assert stops(guest)[0] == guest.program["here"]
    where, left = stops(guest)
    assert where == guest.program["behind"] and left.reason in (ExitReason.HALTED, ExitReason.DEBUG)


def test_a_step_that_is_asked_back(boot: Boot) -> None:
    guest = boot("nop\nnop\nhlt")
    guest.vcpu.set_debug(debug(step=True))
    guest.vcpu.request_exit()
    assert stops(guest)[1].reason is ExitReason.KICKED
    assert told(stops(guest)[1])[1]


def test_it_can_be_said_while_the_guest_is_asked_back(boot: Boot) -> None:
    """A guest in the middle of a loop, as a debugger that attaches finds it."""
    guest = boot("again: inc rax\njmp again")
    asker = threading.Timer(0.1, guest.vcpu.request_exit)
    asker.start()
    assert stops(guest)[1].reason is ExitReason.KICKED
    asker.join()
    guest.vcpu.set_debug(debug(step=True))
    before = guest.reg("rax")
    for _ in range(4):
        assert told(stops(guest)[1])[1]
    assert guest.reg("rax") == before + 2


@pytest.mark.parametrize(
    "wrong", [(1, On.WRITE, 2), (0, On.EXECUTE, 2), (0, On.WRITE, 3), (-8, On.WRITE, 8), (1 << 64, On.WRITE, 1)]
)
def test_places_that_no_processor_has(wrong: tuple[int, On, int]) -> None:
    with pytest.raises(ValueError, match="no place"):
        Place(*wrong)


def test_more_places_than_there_are() -> None:
    with pytest.raises(ValueError, match="5 places"):
        debug(*(Place(address, On.EXECUTE) for address in range(5)))
