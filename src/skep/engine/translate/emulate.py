"""The instructions that translated code leaves to Python, one at a time.

:class:`Emulator` fetches, decodes (iced-x86) and looks the mnemonic up in a table; the instructions themselves are in
the ``emulate_*`` modules, by kind. Each runs all its checks, in the manuals' order, before it commits anything; a fault
is a :class:`~skep.engine.translate.port.GuestFault` and leaves rip and everything else as it was.
"""

from __future__ import annotations

from collections import deque

from iced_x86 import Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic

from skep.engine.amd64.cpuid import Cpuid
from skep.engine.amd64.registers import Rflags, Vector
from skep.engine.translate import (
    emulate_integer,
    emulate_move,
    emulate_string,
    emulate_system,
    emulate_transfer,
    emulate_vector,
    segments,
)
from skep.engine.translate.context import M32, M64, Context, Handler
from skep.engine.translate.modelspecific import ModelSpecific
from skep.engine.translate.port import CpuPort, GuestFault

MAX_LENGTH = 15
PAGE = 4096

MEANT_AS_UNDEFINED = frozenset((Mnemonic.UD0, Mnemonic.UD1, Mnemonic.UD2))
SETS_RF = frozenset((Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ))

HANDLERS: dict[int, Handler] = {
    **emulate_integer.HANDLERS,
    **emulate_move.HANDLERS,
    **emulate_string.HANDLERS,
    **emulate_system.HANDLERS,
    **emulate_transfer.HANDLERS,
    **emulate_vector.HANDLERS,
}


class Emulator(Context):
    """Executes the instruction at rip.

    ``cpuid`` is what the guest's CPUID says, ``msrs`` its model-specific registers. After a step ``shadow`` says that
    interrupts are held off for one more instruction (STI, MOV SS, POP SS). #DB for single steps is the caller's.
    """

    def __init__(self, cpu: CpuPort, cpuid: Cpuid, msrs: ModelSpecific) -> None:
        super().__init__(cpu, cpuid, msrs)
        self.refused: deque[str] = deque(maxlen=16)
        """The last instructions that raised #UD because nobody here knows them, for diagnosis."""
        self.unknown: Instruction | None = None
        """The one that the last step did not know."""

    def step(self) -> bool:
        """Execute one instruction (of a REP string instruction a bounded part, with rip unmoved if more is to do).

        True: it was HLT. Raises GuestFault with nothing committed, for the caller to deliver.
        """
        st = self.st
        self.bits = segments.code_bits(st)
        self.halted = self.shadow = False
        self.unknown = None
        i = self._fetch()
        self.next_rip = i.next_ip & M64 if self.bits == 64 else i.next_ip & M32
        handler = HANDLERS.get(i.mnemonic)
        if handler is None:
            self.unknown = i
            if i.mnemonic not in MEANT_AS_UNDEFINED:
                self.refused.append(f"{st.rip:#x}: {i}")
            raise GuestFault(Vector.UD)
        handler(self, i)
        st.rip = self.next_rip
        if i.mnemonic not in SETS_RF:
            st.sysfl &= ~Rflags.RF
        return self.halted

    def step_msr(self, write: bool) -> None:
        """The RDMSR or WRMSR of two bytes at rip, in 64-bit mode at CPL 0."""
        self.bits = 64
        (emulate_system.write_msr if write else emulate_system.read_msr)(self)
        self.st.rip += 2

    def _fetch(self) -> Instruction:
        """The instruction at rip; the second page is only touched if the instruction reaches it."""
        st = self.st
        rip = st.rip
        address = rip if self.bits == 64 else st.cs_base + rip & M32
        first = min(MAX_LENGTH, PAGE - (address & PAGE - 1))
        data = self.cpu.fetch(address, first)
        decoder = Decoder(self.bits, data, DecoderOptions.NONE, ip=rip)
        i = decoder.decode()
        if decoder.last_error == DecoderError.NO_MORE_BYTES:
            if first == MAX_LENGTH:
                raise GuestFault(Vector.GP, 0)  # longer than 15 bytes
            following = address + first & (M64 if self.bits == 64 else M32)
            data += self.cpu.fetch(following, MAX_LENGTH - first)
            decoder = Decoder(self.bits, data, DecoderOptions.NONE, ip=rip)
            i = decoder.decode()
            if decoder.last_error == DecoderError.NO_MORE_BYTES:
                raise GuestFault(Vector.GP, 0)
        if decoder.last_error != DecoderError.NONE:
            self.refused.append(f"{rip:#x}: {data.hex()}")
            raise GuestFault(Vector.UD)
        return i
