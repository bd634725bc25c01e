"""When it is looked whether a guest sleeps for good: never while it works, soon after it stopped, ever more seldom."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from skep.vm.stillness import Stillness


class Thread:
    """One that sleeps until it is told to work for a moment."""

    def __init__(self) -> None:
        self.clock = 0
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._seconds: float | None = 0.0
        self._thread = threading.Thread(target=self._main)
        self._thread.start()
        self.work(0)

    def _main(self) -> None:
        self.clock = time.pthread_getcpuclockid(threading.get_ident())
        while self._go.acquire() and self._seconds is not None:
            end = time.thread_time() + self._seconds
            while time.thread_time() < end:
                pass
            self._done.release()

    def work(self, seconds: float) -> None:
        self._seconds = seconds
        self._go.release()
        self._done.acquire()
        before = -1
        while before != (before := time.clock_gettime_ns(self.clock)):  # it goes to sleep
            time.sleep(0.01)

    def end(self) -> None:
        self._seconds = None
        self._go.release()
        self._thread.join()


@pytest.fixture
def thread() -> Iterator[Thread]:
    one = Thread()
    yield one
    one.end()


def looks(stillness: Stillness, thread: Thread, intervals: int) -> list[int]:
    return [number for number in range(intervals) if stillness.is_time([thread.clock])]


def test_one_that_only_sleeps_is_looked_at_ever_more_seldom(thread: Thread) -> None:
    assert looks(Stillness(), thread, 300) == [1, 3, 7, 15, 31, 63, 127, 191, 255]


def test_one_at_work_is_not_looked_at(thread: Thread) -> None:
    stillness = Stillness()
    for _ in range(10):
        thread.work(0)
        assert not stillness.is_time([thread.clock])


def test_work_makes_the_next_look_come_soon(thread: Thread) -> None:
    stillness = Stillness()
    looks(stillness, thread, 100)
    thread.work(0.05)
    assert looks(stillness, thread, 4) == [1, 3]


def test_a_thread_that_ended_uses_no_time(thread: Thread) -> None:
    other = Thread()
    other.end()
    stillness = Stillness()
    assert [stillness.is_time([thread.clock, other.clock]) for _ in range(3)] == [False, True, False]
