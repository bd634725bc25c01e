import time

from skep.engine.amd64 import tsc
from skep.engine.amd64.hostcpuid import cpuid, xcr0


def test_counter_rises() -> None:
    readings = [tsc.read_tsc() for _ in range(100)]
    assert readings == sorted(readings)
    assert readings[0] < readings[-1]


def test_frequency_agrees_with_the_clock() -> None:
    hz = tsc.tsc_hz()
    assert abs(tsc._measured() - hz) < hz // 500
    assert tsc.tsc_hz() == hz


def test_every_source_agrees() -> None:
    sources = [hz for hz in (tsc._from_perf(), tsc._from_cpuid()) if hz]
    for hz in sources:
        assert abs(hz - tsc.tsc_hz()) < hz // 1000


def test_paired_reading_follows_the_clock() -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    _, now = tsc._paired_reading()
    assert before <= now <= time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


def test_host_cpuid() -> None:
    largest, b, c, d = cpuid(0)
    assert largest >= 1
    vendor = b"".join(part.to_bytes(4, "little") for part in (b, d, c))
    with open("/proc/cpuinfo") as cpuinfo:
        assert f"vendor_id\t: {vendor.decode()}" in cpuinfo.read()
    assert xcr0() & 3 == 3


def test_a_guests_counter_is_the_hosts_or_as_fast_as_it_should_be() -> None:
    hz = tsc.tsc_hz()
    khz = hz // 1000
    for own in (None, khz, khz + khz // 5000, khz - khz // 5000):
        assert tsc.guest_counter(own) == (tsc.read_tsc, hz)
    for wanted in (khz // 2, khz * 3, 1_000_000):
        counter, told = tsc.guest_counter(wanted)
        assert told == wanted * 1000
        before = tsc.read_tsc()
        value = counter()
        after = tsc.read_tsc()
        ratio = wanted / khz
        assert before * ratio * (1 - 1e-6) <= value <= after * ratio * (1 + 1e-6)
