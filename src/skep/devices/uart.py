"""The 16550A serial port (National Semiconductor PC16550D data sheet).

The line has no speed. Towards the host the transmitter is empty again as soon as a byte is written; the backend
gathers bytes and never makes us wait. Towards the guest the backend gives what the FIFO has room for, and it has room
only while the guest asserts RTS, the line's own flow control: a driver does so when it is ready, having emptied
the FIFOs, so that input which was there before the guest is not lost. As nothing follows at line speed, the character
timeout comes at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from skep.contracts.chardev import CharBackend, PlainLine
from skep.contracts.io import IoRegion, IrqLine
from skep.state import Fields

if TYPE_CHECKING:
    from skep.bus import Bus
    from skep.contracts.constantports import ConstantPorts
    from skep.locks import Lock

COM1, COM1_IRQ = 0x3F8, 4

# Registers; with DLAB the first two are the divisor.
RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RDA, IER_THRE, IER_LINE, IER_MODEM = (1 << bit for bit in range(4))
IIR_MODEM, IIR_NONE, IIR_THRE, IIR_RDA, IIR_LINE, IIR_TIMEOUT, IIR_FIFOS = 0x00, 0x01, 0x02, 0x04, 0x06, 0x0C, 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER = 1 << 0, 1 << 1
LCR_DLAB = 1 << 7
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = (1 << bit for bit in range(5))
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 1 << 0, 1 << 1, 1 << 5, 1 << 6
MSR_TERI, MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 1 << 2, 1 << 4, 1 << 5, 1 << 6, 1 << 7

FIFO_SIZE = 16
_TRIGGERS = (1, 4, 8, 14)
_BYTES = [bytes((value,)) for value in range(256)]


class Uart(PlainLine, Fields):
    """One port. Implements Device, IoRegion and :class:`skep.contracts.chardev.Receiver`."""

    state_fields: ClassVar[tuple[str, ...]] = (
        "fifo", "ier", "fcr", "lcr", "mcr", "lsr_errors", "msr", "scr", "divisor", "thre_interrupt",
    )  # fmt: skip

    def __init__(self, name: str, irq: IrqLine, backend: CharBackend, lock: Lock) -> None:
        """The backend belongs to the caller, who closes it first."""
        self.name = name
        self._irq = irq
        self._backend = backend
        self._lock = lock
        self._paused = False
        self._late = b""  # came while we were paused
        self._constants: ConstantPorts | None = None
        self._lsr_port = 0
        self.reset()
        backend.connect(self)

    # The life of a device.

    def reset(self) -> None:
        """Master reset (data sheet, table I)."""
        self.fifo = b""
        """What was received."""
        self.ier = self.fcr = self.lcr = self.mcr = self.scr = 0
        self.lsr_errors = 0
        self.msr = MSR_CTS | MSR_DSR | MSR_DCD
        self.divisor = 0x0C
        """Nobody's concern here; 9600 baud, as firmware leaves it."""
        self.thre_interrupt = False
        self._changed()

    def pause(self) -> None:
        """Input waits in the backend from now on."""
        with self._lock:
            self._paused = True

    def resume(self) -> None:
        with self._lock:
            self._paused = False
            late, self._late = self._late, b""
            if late:
                self.receive(late)
        self._backend.room_available()

    def loaded(self) -> None:
        self._changed()

    def close(self) -> None:
        self._paused = True
        self._constants = None

    def regions(self) -> list[tuple[IoRegion, int]]:
        return [(self, 8)]

    def attach(self, bus: Bus, base: int = COM1) -> None:
        bus.add_ports(base, 8, self)
        bus.post_port(base + RBR_THR, stream=True)
        self._constants, self._lsr_port = bus.constants, base + LSR
        self._changed()

    # The line: input.

    def room(self) -> int:
        if self._paused or self.mcr & (MCR_RTS | MCR_LOOP) != MCR_RTS:
            return 0
        return max(self._capacity() - len(self.fifo), 0)

    def receive(self, data: bytes) -> None:
        """All of it is kept, also if the FIFO became smaller since ``room`` was asked."""
        with self._lock:
            if self._paused:
                self._late += data
            else:
                self.fifo += data
                self._changed()

    def _capacity(self) -> int:
        return FIFO_SIZE if self.fcr & FCR_ENABLE else 1

    # The ports.

    def read(self, offset: int, size: int) -> int:
        if size != 1:
            return sum(self.read(offset + i, 1) << 8 * i for i in range(size))
        if offset == LSR:
            value = self._lsr()
            if self.lsr_errors:
                self.lsr_errors = 0
                self._changed()
            return value
        if offset == RBR_THR:
            return self.divisor & 0xFF if self.lcr & LCR_DLAB else self._read_data()
        if offset == IIR_FCR:
            return self._read_iir()
        if offset == IER:
            return self.divisor >> 8 if self.lcr & LCR_DLAB else self.ier
        if offset == MSR:
            value, self.msr = self.msr, self.msr & 0xF0
            self._changed()
            return value
        return self.lcr if offset == LCR else self.mcr if offset == MCR else self.scr if offset == SCR else 0xFF

    def _lsr(self) -> int:
        return LSR_THRE | LSR_TEMT | self.lsr_errors | (LSR_DR if self.fifo else 0)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            for i in range(size):
                self.write(offset + i, 1, value >> 8 * i & 0xFF)
        elif offset == RBR_THR:
            if self.lcr & LCR_DLAB:
                self.divisor = self.divisor & 0xFF00 | value
            else:
                self._transmit(value)
        elif offset == IER:
            if self.lcr & LCR_DLAB:
                self.divisor = self.divisor & 0xFF | value << 8
            else:
                if value & ~self.ier & IER_THRE:  # enabling it while the transmitter is empty interrupts
                    self.thre_interrupt = True
                self.ier = value & 0x0F
                self._changed()
        elif offset == IIR_FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self.lcr = value
        elif offset == MCR:
            self._write_mcr(value & 0x1F)
        elif offset == SCR:
            self.scr = value

    def _transmit(self, value: int) -> None:
        if self.mcr & MCR_LOOP:
            if len(self.fifo) < self._capacity():
                self.fifo += _BYTES[value]
            else:
                self.lsr_errors |= LSR_OE
            self._changed()
        else:
            self._backend.write(_BYTES[value])
        if self.ier & IER_THRE:
            # Full for no time at all, but an edge-triggered controller wants to see it.
            self.thre_interrupt = False
            self._changed()
        self.thre_interrupt = True
        if self.ier:
            self._changed()

    def _read_data(self) -> int:
        fifo = self.fifo
        if not fifo:
            return 0
        self.fifo = fifo[1:]
        self._changed()
        if len(fifo) == 1:
            self._backend.room_available()
        return fifo[0]

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRE:
            self.thre_interrupt = False
            self._changed()
        return cause | (IIR_FIFOS if self.fcr & FCR_ENABLE else 0)

    def _write_fcr(self, value: int) -> None:
        if (value ^ self.fcr) & FCR_ENABLE or value & FCR_CLEAR_RECEIVER:
            self.fifo = b""
        self.fcr = value & 0xC9 if value & FCR_ENABLE else 0  # the other bits count only with it
        self._changed()
        self._backend.room_available()

    def _write_mcr(self, value: int) -> None:
        self.mcr = value
        if value & MCR_LOOP:
            # CTS follows RTS, DSR DTR, RI OUT1 and DCD OUT2.
            lines = (value & MCR_RTS) << 3 | (value & MCR_DTR) << 5 | (value & (MCR_OUT1 | MCR_OUT2)) << 4
        else:
            lines = MSR_CTS | MSR_DSR | MSR_DCD
        changes = (lines ^ self.msr) >> 4
        if lines & MSR_RI:  # only its end counts
            changes &= ~MSR_TERI
        self.msr = lines | self.msr & 0x0F | changes
        self._changed()
        if self.room():
            self._backend.room_available()

    # Interrupts (data sheet, table IV).

    def _cause(self) -> int:
        """IIR's low four bits: the most urgent cause that is enabled."""
        ier = self.ier
        if ier & IER_LINE and self.lsr_errors:
            return IIR_LINE
        if ier & IER_RDA and self.fifo:
            enough = not self.fcr & FCR_ENABLE or len(self.fifo) >= _TRIGGERS[self.fcr >> 6]
            return IIR_RDA if enough else IIR_TIMEOUT
        if ier & IER_THRE and self.thre_interrupt:
            return IIR_THRE
        if ier & IER_MODEM and self.msr & 0x0F:
            return IIR_MODEM
        return IIR_NONE

    def _changed(self) -> None:
        """Drive the interrupt line. A PC leads INTR through OUT2, which loopback turns off. And say what LSR, which
        drivers read before each byte they send, is until the next change: reading it ends errors, and in loopback what
        is sent is received."""
        if self._constants is not None:
            changing = self.lsr_errors or self.mcr & MCR_LOOP
            self._constants.set(self._lsr_port, None if changing else self._lsr())
        self._irq.set(self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 and self._cause() != IIR_NONE)
