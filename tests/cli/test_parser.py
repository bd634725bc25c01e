"""The command line as a way to write a tree; each case in a process of its own, as a user has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def skep(*arguments: str, cwd: Path | None = None, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "skep.cli", *arguments],
        cwd=cwd,
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path("src").absolute())},
    )


def dump(*arguments: str, cwd: Path | None = None) -> dict[str, str]:
    done = skep("run", "-o", "config.dump=1", *arguments, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_version() -> None:
    done = skep("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "skep 0.1.0\n", "")


def test_version_imports_next_to_nothing() -> None:
    code = (
        "import sys; from skep.cli import main; main(['--version']);"
        "print(sorted(name for name in sys.modules if 'skep' in name))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": "src"},
    )
    assert done.stdout.splitlines()[1] == "['skep', 'skep.cli', 'skep.errors']"


def test_every_option_writes_its_key(tmp_path: Path) -> None:
    assert dump(
        *("web", "--kernel", "k", "--initrd", "i", "--cmdline", "a=b c", "--cpus", "2,max=9", "--memory", "1G"),
        *("--disk", "d.img,ro,ser=x", "--disk", "/e.img", "--engine", "translate", "--console", "none"),
        *("--no-reboot", "-o", "cpu.model=host"),
        cwd=tmp_path,
    ) == {
        "name": "web",
        "boot.kernel": f"{tmp_path}/k",
        "boot.initrd": f"{tmp_path}/i",
        "boot.cmdline": "a=b c",
        "cpus": "2",
        "max_cpus": "9",
        "memory.size": "1G",
        "pci.0.2.0.device": "virtio-blk",
        "pci.0.2.0.path": f"{tmp_path}/d.img",
        "pci.0.2.0.ro": "true",
        "pci.0.2.0.ser": "x",
        "pci.0.3.0.device": "virtio-blk",
        "pci.0.3.0.path": "/e.img",
        "engine": "translate",
        "lpc.com1.path": "none",
        "no_reboot": "true",
        "cpu.model": "host",
    }


def test_consoles(tmp_path: Path) -> None:
    assert dump(
        *("--console", "pty", "--console", "com2=unix:sock%et=", "--console", "com4=tcp:127.0.0.1:0"),
        *("--console", "com3=none", "--console", "com3=file:a=b"),
        cwd=tmp_path,
    ) == {
        "lpc.com1.path": "pty",
        "lpc.com2.path": f"unix:{tmp_path}/sock%%et=",
        "lpc.com3.path": f"file:{tmp_path}/a=b",
        "lpc.com4.path": "tcp:127.0.0.1:0",
    }
    assert dump("--console", "file:a=b", cwd=tmp_path)["lpc.com1.path"] == f"file:{tmp_path}/a=b"


def test_defaults_are_only_what_a_guest_needs(tmp_path: Path) -> None:
    assert dump() == {"lpc.com1.path": "stdio"}
    assert dump("--kernel", "/k")["boot.cmdline"] == "console=ttyS0"


def test_the_later_option_wins(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    conf.write_text("cpus=3\nname=file\n")
    assert dump("--cpus", "2", "-k", str(conf))["cpus"] == "3"
    assert dump("-k", str(conf), "--cpus", "2")["cpus"] == "2"
    assert dump("-k", str(conf), "word")["name"] == "word"


def test_what_devices_there_are() -> None:
    done = skep("run", "--device", "help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line[0] != " "] == [
        "hostbridge", "virtio-blk", "virtio-console", "virtio-rnd"
    ]  # fmt: skip
    assert "  port.N.console  a terminal of the guest: hvc0, and so on in the order of ports" in lines
    assert all(len(line) < 130 for line in lines)


def test_devices_as_bhyve_has_them() -> None:
    leaves = dump("--device", "virtio-rnd", "--device", "virtio-console,org.x=/run/x%y,console=stdio", "--disk", "/y")
    assert {key: value for key, value in leaves.items() if key.startswith("pci")} == {
        "pci.0.2.0.device": "virtio-rnd",
        "pci.0.3.0.device": "virtio-console",
        "pci.0.3.0.port.0.name": "org.x",
        "pci.0.3.0.port.0.path": "unix:/run/x%%y",
        "pci.0.3.0.port.1.name": "console",
        "pci.0.3.0.port.1.path": "stdio",
        "pci.0.3.0.port.1.console": "true",
        "pci.0.4.0.device": "virtio-blk",
        "pci.0.4.0.path": "/y",
    }


def test_a_disk_takes_the_next_free_slot() -> None:
    leaves = dump("-o", "pci.0.2.0.device=virtio-blk", "-o", "pci.0.2.0.path=/x", "--disk", "/y")
    assert leaves["pci.0.3.0.path"] == "/y"
    done = skep("run", *(word for _ in range(30) for word in ("--disk", "/x")))
    assert (done.returncode, done.stderr) == (2, "skep: --disk: no free PCI slot for another virtio-blk\n")


def test_a_dump_fed_back_dumps_the_same(tmp_path: Path) -> None:
    done = skep("run", "x", "--kernel", "/a%b", "--disk", "/d%(name)", "-o", "config.dump=1")
    (tmp_path / "dump").write_text(done.stdout)
    again = skep("run", "-k", str(tmp_path / "dump"), "-o", "config.dump=1")
    assert again.stdout == done.stdout
    assert "boot.kernel=/a%%b\n" in again.stdout
    assert "pci.0.2.0.path=/d%%(name)\n" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "a command is missing; see `skep --help`"),
        ("fly", "argument COMMAND: invalid choice: 'fly'"),
        ("run --wings", "unrecognized arguments: --wings; see `skep --help`"),
        ("run --cpus", "argument -c/--cpus: expected one argument; see `skep run --help`"),
        ("run --cpus 0", "cpus: 0 is not in 1 to 255"),
        ("run --cpus 256", "cpus: 256 is not in 1 to 255"),
        ("run --cpus 2,max=1", "max_cpus: 1 is less than cpus, 2"),
        ("run --cpus 2,min=1", "--cpus: no such option: min"),
        ("run --memory 0", "memory.size: 0 bytes of memory are too few"),
        ("run --memory 1M", "memory.size: 1048576 bytes of memory are too few"),
        ("run --memory 512T", "memory.size: 536870912 MiB are more than this host's"),
        ("run --memory much", "memory.size: 'much' is not a size; write 512M or 4G"),
        ("run --engine steam", "engine: 'steam' is not one of auto, kvm, translate"),
        ("run -o cpsu=1", "cpsu: unknown configuration key; the nearest is cpus"),
        ("run -o cpus", "-o: 'cpus' is not KEY=VALUE"),
        ("run -o name=%(nmae)", "name: %(nmae) names no configuration key; did you mean %(name)?"),
        ("run -k /nonexistent", "/nonexistent: No such file or directory"),
        ("run -k /", "/: Is a directory"),
        ("run --disk ,ro", "--disk: path is missing"),
        ("run --device virtio-console,x", "--device: the port x goes nowhere; say x=/path/of/a/socket"),
        ("guest plan9", "argument system: invalid choice: 'plan9'"),
        ("guest debian --arch pdp11", "--arch: no Debian guest for 'pdp11'; one of: amd64"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: str, message: str) -> None:
    done = skep(*arguments.split())
    assert done.stderr.startswith(f"skep: {message}")
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (2, "")


def test_a_reader_that_has_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        [sys.executable, "-m", "skep.cli", "run", "-o", "config.dump=1"],
        stdout=writing,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": "src"},
    )
    os.close(writing)
    _, errors = process.communicate(timeout=60)
    assert errors == b""
