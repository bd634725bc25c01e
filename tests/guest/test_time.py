"""The guest's time: it needs no calibration, stands still while the VM is frozen, never goes back, and keeps pace."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from skep.engine.amd64.tsc import tsc_hz
from skep.guest.debian import Guest
from tests.linux import ENGINES, Linux, complaints

# Reads the clock until it is told to stop; says how often, and every time that it was earlier than before.
_WATCH = (
    "count=0; last=0; while [ ! -e /tmp/stop ]; do read -r now rest < /proc/uptime; now=${now%.*}${now#*.};"
    " count=$((count + 1)); [ $now -ge $last ] || echo $last $now; last=$now; done; echo seen $count"
)


@pytest.fixture(scope="module")
def linux(guest: Guest, request: pytest.FixtureRequest) -> Iterator[Linux]:
    with Linux(guest, engine=request.param) as linux:
        yield linux
        linux.power_off()


UNDER_EACH = pytest.mark.parametrize("linux", ENGINES, indirect=True)
BY_THE_TRANSLATOR = pytest.mark.parametrize("linux", ["translate"], indirect=True)
"""Under KVM a guest's TSC is the host's own; and in the laboratory the command line tells its frequency."""


class Reading(NamedTuple):
    """One moment, by both clocks, in ns."""

    host: int
    guest: int
    width: int
    """How long the question took: the guest looked within it."""


def read_clocks(linux: Linux, times: int = 1) -> Reading:
    """The reading that took least of several."""
    readings = []
    for _ in range(times):
        before = time.monotonic_ns()
        found = re.search(r"now at (\d+) nsecs", linux("grep -m 1 'now at' /proc/timer_list"))
        after = time.monotonic_ns()
        assert found
        readings.append(Reading((before + after) // 2, int(found[1]), after - before))
    return min(readings, key=lambda reading: reading.width)


@BY_THE_TRANSLATOR
def test_frequencies_are_told_and_not_measured(linux: Linux) -> None:
    log = linux("dmesg")
    detected = dict(reversed(pair) for pair in re.findall(r"tsc: Detected (\d+\.\d+) MHz (processor|TSC)", log))
    assert float(detected["processor"]) == round(tsc_hz() / 1e6)
    assert float(detected.get("TSC", detected["processor"])) == pytest.approx(tsc_hz() / 1e6, rel=2e-6)
    assert "Calibrating delay loop (skipped)" in log
    assert not re.search(r"TSC calibration|calibrat\w+ (failed|against)|Refined TSC|APIC timer.*calibrat", log)


@UNDER_EACH
def test_the_time_of_day_is_the_clock_chips(linux: Linux) -> None:
    """Before anything reads the chip, by kvm-clock; and in the chip's own words."""
    log = linux("dmesg")
    assert "kvm-clock: Using msrs 4b564d01 and 4b564d00" in log
    chip, guest = (int(word) for word in linux("cat /sys/class/rtc/rtc0/since_epoch; date +%s").split())
    assert abs(chip - guest) <= 1 and abs(guest - time.time()) < 60


@UNDER_EACH
@pytest.mark.parametrize("clocksource", ["tsc", "kvm-clock", "hpet", "acpi_pm"])
def test_frozen_time_is_no_time_and_none_goes_back(linux: Linux, clocksource: str) -> None:
    current = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    linux(f"rm -f /tmp/stop; echo {clocksource} > {current}; grep -x {clocksource} {current}")
    linux(f"({_WATCH}) > /tmp/watched 2>&1 &")
    first = read_clocks(linux)
    least = most = 0
    for _ in range(10):
        begin = time.monotonic_ns()
        linux.vm.freeze()
        frozen = time.monotonic_ns()
        time.sleep(0.2)
        least += time.monotonic_ns() - frozen
        linux.vm.thaw()
        most += time.monotonic_ns() - begin
        time.sleep(0.02)
    last = read_clocks(linux)
    watched = linux("touch /tmp/stop; until grep seen /tmp/watched; do sleep 0.1; done; cat /tmp/watched")
    assert re.fullmatch(r"(seen \d+\n){2}", watched), watched
    unseen = (last.host - first.host) - (last.guest - first.guest)
    unsure = first.width + last.width
    assert least - unsure <= unseen <= most + unsure, "what is missing is the time between freeze and thaw"
    linux(f"echo tsc > {current}")
    assert complaints(linux("dmesg")) == []


@pytest.mark.slow
@BY_THE_TRANSLATOR
def test_the_guests_clock_keeps_the_hosts_pace(linux: Linux) -> None:
    """Within 50 ppm over five minutes, besides what we cannot tell for sure."""
    first = read_clocks(linux, 50)
    time.sleep(300)
    last = read_clocks(linux, 50)
    host, guest = last.host - first.host, last.guest - first.guest
    unsure = (first.width + last.width) / 2
    assert unsure / host < 50e-6, "the machine was too busy to tell"
    assert abs(guest - host) - unsure < 50e-6 * host
