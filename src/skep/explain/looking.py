"""From a VM that stands still to its explanation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skep.explain import amd64, findings, linux
from skep.explain.explanation import Explanation, Frame, Processor
from skep.explain.subject import Activity, Cause, Seen, Subject
from skep.explain.symbols import NoSymbols, Symbols

_INSTRUCTIONS = 3
_LINES = 8


def explain(subject: Subject) -> Explanation:
    """Look at a VM that stands still. Never raises for what a guest did; takes a tenth of a second."""
    kernel = _Kernel(subject)
    log = "\n".join(kernel.log)
    cause = subject.cause
    why = findings.panic(subject.said) or findings.panic(log)
    if why is not None and cause is not Cause.TRIPLE_FAULT:
        cause = Cause.PANIC
    machine = findings.Machine.of(subject.tree, subject.memory.size)
    rips = {record.rip for seen in subject.processors for record in seen.exits if record.rip is not None}
    processors = tuple(_processor(subject, seen, kernel.symbols) for seen in subject.processors)
    return Explanation(
        cause=cause,
        summary=_summary(subject, cause, why),
        findings=tuple(findings.find(machine, subject.said, log)),
        processors=processors,
        culprit=_culprit(cause, subject.processors, findings.panicked_cpu(f"{subject.said}\n{log}")),
        unanswered=dict(subject.unanswered),
        owners=dict(subject.owners),
        functions={rip: name for rip in rips if (name := kernel.symbols.name(rip)) is not None},
        said=tuple(_last_lines(subject.said)),
        log=tuple(kernel.log),
        symbols=kernel.symbols_from,
    )


class _Kernel:
    """What the guest's kernel tells, where it is one that we know."""

    def __init__(self, subject: Subject) -> None:
        self.log: list[str] = []
        self.symbols: Symbols = NoSymbols()
        self.symbols_from = "no functions are named: no kernel was found in memory"
        physical = linux.Physical(subject.memory)
        for seen in subject.processors:
            if not seen.registers:
                continue
            space = amd64.AddressSpace(subject.memory, dict(seen.registers))
            image = linux.find_image(space)
            if image is None:
                continue
            self.log = linux.find_log(physical, image)
            self._find_symbols(subject, physical, space, image, dict(seen.registers))
            return

    def _find_symbols(
        self,
        subject: Subject,
        physical: linux.Physical,
        space: amd64.AddressSpace,
        image: linux.Image,
        state: dict[str, Any],
    ) -> None:
        given = subject.system_map
        if given is not None and linux.fit(given, space, state, image):
            self.symbols = given
            self.symbols_from = f"names from {given.source}, moved by {given.slide:#x}"
            return
        own = linux.find_symbols(physical, image)
        if own is not None:
            self.symbols = own
            self.symbols_from = f"names from {own.source}"
        else:
            self.symbols_from = "no functions are named: the kernel has no table of them; --system-map gives one"
        if given is not None:
            self.symbols_from += f"; {given.source} belongs to another kernel"


def _processor(subject: Subject, seen: Seen, symbols: Symbols) -> Processor:
    state = dict(seen.registers)
    space = amd64.AddressSpace(subject.memory, state)
    rip = int(state.get("rip", 0))
    stack, sure = amd64.stack(space, state, symbols) if state else ([], False)
    places = dict.fromkeys((symbols.name(place) or f"{place:#x}").split("+")[0] for place in seen.places)
    faulted = subject.cause is Cause.TRIPLE_FAULT and seen.activity is Activity.FAULTED
    return Processor(
        index=seen.index,
        activity=seen.activity,
        registers=seen.registers,
        at=Frame(rip, symbols.name(rip)),
        mode=amd64.mode(state) if state else "",
        interrupts_on=amd64.interrupts_on(state),
        places=tuple(places),
        code=tuple(amd64.code(space, state, _INSTRUCTIONS)) if state else (),
        stack=tuple(Frame(address, symbols.name(address)) for address in stack),
        stack_is_sure=sure,
        broken=tuple(amd64.broken(space, state)) if faulted else (),
        exits=seen.exits,
        refused=dict(seen.refused or {}),
    )


def _culprit(cause: Cause, seen: Sequence[Seen], panicked: int | None) -> int:
    """Who panicked stops the others, which halt; otherwise whoever still does something."""
    if cause is Cause.PANIC and panicked is not None:
        return panicked
    order = (Activity.FAULTED, Activity.STOPPED, Activity.SPINNING, Activity.RUNNING, Activity.HALTED, Activity.IDLE)
    return next((one.index for activity in order for one in seen if one.activity is activity), 0)


def _summary(subject: Subject, cause: Cause, why: str | None) -> str:
    text = cause.value
    if cause is Cause.SILENT:
        text = f"the guest has said nothing for {subject.silent_for:.0f} s"
    if why is not None:
        text = f"{text}: {why}" if cause is Cause.PANIC else f"{text}, after its kernel panicked: {why}"
    return text


def _last_lines(said: str) -> list[str]:
    lines = [_printable(line) for line in said.replace("\r", "\n").split("\n")]
    return [line for line in lines if line.strip()][-_LINES:]


def _printable(text: str) -> str:
    """What a guest wrote must not move our terminal's cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
