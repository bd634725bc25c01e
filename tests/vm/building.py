"""Work for a guest that is to be disturbed: programs are built, run, hashed and packed on a disk, clocks watched.

The same script does the same on the host, whose results are the right ones.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from skep.guest.debian import Guest
from tests.programs import add_programs

_LIBC = "/lib/x86_64-linux-gnu/libc.so.6"
_LOADER = "/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
"""The C library needs it when a program is linked."""

_ROUND = r"""
# round NUMBER: sources are made, compiled side by side, linked; the program is run, everything hashed and packed.
round() {
    mkdir $1 && cd $1 || exit 1
    for unit in 1 2; do
        awk -v unit=$unit -v round=$1 'BEGIN {
            for (i = 0; i < 12; i++) {
                printf "int f%d_%d(int x) { int a[16], i; for (i = 0; i < 16; i++) a[i] = x * %d;", unit, i, i * round
                printf " for (i = 1; i < 16; i++) a[i] ^= a[i - 1] * %d; return a[15] >> %d; }\n", unit + 2 * i, i % 9
            }
            printf "int u%d(int x) { return x", unit
            for (i = 0; i < 12; i++) printf " ^ f%d_%d(x + %d)", unit, i, i
            print "; }"
        }' > $unit.c
        (tcc -c $unit.c -o $unit.o; sha256sum $unit.c $unit.o > $unit.sum) &
    done
    wait
    tcc -nostdlib -o program "$WORK/main.c" 1.o 2.o $LIBC
    ./program
    cat 1.sum 2.sum
    for file in program 1.c; do gzip -c < $file | tee $file.gz | md5sum; gzip -dc < $file.gz | cmp - $file; done
    cd .. && rm -r $1
}
"""

_MAIN = """
int printf(const char *, ...), fflush(void *), u1(int), u2(int);
void exit(int);

void _start(void)
{
    int i, sum = 0;
    __asm__("and $-16, %rsp");
    for (i = 0; i < 200; i++)
        sum += u1(i) ^ u2(sum);
    printf("%d\\n", sum);
    fflush(0);
    exit(0);
}
"""

# Clocks by their numbers in Linux: REALTIME, MONOTONIC, MONOTONIC_RAW, BOOTTIME; and the TSC.
_CLOCKS = """
struct timespec { long s, ns; };
int printf(const char *, ...), fflush(void *), access(const char *, int), usleep(unsigned);
int clock_gettime(int, struct timespec *);
void exit(int);

void _start(void)
{
    static const int ids[] = {0, 1, 4, 7};
    static long last[5];
    long looks = 0, now;
    unsigned low, high;
    struct timespec time;
    int i, backwards = 0;
    __asm__("and $-16, %rsp");
    while (access("/tmp/stop", 0)) {
        for (i = 0; i < 5; i++) {
            if (i < 4) {
                clock_gettime(ids[i], &time);
                now = time.s * 1000000000 + time.ns;
            } else {
                __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
                now = (unsigned long)high << 32 | low;
            }
            if (now < last[i] && backwards++ < 10)
                printf("clock %d: %ld after %ld\\n", i, now, last[i]);
            last[i] = now;
        }
        if (++looks % 50 == 0)
            usleep(10000);
    }
    printf("clocks went back %d times\\n", backwards);
    fflush(0);
    exit(0);
}
"""

# Two builders, a writer, a clock watcher and a sleeper, until /tmp/stop is there. They rest now and then, so
# that the processor is idle at times.
_START = """
mount -t ext4 /dev/vda /mnt && cd /mnt || exit 1
export WORK=/work LIBC=LIBRARY
tcc -nostdlib -o /tmp/clocks /work/clocks.c $LIBC || exit 2
. /work/round.sh
build() {
    number=$1
    while [ ! -e /tmp/stop ]; do
        echo round $number $(round $number 2>&1 | md5sum) >> /tmp/rounds
        sync
        usleep 100000
        number=$((number + 2))
    done
}
writer() {
    while [ ! -e /tmp/stop ]; do
        dd if=/bin/busybox of=written bs=64k count=4 conv=fsync,notrunc
        cmp -n 262144 written /bin/busybox || echo WRONG
        usleep 50000
    done
}
sleeper() {
    while [ ! -e /tmp/stop ]; do usleep 10000; done
}
all() {
    build 1 &
    build 2 &
    sleeper &
    writer > /tmp/written.said 2> /dev/null &
    /tmp/clocks > /tmp/clocks.said
    wait
    cd / && umount /mnt && echo done > /tmp/done
}
all > /dev/null 2>&1 &
""".replace("LIBRARY", _LIBC)

START = "sh /work/start.sh"
"""Begins the work, and returns."""
FINISH = "touch /tmp/stop; while [ ! -e /tmp/done ]; do usleep 50000; done; cat /tmp/*.said /tmp/rounds"


def make_disk(path: Path) -> Path:
    """The file system on which the guest builds."""
    with path.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", path], check=True, timeout=60)
    return path


def builder(guest: Guest, home: Path) -> Guest:
    """The guest with a compiler and the scripts."""
    if not Path(_LIBC).exists():
        pytest.skip("the C library lies elsewhere here")
    files = {"round.sh": _ROUND, "main.c": _MAIN, "clocks.c": _CLOCKS, "start.sh": _START}
    packed: dict[str, bytes | Path] = {f"work/{name}": text.encode() for name, text in files.items()}
    packed[_LOADER.lstrip("/")] = Path(_LOADER)
    return Guest(guest.kernel, add_programs(guest.initrd, home / "builder.img", ["tcc"], packed))


def natively(guest: Guest, home: Path, numbers: list[int]) -> list[str]:
    """The line that each round gives: on this host, with the guest's busybox."""
    with guest.initrd.open("rb") as archive:
        unpack = ["cpio", "-i", "--quiet", "--make-directories", "bin/busybox"]
        subprocess.run(unpack, stdin=archive, cwd=home, check=True, timeout=60)
    (home / "main.c").write_text(_MAIN)
    applets = home / "applets"
    applets.mkdir()
    subprocess.run([home / "bin/busybox", "--install", "-s", applets], check=True, timeout=60)
    loop = "for number; do echo round $number $(round $number 2>&1 | md5sum); done"
    done = subprocess.run(
        [applets / "sh", "-c", f"{_ROUND}\n{loop}", "sh", *map(str, numbers)],
        env={"PATH": f"{applets}:{os.environ['PATH']}", "WORK": str(home), "LIBC": _LIBC},
        cwd=home,
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.stdout.splitlines()
