"""How ``skep run`` under KVM ends where it should not: what is said, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.machine.amd64 import why_not_kvm
from tests.boot.bzimage import write_guest
from tests.cli.test_ctl import skep
from tests.cli.test_run import ENVIRONMENT, SKEP, WAIT
from tests.engine.engines import need
from tests.memory.test_map import POOL, pool

__all__ = ["pool"]

SPINS = "spins: jmp spins"
NOT_EMULATED = """
        mov rbx, 0xfed00000             ; the HPET: an access that KVM has to emulate
        mov eax, 0x1234
        fnsave [rbx]
spins:  jmp spins
"""


WHEREVER = pytest.mark.parametrize(
    "where", ["here", pytest.param("hardware", marks=(pytest.mark.hardware, pytest.mark.slow))]
)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    need("kvm")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "skep"


def command(tmp_path: Path, text: str, *options: str) -> list[str]:
    kernel = tmp_path / "vmlinuz"
    write_guest(kernel, f"mov dx, 0x3f8\nmov al, 'B'\nout dx, al\n{text}")
    return [*SKEP, "run", "web", "--kernel", str(kernel), "--memory", "24M", "--engine", "kvm", *options]


def processes_of(session: int) -> list[int]:
    """Those of one session, but for dead ones that nobody waited for yet."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of, *_ = stat.read_text().rpartition(")")[2].split()
        except (OSError, ValueError):  # it has just ended
            continue
        if int(of) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def free_pages() -> int:
    return int((POOL / "free_hugepages").read_text())


@pytest.fixture
def environment(directory: Path) -> Iterator[dict[str, str]]:
    yield {**os.environ, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"]}


@WHEREVER
@pytest.mark.parametrize("irqchip", ["split", "off"])
def test_a_killed_one_leaves_nothing(
    pool: int, tmp_path: Path, directory: Path, environment: dict[str, str], irqchip: str, where: str
) -> None:
    """No process, no huge page; two files, which whoever looks removes."""
    before = free_pages()
    words = command(tmp_path, SPINS, "-o", "memory.hugepages=2M", "-o", f"kvm.irqchip={irqchip}", "--cpus", "2")
    for _ in range(2):  # the second of that name is not hindered by what the first left
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        ) as vm:
            assert vm.stdout is not None and vm.stdout.read(1) == b"B"
            assert free_pages() < before
            vm.send_signal(signal.SIGKILL)
            assert vm.wait(WAIT) == -signal.SIGKILL
        assert processes_of(vm.pid) == []
        assert free_pages() == before
        assert {path.name for path in directory.iterdir()} == {"web.lock", "web.sock"}
    assert skep("list").count("\n") == 1
    assert list(directory.iterdir()) == []


def test_an_instruction_that_kvm_cannot_emulate(tmp_path: Path, environment: dict[str, str]) -> None:
    """A line that has it, disassembled with its bytes, the report with the registers, status 4, no traceback."""
    done = subprocess.run(
        command(tmp_path, NOT_EMULATED), capture_output=True, text=True, timeout=WAIT, env=environment, check=False
    )
    assert done.returncode == 4, done
    assert "KVM cannot emulate an instruction: fnsave [rbx] (dd 33)" in done.stderr
    assert "Traceback" not in done.stderr
    for register in ("rax=0000000000001234", "rbx=00000000fed00000", "cr3="):
        assert register in done.stderr.lower().replace(" ", ""), done.stderr
    assert "code: fnsave" in done.stderr


@WHEREVER
def test_auto_explains_itself(tmp_path: Path, environment: dict[str, str], where: str) -> None:
    """In one line, whichever it takes."""
    words = command(tmp_path, "mov dx, 0x604\nmov ax, 0x3400\nout dx, ax\n" + SPINS, "-v")
    words[words.index("kvm")] = "auto"
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT, env=environment, check=True)
    first = done.stderr.splitlines()[0]
    why = why_not_kvm()
    if why is None:
        assert first == "skep: engine kvm: the CPU has hardware virtualization, and /dev/kvm opens"
    else:
        assert first.startswith("skep: engine translate, ") and first.endswith(f": {why}")
