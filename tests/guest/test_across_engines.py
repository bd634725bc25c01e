"""A Linux that counts is frozen under one engine, and goes on under another."""

from __future__ import annotations

import pytest

import skep
from skep.guest.debian import Guest
from tests.linux import Linux, Session

HARDWARE = (pytest.mark.hardware, pytest.mark.slow)
PAIRS = [
    ("translate", "translate"),
    pytest.param("kvm", "kvm", marks=HARDWARE),
    pytest.param("kvm", "translate", marks=HARDWARE),
    pytest.param("translate", "kvm", marks=HARDWARE),
]
COUNT = "(i=0; while :; do i=$((i + 1)); echo $i > /tmp/next; mv /tmp/next /tmp/count; sleep 0.05; done) > /dev/null &"


class Moved(Session):
    """The session goes on with another VM."""

    def __init__(self, before: Session, engine: str) -> None:
        before.vm.freeze()
        state = before.vm.save()
        before.vm.close()
        self.vm = skep.Vm(before.vm.tree, engine=engine)
        try:
            self.vm.load(state)
            self.vm.thaw()
        except BaseException:
            self.vm.close()
            raise


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_linux_that_counts_goes_on(guest: Guest, before: str, after: str) -> None:
    with Linux(guest, memory="256M", engine=before) as linux:
        linux(f"{COUNT} until [ -e /tmp/count ]; do sleep 0.1; done")
        count = int(linux("cat /tmp/count"))
        booted = linux("cat /proc/sys/kernel/random/boot_id")
        up = float(linux("cat /proc/uptime").split()[0])
        with Moved(linux, after) as moved:
            assert moved("cat /proc/sys/kernel/random/boot_id") == booted
            later = int(moved("cat /tmp/count"))
            assert later >= count
            moved(f"until [ $(cat /tmp/count) -gt {later} ]; do sleep 0.1; done")
            assert float(moved("cat /proc/uptime").split()[0]) > up
            moved.power_off()
