"""What the user is told where KVM is not there, not permitted, taken, too small, or cannot go on; and what a killed
process leaves: nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skep.engine.amd64.registers import Attr, Cr4
from skep.engine.contract import ExitReason
from skep.engine.debug import Debug, On, Place
from skep.engine.kvm import KvmEngine, uapi
from skep.errors import HostError, UserError
from skep.machine.amd64 import why_not_kvm
from skep.memory import PAGE, GuestMemory, Overlay, Rights
from tests.engine.tiny import MMIO, STACK, RecordingIo, Tiny

NOBODY = 65534


def refusal(engine: KvmEngine, cpus: int = 1) -> str:
    memory = GuestMemory(1 << 20)
    try:
        with pytest.raises(UserError) as error:
            engine.create_vm(memory, RecordingIo(), cpus, "baseline", 0)
    finally:
        memory.close()
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("device", ["/nonexistent/kvm", "/dev/null", "/"])
def test_no_kvm_is_one_line(device: str) -> None:
    text = refusal(KvmEngine(device))
    assert "--engine translate" in text
    assert "module" in text or device != "/nonexistent/kvm"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_a_device_that_is_not_ours_names_its_group(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(0o660)
    os.chown(device, 0, 0)
    tmp_path.chmod(0o755)
    before = os.geteuid()
    for parent in tmp_path.parents[:2]:
        parent.chmod(parent.stat().st_mode | 0o055)
    os.seteuid(NOBODY)
    try:
        text = refusal(KvmEngine(str(device)))
    finally:
        os.seteuid(before)
    assert "the group root" in text and "Permission denied" in text


def refusing(monkeypatch: pytest.MonkeyPatch, request: int, code: int) -> None:
    """One of KVM's ioctls fails; no such host is at hand."""
    really = uapi.ioctl

    def ioctl(fd: int, number: int, argument: Any = 0) -> int:
        if number == request:
            raise OSError(code, os.strerror(code))
        return really(fd, number, argument)

    monkeypatch.setattr(uapi, "ioctl", ioctl)


def test_another_hypervisor_has_the_processor(kvm: KvmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, uapi.CREATE_VM, errno.EBUSY)
    assert "another hypervisor" in refusal(kvm)


