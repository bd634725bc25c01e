"""A Linux guest that does what a test tells it, command by command."""

from __future__ import annotations

import base64
import faulthandler
import re
import tempfile
from types import TracebackType
from typing import Any, Self

import pytest

import skep
from skep.chardev.console import ConsoleTimeout
from skep.engine.amd64.tsc import tsc_hz
from skep.guest.debian import Guest

BOOT = 300.0
"""Seconds until a guest's script has begun, or a command is done. An idle machine takes 5; some are slow and shared."""

ENGINES = ("translate", pytest.param("kvm", marks=(pytest.mark.hardware, pytest.mark.slow)))
"""Parameters of a guest, or of a fixture that has one."""

_COMPLAINT = re.compile(
    r"\bBUG\b|\bWARNING:|Oops|Kernel panic|lockup|detected stalls|unstable|Call Trace|blocked for more than|starved"
    r"|nobody cared|I/O error|EXT4-fs error|insmod:|segfault"
)

_INTERRUPTS = re.compile(r"lapic|ioapic|pic|pit|hpet|com|lines")
"""Names of devices that wake a guest."""
_PERHAPS = _COMPLAINT.pattern.replace(r"\b", "")
"""For the guest's grep: a serial console is slow, and in a nested machine very slow."""

# Commands come by the console, one a line; no prompt and no echo stands between their outputs.
LISTEN = """
dmesg -n 1
stty -echo
echo READY
while read -r line; do
    (eval "$line") 2>&1
    echo "STATUS $?"
done
"""


def complaints(log: str) -> list[str]:
    """The lines in which a kernel says that something is wrong."""
    return [line for line in log.splitlines() if _COMPLAINT.search(line)]


def engine_words(engine: str | None) -> tuple[str, ...]:
    """Kernel parameters. A nested machine's processor does not promise that its TSC is invariant, time there is too
    rough to measure it by, and what such a processor lacks against attacks is nobody's concern."""
    if engine != "kvm":
        return ()
    return "tsc=reliable", f"tsc_early_khz={tsc_hz() // 1000}", "mitigations=off"


def command_line(script: str, *words: str) -> str:
    """The kernel's command line with which the guest runs a shell script and powers off."""
    script = base64.b64encode(script.strip().encode()).decode()
    return " ".join(("console=ttyS0", "panic=-1", *(words or ("quiet",)), f"skep.exec={script}"))


class Session:
    """A guest whose console takes commands; ``options`` are :class:`skep.Vm`'s. See :meth:`wait_ready`."""

    power_off_command = "poweroff -f"

    def __init__(self, **options: Any) -> None:
        self.vm = skep.Vm(**options)
        try:
            self.vm.start()
            self.wait_ready()
        except BaseException:
            self.vm.close()
            raise

    def wait_ready(self) -> None:
        """It takes commands, for the first time or after a reboot."""
        self._expect(r"READY\r\n", BOOT)

    def __call__(self, command: str, status: int = 0) -> str:
        """Run a line of shell and return what it printed; it is to end with ``status``."""
        self.begin(command)
        return self.end(status)

    def begin(self, command: str) -> None:
        self.vm.console.send(f"{command}\n")

    def end(self, status: int = 0, timeout: float = BOOT) -> str:
        """Wait for the end of what ``begin`` began."""
        found = self._expect(r"STATUS (\d+)\r\n", timeout)
        output = found.string[: found.start()].replace("\r\n", "\n")
        assert int(found[1]) == status, output
        return output

    def _expect(self, pattern: str, timeout: float) -> re.Match[str]:
        """What the console says; who waits in vain is told why, by the threads, the guest and its devices."""
        try:
            return self.vm.console.expect(pattern, timeout)
        except ConsoleTimeout as error:
            with tempfile.TemporaryFile("w+") as stacks:
                faulthandler.dump_traceback(stacks)
                stacks.seek(0)
                error.add_note(stacks.read())
            error.add_note(str(self.vm.explain()))
            self.vm.freeze()
            state = self.vm.save()
            told = [f"{name}: {saved}" for name, saved in state.devices.items() if _INTERRUPTS.match(name)]
            error.add_note("\n".join((f"guest time: {state.ticks} ticks", *told)))
            raise

    def power_off(self) -> None:
        """It has nothing to complain of, and powers off."""
        complained = complaints(self(f"dmesg | grep -E '{_PERHAPS}'; true"))
        assert complained == [], complained
        self.begin(self.power_off_command)
        outcome = self.vm.wait(BOOT)
        assert outcome is not None and outcome.end.value == "powered off", outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.vm.close()


class Linux(Session):
    """The kernel and the initramfs of a guest, and its shell."""

    def __init__(self, guest: Guest, memory: str = "512M", words: tuple[str, ...] = (), **options: Any) -> None:
        """``words`` are kernel parameters; "quiet" where there are none."""
        cmdline = command_line(LISTEN, *(words or ("quiet",)), *engine_words(options.get("engine")))
        super().__init__(kernel=guest.kernel, initrd=guest.initrd, memory=memory, cmdline=cmdline, **options)
