"""Virtio over PCI (virtio 1.2, 4.1): a modern, non-transitional function with MSI-X and, without it, INTx.

BAR 0 holds the four structures, a page each so that notifications can be caught by themselves; BAR 1 holds MSI-X.
"""

from __future__ import annotations

from typing import ClassVar

from skep.bus.pci import CAP_VENDOR, COMMAND, COMMAND_MASTER, PciFunction, PciIds
from skep.devices.virtio.device import VirtioDevice

VENDOR = 0x1AF4
DEVICE_BASE = 0x1040  # 4.1.2: plus the virtio device ID
REVISION = 1  # 4.1.2.1: not transitional

# 4.1.4, configuration structure types, and where ours lie in BAR 0.
COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = 1, 2, 3, 4, 5
COMMON, ISR, DEVICE, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
_PAGE = 0x1000
REGISTERS_SIZE = 0x4000
NOTIFY_MULTIPLIER = 4

NO_VECTOR = 0xFFFF
ISR_QUEUE, ISR_CONFIG = 1, 2

# Places in the PCI configuration access capability (4.1.4.9), from its start.
_WINDOW_BAR, _WINDOW_OFFSET, _WINDOW_LENGTH, _WINDOW_DATA = 4, 8, 12, 16


class VirtioPci(PciFunction):
    """A virtio device as a PCI function. Implements Device, and the device's Transport."""

    state_fields: ClassVar[tuple[str, ...]] = (
        *PciFunction.state_fields,
        *("device", "device_feature_select", "driver_feature_select", "queue_select"),
        *("config_vector", "queue_vectors", "isr"),
    )

    def __init__(self, device: VirtioDevice, pin: int = 0) -> None:
        """``device`` is this function's own from now on. ``pin``: 0 to 3 for INTA to INTD."""
        number = DEVICE_BASE + device.device_id
        super().__init__(device.name, PciIds(VENDOR, number, device.class_code, REVISION, VENDOR, number), pin)
        self.device = device
        self.registers = _Registers(self)
        queues = len(device.queues)
        bells = {NOTIFY + NOTIFY_MULTIPLIER * index: device.worker.bell for index in range(queues)}
        self.add_bar(0, REGISTERS_SIZE, self.registers, doorbells=bells)
        vectors = self.add_msix(queues + 1, 1)  # one for configuration changes
        self._signal = vectors.signal
        self._vectors = vectors
        self._add_structure(COMMON_CFG, COMMON, 0x3C)
        self._add_structure(ISR_CFG, ISR, 1)
        self._add_structure(DEVICE_CFG, DEVICE, _PAGE)
        self._add_structure(NOTIFY_CFG, NOTIFY, NOTIFY_MULTIPLIER * queues, NOTIFY_MULTIPLIER.to_bytes(4, "little"))
        anywhere = b"\0\0\xff\0\0\0" + b"\xff" * 12  # bar, offset, length and data are the driver's to write
        self._window = self._add_structure(PCI_CFG, 0, 0, bytes(4), anywhere)
        device.attach(self)
        self.device_reset()

    def _add_structure(self, kind: int, offset: int, length: int, more: bytes = b"", writable: bytes = b"") -> int:
        """A capability that says where in BAR 0 a structure lies (4.1.4)."""
        body = bytes((16 + len(more), kind, 0, 0, 0, 0)) + offset.to_bytes(4, "little") + length.to_bytes(4, "little")
        return self.add_capability(CAP_VENDOR, body + more, writable)

    # Transport.

    def queue_interrupt(self, index: int) -> None:
        """4.1.5.3."""
        if self._vectors.enabled:
            self._signal(self.queue_vectors[index])  # NO_VECTOR is beyond any table
        else:
            self.isr |= ISR_QUEUE
            self.set_intx(True)

    def config_interrupt(self) -> None:
        """4.1.5.4; the ISR bit is set either way (4.1.4.5.1)."""
        self.isr |= ISR_CONFIG
        if self._vectors.enabled:
            self._signal(self.config_vector)
        else:
            self.set_intx(True)

    def device_reset(self) -> None:
        self.device_feature_select = 0
        self.driver_feature_select = 0
        self.queue_select = 0
        self.config_vector = NO_VECTOR
        self.queue_vectors = [NO_VECTOR] * len(self.device.queues)
        self.isr = 0
        self.set_intx(False)

    def queue_reset(self, index: int) -> None:
        self.queue_vectors[index] = NO_VECTOR

    # Configuration space.

    def config_read(self, offset: int, size: int) -> int:
        data = self._window + _WINDOW_DATA
        if offset < data + 4 and offset + size > data:
            self._window_access(write=False)
        return super().config_read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        super().config_write(offset, size, value)
        data = self._window + _WINDOW_DATA
        if offset < data + 4 and offset + size > data:
            self._window_access(write=True)
        elif offset < COMMAND + 2 and offset + size > COMMAND:
            self.device.set_dma(bool(self.command & COMMAND_MASTER))

    def _window_access(self, *, write: bool) -> None:
        """4.1.4.9.1: pci_cfg_data is a window onto BAR 0 for guests that cannot reach it otherwise."""
        at = self._window
        data = at + _WINDOW_DATA
        offset = super().config_read(at + _WINDOW_OFFSET, 4)
        length = super().config_read(at + _WINDOW_LENGTH, 4)
        if self.config[at + _WINDOW_BAR] or length not in (1, 2, 4) or offset % length or offset >= REGISTERS_SIZE:
            return
        if write:
            self.registers.write(offset, length, super().config_read(data, length))
        else:
            self.config[data : data + length] = self.registers.read(offset, length).to_bytes(length, "little")

    # The life of a device. The caller holds no lock.

    def reset(self) -> None:
        self.device.reset()
        super().reset()
        self.device.set_dma(False)

    def pause(self) -> None:
        self.device.pause()

    def resume(self) -> None:
        self.device.resume()

    def loaded(self) -> None:
        super().loaded()
        self.device.set_dma(bool(self.command & COMMAND_MASTER))

    def complaints(self) -> list[str]:
        return list(self.device.complaints)

    def close(self) -> None:
        self.device.close()
        super().close()