def test_no_more_slots(kvm: KvmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    really = uapi.ioctl

    def ioctl(fd: int, number: int, argument: Any = 0) -> int:
        few = number == uapi.CHECK_EXTENSION and argument == uapi.CAP_NR_MEMSLOTS
        return 0 if few else really(fd, number, argument)

    monkeypatch.setattr(uapi, "ioctl", ioctl)
    assert "maps 0 pieces of memory" in refusal(kvm)


def test_no_more_slots_for_what_comes_later(kvm: KvmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has changed then, and the guest runs on."""
    really = uapi.ioctl

    def ioctl(fd: int, number: int, argument: Any = 0) -> int:
        few = number == uapi.CHECK_EXTENSION and argument == uapi.CAP_NR_MEMSLOTS
        return 2 if few else really(fd, number, argument)

    monkeypatch.setattr(uapi, "ioctl", ioctl)
    with Tiny(kvm, "mov al, [0x180000]\n out 0x80, al\n hlt", cpu_model="baseline") as guest:
        guest.memory.store_u8(0x180000, 7)
        with pytest.raises(HostError, match="maps 2 pieces of memory, and the VM has 3"):
            guest.memory.change(add=[Overlay(0x180000, PAGE, Rights.READ, guest.memory.fd)])
        assert guest.memory.regions == guest.memory.ram
        guest.run()
        assert guest.io.outs(0x80) == [7]


def test_dirty_rings_that_are_not_to_be_had(kvm: KvmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rings of" in refusal(KvmEngine(dirty_ring=1 << 24))
    really = uapi.ioctl

    def ioctl(fd: int, number: int, argument: Any = 0) -> int:
        old = number == uapi.CHECK_EXTENSION and argument == uapi.CAP_DIRTY_LOG_RING
        return 0 if old else really(fd, number, argument)

    monkeypatch.setattr(uapi, "ioctl", ioctl)
    assert "no dirty rings" in refusal(KvmEngine(dirty_ring=1024))


def test_what_this_kvm_lacks_is_named(kvm: KvmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    really = uapi.ioctl

    def ioctl(fd: int, number: int, argument: Any = 0) -> int:
        old = number == uapi.CHECK_EXTENSION and argument == uapi.CAP_X86_MSR_FILTER
        return 0 if old else really(fd, number, argument)

    monkeypatch.setattr(uapi, "ioctl", ioctl)
    assert "lacks MSR filters" in refusal(kvm)


def test_a_kvm_without_guest_debug(kvm: KvmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    really = uapi.ioctl

    def ioctl(fd: int, number: int, argument: Any = 0) -> int:
        asked = number == uapi.CHECK_EXTENSION and argument in (uapi.CAP_SET_GUEST_DEBUG, uapi.CAP_SET_GUEST_DEBUG2)
        return 0 if asked else really(fd, number, argument)

    monkeypatch.setattr(uapi, "ioctl", ioctl)
    with Tiny(kvm, "hlt", cpu_model="baseline") as guest:
        for wanted in (Debug(step=True), Debug(instruction=True), Debug(places=(Place(0, On.EXECUTE),))):
            with pytest.raises(UserError, match="this KVM lacks guest debug of that kind"):
                guest.vcpu.set_debug(wanted)
        guest.vcpu.set_debug(Debug())
        assert guest.run().reason is ExitReason.HALTED


def test_too_many_processors_and_unknown_models(kvm: KvmEngine) -> None:
    assert "at most" in refusal(kvm, cpus=1 << 20)
    memory = GuestMemory(1 << 20)
    with pytest.raises(UserError, match="no such CPU model"):
        kvm.create_vm(memory, RecordingIo(), 1, "z80", 0)
    memory.close()


def test_an_instruction_that_kvm_cannot_emulate(boot: Callable[..., Tiny]) -> None:
    """It is decoded, and the state can be had."""
    guest = boot("mov rax, MMIO\n fnsave [rax]\n hlt")
    left = guest.vcpu.run()
    assert left.reason is ExitReason.FAILED
    message = left.detail["message"]
    assert "\n" not in message and "cannot emulate an instruction: fnsave [rax]" in message, message
    assert guest.reg("rax") == MMIO


def test_a_refused_entry_is_told(boot: Callable[..., Tiny]) -> None:
    guest = boot("hlt")
    vcpu: Any = guest.vcpu
    vcpu._run.exit_reason = uapi.EXIT_FAIL_ENTRY  # as KVM would leave it, for a state that it lets nobody set
    vcpu._run.fail_entry.hardware_entry_failure_reason = 0x80000021
    left = vcpu._handlers[uapi.EXIT_FAIL_ENTRY]()
    assert left.reason is ExitReason.FAILED
    assert "refuses to enter the guest, reason 0x80000021, invalid guest state" in left.detail["message"]


def test_an_entry_that_the_processor_refuses(boot: Callable[..., Tiny]) -> None:
    """A code segment both of 64 and of 32 bits (APM 2, 15.5.1), which KVM lets anybody set. The state can be had."""
    if why_not_kvm() is not None:
        pytest.skip("an emulation refuses nothing")
    guest = boot("hlt")
    code = guest.state["cs"]
    guest.set(cs={**code, "attributes": code["attributes"] | Attr.L | Attr.D})
    left = guest.vcpu.run()
    assert left.reason is ExitReason.FAILED
    assert "refuses to enter the guest, reason 0x" in left.detail["message"] and "\n" not in left.detail["message"]
    assert guest.state["cs"]["attributes"] & Attr.D and guest.reg("rsp") == STACK


def test_a_state_that_this_processor_cannot_have(boot: Callable[..., Tiny]) -> None:
    """Saved where there was more: VMX is in no CPU model of ours."""
    guest = boot("hlt")
    cr4 = guest.vcpu.get_state()["cr4"] | Cr4.VMXE | Cr4.SMEP
    with pytest.raises(UserError, match=r"KVM refuses the processor's state: what it uses \(.*SMEP.*\)") as told:
        guest.vcpu.set_state({"cr4": cr4})
    assert "\n" not in str(told.value)


RUNS_FOREVER = """
import sys
from skep.engine.kvm import KvmEngine
from tests.engine.tiny import Tiny
guest = Tiny(KvmEngine(), "again: jmp again", cpu_model="baseline")
print("running", flush=True)
guest.vcpu.run()
"""


def test_a_killed_process_leaves_nothing(kvm: KvmEngine) -> None:
    env = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", RUNS_FOREVER], stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
    assert not Path(f"/proc/{process.pid}").exists()
    memory = GuestMemory(1 << 20)  # and KVM is there for the next one
    kvm.create_vm(memory, RecordingIo(), 1, "baseline", 0).close()
    memory.close()
