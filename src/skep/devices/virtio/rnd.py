"""The entropy device (virtio 1.2, 5.4): the host's random numbers for the guest."""

from __future__ import annotations

import os
from collections.abc import Callable

from skep.devices.virtio.device import VirtioDevice
from skep.devices.virtio.queue import Chain, DriverError
from skep.locks import Lock
from skep.memory import GuestMemory

QUEUE_SIZE = 8
_MOST = 4096
"""Bytes for one request, however many it asks for (5.4.6.2 allows fewer)."""


class VirtioRnd(VirtioDevice):
    device_id = 4
    class_code = 0x10_8000  # encryption controller, other

    def __init__(
        self, name: str, memory: GuestMemory, lock: Lock, say: Callable[[str], None] | None = None
    ) -> None:
        super().__init__(name, memory, lock, 0, [QUEUE_SIZE], say)

    def serve(self, chain: Chain) -> int:
        if chain.readable:
            raise DriverError("a device-readable buffer for random numbers")  # 5.4.6.1
        buffer = chain.writable[0]  # a chain without any buffer does not exist
        data = os.getrandom(min(len(buffer), _MOST))
        buffer[: len(data)] = data
        return len(data)
