"""The host's timer under the guests' clock."""

from __future__ import annotations

import resource
import threading
import time

import pytest

from skep.alarm import Alarm
from skep.errors import HostError


def test_it_goes_off_once_for_each_time_and_not_early() -> None:
    alarm = Alarm()
    for ns in (-5, 0, 1, 2_000_000, 1_000_000_000 // 30):
        start = time.monotonic_ns()
        alarm.set(ns)
        alarm.wait()
        assert time.monotonic_ns() - start >= ns
    alarm.close()


def test_it_is_set_anew_while_somebody_sleeps() -> None:
    alarm = Alarm()
    alarm.set(3600 * 10**9)
    woken = threading.Event()
    sleeper = threading.Thread(target=lambda: (alarm.wait(), woken.set()))
    sleeper.start()
    assert not woken.wait(0.03)
    alarm.set(0)
    assert woken.wait(5)
    sleeper.join()
    alarm.close()


def test_the_host_has_no_more_descriptors() -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        with pytest.raises(HostError, match="Too many open files"):
            Alarm()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
