"""Everything that processors share, used by threads on all of them at once (stress.c)."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest

from skep.guest.debian import Guest
from tests.linux import BOOT, Linux
from tests.programs import add_programs

SOURCE = Path(__file__).with_name("stress.c")


@pytest.fixture(scope="module")
def stressed(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """The guest with /bin/stress."""
    home = tmp_path_factory.mktemp("stress")
    program = home / "stress"
    compiler = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o", program, SOURCE]
    subprocess.run(compiler, check=True, timeout=120)
    return Guest(guest.kernel, add_programs(guest.initrd, home / "initrd.img", files={"bin/stress": program}))


@pytest.mark.parametrize(
    ("cpus", "threads", "seconds"), [(4, 8, 6), pytest.param(48, 48, 600, marks=pytest.mark.slow)]
)
def test_threads_that_share_everything(stressed: Guest, cpus: int, threads: int, seconds: int) -> None:
    with Linux(stressed, memory="1G" if cpus > 8 else "512M", cpus=cpus) as linux:
        assert linux("nproc") == f"{cpus}\n"
        linux.begin(f"stress {threads} {seconds}")
        said = linux.end(timeout=seconds + BOOT)
        print(said)
        assert said.startswith("DONE")
        linux.power_off()


@pytest.mark.parametrize(
    ("cpus", "threads", "times"), [(4, 8, 300), pytest.param(48, 48, 10000, marks=pytest.mark.slow)]
)
def test_frozen_at_any_moment(stressed: Guest, cpus: int, threads: int, times: int) -> None:
    rng = random.Random(times)
    with Linux(stressed, memory="1G" if cpus > 8 else "512M", cpus=cpus) as linux:
        vm = linux.vm
        linux(f"stress {threads} 1000000 > /tmp/said 2>&1 &")
        time.sleep(1)
        took = []
        for _ in range(times):
            before = time.monotonic()
            vm.freeze()
            took.append(1000 * (time.monotonic() - before))
            vm.thaw()
            time.sleep(rng.expovariate(500))
        linux("kill -TERM $(pidof stress); while pidof stress > /dev/null; do usleep 100000; done")
        said = linux("cat /tmp/said")
        assert said.startswith("DONE"), said
        linux.power_off()
    took.sort()
    median, p99 = took[len(took) // 2], took[len(took) * 99 // 100]
    print(f"{said}frozen {times} times: median {median:.2f} ms, p99 {p99:.2f} ms, longest {took[-1]:.2f} ms")
