"""What every device must do, as tests: mix :class:`DeviceConformance` into a test class of each device.

    class TestPit(DeviceConformance):
        def make_device(self) -> Pit: ...
        def regions(self, device: Pit) -> Sequence[tuple[IoRegion, int]]: return [(device, 4), ...]

The random traffic comes from a seed, so a failure happens again; the message carries the access that failed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar

from skep.contracts.device import Device, SavedState
from skep.contracts.io import IoRegion

D = TypeVar("D", bound=Device)


class DeviceConformance(Generic[D]):
    """The promises of :class:`skep.contracts.device.Device`, and that no register traffic raises.

    Time must stand still unless ``time_passes`` moves it: a test device lives on a counter of the test's own.
    """

    accesses: ClassVar[int] = 100_000
    """Random register accesses; 100,000 take well under a second at the 2 us that a register may cost."""
    scrambling: ClassVar[int] = 3_000
    """Random accesses that bring a device into some unlikely state before save, load or reset."""
    survives_reset: ClassVar[frozenset[str]] = frozenset()
    """Saved fields that a reset leaves alone, as battery-backed memory."""
    seed: ClassVar[int] = 8259

    def make_device(self) -> D:
        """A device as the board makes it, not reset yet. It is closed by the suite."""
        raise NotImplementedError

    def regions(self, device: D) -> Sequence[tuple[IoRegion, int]]:
        """Every window of the device and its length in bytes."""
        raise NotImplementedError

    def time_passes(self, device: D, rng: random.Random) -> None:
        """Called now and then between accesses: move the test's clock, feed input, let timers fire."""

    def let_go(self, device: D) -> None:
        """Put the device's inputs back to rest: they belong to others, so its own reset does not change them."""

    def test_reset_returns_to_power_on(self) -> None:
        with self._device() as device:
            before = self._saved(device)
            self._traffic(device, self.scrambling)
            self.let_go(device)
            device.reset()
            after = self._saved(device)
        assert self._without_survivors(after) == self._without_survivors(before)

    def test_save_then_load_is_identity(self) -> None:
        with self._device() as device, self._device() as fresh:
            self._traffic(device, self.scrambling)
            saved = self._saved(device)
            assert _plain(saved), f"{device.name}: the saved state must be plain values: {saved!r}"
            assert "version" in saved
            for target in (fresh, device):
                target.pause()
                target.load(saved)
                assert target.save() == saved
                target.resume()

    def test_pausing_twice_is_pausing_once(self) -> None:
        with self._device() as device:
            self._traffic(device, self.scrambling)
            device.pause()
            once = device.save()
            device.pause()
            assert device.save() == once
            device.resume()
            self._traffic(device, self.scrambling)

    def test_random_accesses_raise_nothing(self) -> None:
        with self._device() as device:
            self._traffic(device, self.accesses)

    # How the above is done.

    @contextmanager
    def _device(self) -> Iterator[D]:
        device = self.make_device()
        try:
            device.reset()
            yield device
        finally:
            device.close()

    def _saved(self, device: D) -> SavedState:
        device.pause()
        saved = device.save()
        device.resume()
        return saved

    def _without_survivors(self, saved: SavedState) -> SavedState:
        return {field: value for field, value in saved.items() if field not in self.survives_reset}

    def _traffic(self, device: D, accesses: int) -> None:
        """``accesses`` reads and writes of every size, at every offset, aligned or not, also across a window's end."""
        rng = random.Random(self.seed)
        regions = self.regions(device)
        interesting = (0, 1, 0x80, 0xFF, 0x100, 0xFFFF, 0x8000_0000, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)
        for count in range(accesses):
            region, length = regions[rng.randrange(len(regions))]
            size = (1, 1, 2, 4, 4, 8)[rng.randrange(6)]
            # Registers crowd at the start of large windows.
            offset = rng.randrange(length if rng.random() < 0.5 else min(length, 0x100))
            limit = 1 << 8 * size
            value = -1
            try:
                if rng.random() < 0.4:
                    got = region.read(offset, size)
                    assert 0 <= got < limit, f"read of {size} at {offset:#x} gave {got:#x}"
                else:
                    value = rng.getrandbits(8 * size) if rng.random() < 0.7 else rng.choice(interesting) % limit
                    region.write(offset, size, value)
                if count % 64 == 0:
                    self.time_passes(device, rng)
            except Exception as error:
                what = f"write of {value:#x}" if value >= 0 else "read"
                error.add_note(f"{device.name}: {what}, size {size}, offset {offset:#x}, access {count}")
                raise


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or type(value) in (int, bool, str, bytes, float)
