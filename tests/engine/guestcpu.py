"""The other side of the comparison: :class:`GuestCpu` runs the cases of a batch inside a VM of an engine."""

from __future__ import annotations

from types import TracebackType

from skep.engine.amd64.registers import Cr0, Pte
from skep.engine.contract import Engine
from tests.engine.place import (
    CODE,
    CODE_SIZE,
    DATA,
    DATA_SIZE,
    FILLER,
    GPRS,
    LOW_CODE,
    LOW_DATA,
    PAGE,
    PAGES,
    Access,
    Batch,
    Case,
    Outcome,
    changed_pages,
    comparable_fpu,
)
from tests.engine.tiny import CODE64, DATA0, MMIO, NULL_SEGMENT, SEGMENTS, USER32, USER64, USER_DATA, Tiny, TinyError

CODE_GPA = 0x400000
DATA_GPA = 0x600000
_PATIENCE = 15.0
"""Seconds for a batch."""
KERNEL = 0xFFFF_9000_0000_0000
"""Where the VM's own tables lie, so that a wild address finds as little in the guest as it does in the host process."""


class GuestCpu:
    """One VM for many batches. A case runs in ring 3, or in ring 0 if ``supervisor``; the handlers that end it run on a
    stack of their own (IST), so that they leave its memory alone. ``writable``: code may be stored to."""

    def __init__(
        self, engine: Engine, *, supervisor: bool = False, cpu_model: str = "host", writable: bool = False
    ) -> None:
        self.tiny = Tiny(engine, "hlt", ist=dict.fromkeys(range(256), 1), cpu_model=cpu_model, base=KERNEL)
        self.supervisor = supervisor
        self.tiny.set(cr0=self.tiny.state["cr0"] | Cr0.AM)  # as Linux has it
        self.tiny.unmap(MMIO)  # the host process has nothing there
        user = 0 if supervisor else Pte.US
        for base in (CODE, LOW_CODE):
            for offset in range(0, CODE_SIZE, PAGE):
                self.tiny.map(base + offset, CODE_GPA + offset, user | (Pte.RW if writable else 0))
        for i, access in enumerate(PAGES):
            if access is not Access.NONE:
                flags = user | Pte.NX | (Pte.RW if access is Access.WRITE else 0)
                for base in (DATA, LOW_DATA):
                    self.tiny.map(base + i * PAGE, DATA_GPA + i * PAGE, flags)

    def run(self, batch: Batch) -> list[Outcome]:
        """Outcomes in the order of ``batch.cases``."""
        memory = self.tiny.memory
        memory.write(CODE_GPA, FILLER)
        for case in batch.cases:
            memory.write(CODE_GPA + case.offset, case.code)
        with self.tiny.watched(_PATIENCE):
            return [self._run(case, batch.data) for case in batch.cases]

    def _run(self, case: Case, data: bytes) -> Outcome:
        tiny = self.tiny
        tiny.memory.write(DATA_GPA, data)
        code, stack, data_segment = self._segments(case.bits)
        tiny.set(
            **dict(zip(GPRS, case.registers, strict=True)),
            rip=case.address,
            rflags=case.rflags,
            cs=code,
            ss=stack,
            ds=data_segment,
            es=data_segment,
            fs={**NULL_SEGMENT, "base": case.fs_base},
            gs={**NULL_SEGMENT, "base": case.gs_base},
            xsave=case.xsave,
            cr2=0,
        )
        tiny.until_halt()
        state = tiny.state
        frame = tiny.frame(state)
        if frame is None:
            raise TinyError(f"the case ended without an exception, at rip {state['rip']:#x}")
        registers = {**{name: state[name] for name in GPRS}, "rsp": frame.rsp}
        return Outcome(
            registers=tuple(registers.values()),
            rip=frame.rip,
            rflags=frame.rflags,
            vector=frame.vector,
            error=frame.error,
            cr2=frame.cr2 if frame.vector == 14 else 0,
            fpu=comparable_fpu(state["xsave"]),
            pages=changed_pages(data, memory_image(tiny)),
        )

    def _segments(self, bits: int) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """CS, SS and what DS and ES are."""
        if bits == 64:
            code, stack = (CODE64, DATA0) if self.supervisor else (USER64, USER_DATA)
            return SEGMENTS[code], SEGMENTS[stack], NULL_SEGMENT
        if bits == 32:
            return SEGMENTS[USER32], SEGMENTS[USER_DATA], SEGMENTS[USER_DATA]
        narrow = {"selector": 0x07, "base": LOW_CODE, "limit": 0xFFFF, "attributes": 0xFB}
        data = {"selector": 0x0F, "base": LOW_DATA, "limit": DATA_SIZE - 1, "attributes": 0xF3}
        return narrow, data, data

    def close(self) -> None:
        self.tiny.close()

    def __enter__(self) -> GuestCpu:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def memory_image(tiny: Tiny) -> bytes:
    """The data area as it is."""
    return tiny.memory.read(DATA_GPA, DATA_SIZE)