class _Registers:
    """BAR 0."""

    def __init__(self, function: VirtioPci) -> None:
        self._function = function
        self._device = function.device

    def read(self, offset: int, size: int) -> int:
        page = offset & ~(_PAGE - 1)
        if page == ISR:
            return self._read_isr() if offset == ISR else 0
        if page == DEVICE:
            return self._device.config_read(offset - DEVICE, size)
        if page == COMMON:
            return self._read_common(offset, size)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        page = offset & ~(_PAGE - 1)
        if page == NOTIFY:
            self._device.notify((offset - NOTIFY) // NOTIFY_MULTIPLIER)
        elif page == COMMON:
            self._write_common(offset, size, value)
        elif page == DEVICE:
            self._device.config_write(offset - DEVICE, size, value)

    def _read_isr(self) -> int:
        """4.1.4.5: reading acknowledges."""
        function = self._function
        isr, function.isr = function.isr, 0
        function.set_intx(False)
        return isr

    def _read_common(self, offset: int, size: int) -> int:
        """4.1.4.3. A field answers accesses of its own width, and 64-bit fields also by their halves (4.1.3.1)."""
        function, device = self._function, self._device
        index = function.queue_select
        queue = device.queues[index] if index < len(device.queues) else None
        match offset, size:
            case 0x00, 4:
                return function.device_feature_select
            case 0x04, 4:
                return _word(device.features, function.device_feature_select)
            case 0x08, 4:
                return function.driver_feature_select
            case 0x0C, 4:
                return _word(device.driver_features, function.driver_feature_select)
            case 0x10, 2:
                return function.config_vector
            case 0x12, 2:
                return len(device.queues)
            case 0x14, 1:
                return device.status
            case 0x15, 1:
                return device.read_generation()
            case 0x16, 2:
                return function.queue_select
            case 0x18, 2:
                return queue.size if queue else 0
            case 0x1A, 2:
                return function.queue_vectors[index] if queue else NO_VECTOR
            case 0x1C, 2:
                return int(queue.enabled) if queue else 0
            case 0x1E, 2:
                return index if queue else 0
            case 0x3A, 2:
                return int(queue is not None and device.queue_resetting(index))
            case ((0x20 | 0x24 | 0x28 | 0x2C | 0x30 | 0x34), 4) if queue:
                area = (queue.desc, queue.driver, queue.device)[(offset - 0x20) >> 3]
                return _word(area, offset >> 2 & 1)
            case ((0x20 | 0x28 | 0x30), 8) if queue:
                return (queue.desc, queue.driver, queue.device)[(offset - 0x20) >> 3]
        return 0

    def _write_common(self, offset: int, size: int, value: int) -> None:
        function, device = self._function, self._device
        match offset, size:
            case 0x00, 4:
                function.device_feature_select = value
            case 0x08, 4:
                function.driver_feature_select = value
            case 0x0C, 4:
                device.write_features(function.driver_feature_select, value)
            case 0x10, 2:
                function.config_vector = self._vector(value)
            case 0x14, 1:
                device.write_status(value)
            case 0x16, 2:
                function.queue_select = value
            case _ if function.queue_select < len(device.queues):
                self._write_queue(offset, size, value)

    def _write_queue(self, offset: int, size: int, value: int) -> None:
        """The registers of the selected queue. Once it is enabled, all but its vector are final, until its
        reset."""
        index = self._function.queue_select
        queue = self._device.queues[index]
        if (offset, size) == (0x1A, 2):
            self._function.queue_vectors[index] = self._vector(value)
        elif (offset, size, value) == (0x3A, 2, 1):
            self._device.reset_queue(index)
        if queue.enabled:
            return
        match offset, size:
            case 0x18, 2:
                if 0 < value <= queue.max_size and not value & (value - 1):
                    queue.size = value
            case 0x1C, 2:
                if value == 1:
                    self._device.enable_queue(index)
            case 0x20, (4 | 8):
                queue.desc = _part(queue.desc, 0, size, value)
            case 0x24, 4:
                queue.desc = _part(queue.desc, 32, size, value)
            case 0x28, (4 | 8):
                queue.driver = _part(queue.driver, 0, size, value)
            case 0x2C, 4:
                queue.driver = _part(queue.driver, 32, size, value)
            case 0x30, (4 | 8):
                queue.device = _part(queue.device, 0, size, value)
            case 0x34, 4:
                queue.device = _part(queue.device, 32, size, value)

    def _vector(self, value: int) -> int:
        """4.1.5.1.2.1: a vector beyond the table is not mapped, and reads back so."""
        return value if value < self._function._vectors.vectors else NO_VECTOR


def _word(value: int, index: int) -> int:
    """The 32 bits of ``value`` from bit 32 * index on; all of ours are below 64."""
    return value >> 32 * index & 0xFFFF_FFFF if index < 2 else 0


def _part(old: int, shift: int, size: int, value: int) -> int:
    """``old`` with ``size`` bytes at bit ``shift`` replaced."""
    mask = ((1 << 8 * size) - 1) << shift
    return old & ~mask | value << shift & mask
