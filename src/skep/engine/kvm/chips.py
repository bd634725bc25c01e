"""The I/O APIC, the pair of 8259s and the 8254 in the kernel (api.rst, KVM_CREATE_IRQCHIP, KVM_CREATE_PIT2).

Their registers are told by the names that the board's models have for them. Of the 8254's counters KVM does not take
the phase, and of the first it does not tell it: each begins its cycle anew where its state is set, and a one-shot that
had expired expires once more.
"""

from __future__ import annotations

import time
from typing import Any

from skep.contracts.interrupts import Registers
from skep.engine.kvm import uapi
from skep.engine.kvm.uapi import ioctl

_ELCR_MASKS = (0xF8, 0xDE)
_SAME = {
    "irr": "irr", "isr": "isr", "imr": "imr", "lines": "last_irr", "elcr": "elcr", "vector_base": "irq_base",
}  # fmt: skip
_FLAGS = {
    "icw4_follows": "init4", "auto_eoi": "auto_eoi", "rotate_in_aeoi": "rotate_on_auto_eoi",
    "special_mask": "special_mask", "fully_nested": "special_fully_nested_mode", "poll": "poll",
    "read_isr": "read_reg_select",
}  # fmt: skip
_IOAPIC_BASE = 0xFEC0_0000
_NO_MODE = 0xFF
"""KVM's of a counter that nobody has programmed."""
_HIGH_BYTE = 4
"""RW_STATE_WORD1: of a read or a write by two bytes the second comes next."""


class KvmChips:
    """See :class:`skep.contracts.interrupts.EngineChips`."""

    def __init__(self, fd: int) -> None:
        """``fd`` is a VM that has the irqchip."""
        self._fd = fd
        ioctl(fd, uapi.CREATE_PIT2, uapi.PitConfig(uapi.PIT_SPEAKER_DUMMY))

    def set_line(self, gsi: int, level: bool) -> None:
        ioctl(self._fd, uapi.IRQ_LINE, uapi.IrqLevel(gsi, level))

    def bind_line(self, gsi: int, assert_fd: int, ended_fd: int) -> None:
        ioctl(self._fd, uapi.IRQFD, uapi.Irqfd(assert_fd, gsi, uapi.IRQFD_FLAG_RESAMPLE, ended_fd))

    # The I/O APIC.

    def ioapic(self) -> Registers:
        state = self._get(uapi.IRQCHIP_IOAPIC).chip.ioapic
        return {"id": state.id, "select": state.ioregsel, "entries": list(state.redirtbl)}

    def set_ioapic(self, registers: Registers, levels: int) -> None:
        irqchip = uapi.Irqchip(uapi.IRQCHIP_IOAPIC)
        state = irqchip.chip.ioapic
        state.base_address, state.id, state.ioregsel = _IOAPIC_BASE, registers["id"], registers["select"]
        state.irr = levels
        state.redirtbl[:] = registers["entries"]
        ioctl(self._fd, uapi.SET_IRQCHIP, irqchip)

    # The pair of 8259s.

    def pics(self) -> tuple[Registers, Registers]:
        master, slave = (self._get(chip).chip.pic for chip in (uapi.IRQCHIP_PIC_MASTER, uapi.IRQCHIP_PIC_SLAVE))
        return _pic(master), _pic(slave)

    def set_pics(self, master: Registers, slave: Registers) -> None:
        for chip, registers in ((uapi.IRQCHIP_PIC_SLAVE, slave), (uapi.IRQCHIP_PIC_MASTER, master)):
            irqchip = uapi.Irqchip(chip)
            state = irqchip.chip.pic
            for ours, theirs in (_SAME | _FLAGS).items():
                setattr(state, theirs, registers[ours])
            # An edge that was there would hide the one that KVM's 8254 makes, which waits for its acknowledgement then.
            state.last_irr &= registers["elcr"]
            state.priority_add = (registers["lowest"] + 1) & 7
            state.init_state = max(registers["expected_icw"] - 1, 0)
            state.elcr_mask = _ELCR_MASKS[chip]
            ioctl(self._fd, uapi.SET_IRQCHIP, irqchip)

    # The 8254.

    def pit(self) -> tuple[list[Registers], bool]:
        state = uapi.PitState2()
        ioctl(self._fd, uapi.GET_PIT2, state)
        state.channels[0].count_load_time = now = time.monotonic_ns()
        return [_counter(channel, now) for channel in state.channels], bool(state.flags & uapi.PIT_SPEAKER_DATA_ON)

    def set_pit(self, counters: list[Registers], *, speaker: bool, replaced: bool) -> None:
        state = uapi.PitState2()
        state.flags = (uapi.PIT_SPEAKER_DATA_ON if speaker else 0) | (uapi.PIT_HPET_LEGACY if replaced else 0)
        for channel, registers in zip(state.channels, counters, strict=True):
            _set_channel(channel, registers)
        ioctl(self._fd, uapi.SET_PIT2, state)

    def _get(self, chip: int) -> uapi.Irqchip:
        irqchip = uapi.Irqchip(chip)
        ioctl(self._fd, uapi.GET_IRQCHIP, irqchip)
        return irqchip


def _pic(state: uapi.PicState) -> Registers:
    registers: Registers = {ours: getattr(state, theirs) for ours, theirs in _SAME.items()}
    registers |= {ours: bool(getattr(state, theirs)) for ours, theirs in _FLAGS.items()}
    registers["lowest"] = (state.priority_add - 1) & 7
    registers["expected_icw"] = state.init_state + 1 if state.init_state else 0
    registers["single"] = False  # KVM knows pairs only
    return registers


def _counter(channel: uapi.PitChannelState, now: int) -> Registers:
    programmed = channel.mode != _NO_MODE
    registers: dict[str, Any] = {
        "mode": channel.mode if programmed else 3,
        "access": channel.rw_mode if programmed else 3,
        "bcd": bool(channel.bcd),
        "gate": bool(channel.gate),
        "written": channel.count if programmed else 0,
        "low_byte": channel.write_latch,
        "write_high": channel.write_state == _HIGH_BYTE,
        "read_high": channel.read_state == _HIGH_BYTE,
        "latched_count": channel.latched_count if channel.count_latched else None,
        "latched_status": channel.status if channel.status_latched else None,
        "elapsed_ns": now - channel.count_load_time,
    }
    return registers


def _set_channel(channel: uapi.PitChannelState, registers: Registers) -> None:
    access = registers["access"]
    channel.mode = registers["mode"] if registers["written"] else _NO_MODE
    channel.rw_mode, channel.bcd, channel.gate = access, registers["bcd"], registers["gate"]
    channel.count, channel.write_latch = registers["written"], registers["low_byte"]
    channel.write_state = _HIGH_BYTE if registers["write_high"] else access
    channel.read_state = _HIGH_BYTE if registers["read_high"] else access
    if registers["latched_count"] is not None:
        channel.latched_count, channel.count_latched = registers["latched_count"], access
    if registers["latched_status"] is not None:
        channel.status, channel.status_latched = registers["latched_status"], 1
