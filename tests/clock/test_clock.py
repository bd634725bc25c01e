"""Guest time: it follows the counter, stops at a freeze, and timers keep to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from skep.clock import GuestClock
from skep.locks import Lock, Order

GHZ = 1_000_000_000


@pytest.fixture
def clock() -> Iterator[GuestClock]:
    clock = GuestClock(time.monotonic_ns, GHZ)
    yield clock
    clock.close()


class Counter:
    """A host counter that the test moves."""

    def __init__(self) -> None:
        self.value = 12345

    def __call__(self) -> int:
        return self.value


def test_time_starts_at_zero_and_follows_the_counter() -> None:
    counter = Counter()
    clock = GuestClock(counter, 3_000_000_000)
    assert clock.now_ns() == 0 and clock.tsc() == 0
    counter.value += 4
    assert clock.tsc() == 4 and clock.now_ns() == 1
    assert [clock.ticks(ns) for ns in (0, 1, 2)] == [0, 3, 6]
    clock.close()


@pytest.mark.parametrize("hz", [1_193_182, GHZ, 2_893_437_000])
def test_ticks_is_the_first_tick_at_which_the_time_is_reached(hz: int) -> None:
    counter = Counter()
    clock = GuestClock(counter, hz)
    for ns in (1, 2, 999, 1_000_003, 86_400 * GHZ + 7):
        ticks = clock.ticks(ns)
        counter.value = 12345 + ticks
        assert clock.now_ns() >= ns
        counter.value -= 1
        assert clock.now_ns() < ns
    clock.close()


def test_freeze_stops_time_and_thaw_goes_on() -> None:
    counter = Counter()
    clock = GuestClock(counter, GHZ)
    offsets: list[int] = []
    clock.add_offset_listener(offsets.append)
    counter.value += 100
    clock.freeze()
    counter.value += 5000
    clock.freeze()
    assert clock.now_ns() == 100 and clock.tsc() == 100 and clock.frozen
    clock.thaw()
    assert clock.now_ns() == 100 and offsets == [clock.tsc_offset] == [-12345 - 5000]
    counter.value += 1
    assert clock.tsc() == 101
    clock.thaw()
    assert len(offsets) == 1
    clock.remove_offset_listener(offsets.append)
    clock.close()


def test_timers_fire_in_order_and_not_early(clock: GuestClock) -> None:
    fired: list[tuple[str, int]] = []
    done = threading.Event()
    start = clock.now_ns()

    def note(name: str) -> None:
        fired.append((name, clock.now_ns()))
        if len(fired) == 3:
            done.set()

    late, early, past = (clock.timer(lambda n=n: note(n)) for n in ("late", "early", "past"))  # type: ignore[misc]
    late.arm(start + 20_000_000)
    early.arm_tsc(start + 10_000_000)
    past.arm(start - 5)
    assert done.wait(5)
    assert [name for name, _ in fired] == ["past", "early", "late"]
    assert fired[1][1] >= start + 10_000_000 and fired[2][1] >= start + 20_000_000


def test_arming_again_replaces_and_cancel_cancels(clock: GuestClock) -> None:
    fired: list[str] = []
    done = threading.Event()
    a = clock.timer(lambda: fired.append("a"))
    b = clock.timer(lambda: fired.append("b"))
    end = clock.timer(done.set)
    now = clock.now_ns()
    a.arm(now + 10_000_000)
    a.arm(now + 10_000_000_000)
    b.arm(now + 10_000_000)
    b.cancel()
    end.arm(now + 30_000_000)
    assert done.wait(5)
    assert fired == []
    a.close()
    assert len(clock._queue) == 0


def test_a_guest_that_rearms_for_ever_takes_no_memory(clock: GuestClock) -> None:
    timer = clock.timer(lambda: None)
    for i in range(10_000):
        timer.arm(clock.now_ns() + GHZ * 3600 + i)
    assert len(clock._queue) == 1


def test_far_deadlines_are_harmless(clock: GuestClock) -> None:
    done = threading.Event()
    timer, near = clock.timer(lambda: None), clock.timer(done.set)
    timer.arm_tsc((1 << 64) - 1)
    near.arm(clock.now_ns() + 1_000_000)
    assert done.wait(5)


def test_timers_wait_while_frozen(clock: GuestClock) -> None:
    done = threading.Event()
    timer = clock.timer(done.set)
    timer.arm(clock.now_ns() + 20_000_000)
    clock.freeze()
    assert not done.wait(0.06)
    clock.thaw()
    assert not done.wait(0.005)
    assert done.wait(5)


def test_callbacks_hold_the_board_lock_and_cancel_is_final() -> None:
    board = Lock("board", Order.BOARD)
    clock = GuestClock(time.monotonic_ns, GHZ, board)
    held: list[bool] = []
    first = clock.timer(lambda: held.append(board.held()))
    second = clock.timer(lambda: held.append(False))
    with board:
        first.arm(0)
        second.arm(0)
        time.sleep(0.02)
        assert held == []
        second.cancel()
    clock.freeze()  # waits for a callback that runs
    clock.thaw()
    deadline = time.monotonic() + 5
    while not held and time.monotonic() < deadline:
        time.sleep(0.001)
    clock.close()
    assert held == [True]


def test_a_callback_may_arm_its_own_timer(clock: GuestClock) -> None:
    times: list[int] = []
    done = threading.Event()

    def tick() -> None:
        times.append(clock.now_ns())
        if len(times) == 5:
            done.set()
        else:
            timer.arm(times[0] + len(times) * 2_000_000)

    timer = clock.timer(tick)
    timer.arm(0)
    assert done.wait(5)
    assert all(t >= times[0] + i * 2_000_000 for i, t in enumerate(times))


def test_what_a_callback_raises_is_reported_and_the_clock_goes_on() -> None:
    errors: list[BaseException] = []
    done = threading.Event()
    clock = GuestClock(time.monotonic_ns, GHZ, on_error=errors.append)
    bad = clock.timer(lambda: exec("raise ValueError"))
    good = clock.timer(done.set)
    bad.arm(0)
    good.arm(1)
    assert done.wait(5)
    clock.close()
    assert [type(e) for e in errors] == [ValueError]


def test_close_joins_the_thread() -> None:
    clock = GuestClock(time.monotonic_ns, GHZ)
    timer = clock.timer(lambda: None)
    timer.arm(GHZ)
    clock.close()
    assert not clock._thread.is_alive()
    timer.close()
