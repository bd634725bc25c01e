"""The VM's own rules: what may follow what, that a freeze freezes, and that nothing is left behind."""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skep.config import Tree
from skep.engine.contract import Exit, ExitReason
from skep.errors import InternalError, UserError
from skep.vm import PROGRAM, TRANSITIONS, End, State, Step, Vm
from tests.boot.bzimage import CODE, LOAD, bzimage
from tests.vm.scripted import HALTED, HALTED_FOR_GOOD, KICKED, ScriptedEngine, ScriptedVcpu

Program = Callable[[ScriptedVcpu], Exit]
Make = Callable[..., Vm]


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage())
    return path


@pytest.fixture
def make(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """``make(program, ...)``: a VM under a scripted engine; closed at the end, and everything it took is given back."""
    fds, threads = os.listdir("/proc/self/fd"), threading.active_count()
    made: list[Vm] = []

    def mapped() -> set[str]:
        """The guest memories that this process maps: other tests' objects may be garbage that nobody has collected."""
        return {line for line in Path("/proc/self/maps").read_text().splitlines() if "skep-guest" in line}

    others = mapped()

    def make(program: Program, **options: Any) -> Vm:
        engine = ScriptedEngine(program)
        monkeypatch.setattr("skep.vm.lifecycle.choose_engine", lambda *_: (engine, "the test wants it"))
        made.append(Vm(**{"kernel": kernel, "memory": "64M", **options}))
        return made[-1]

    yield make
    for vm in made:
        vm.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == len(fds)
    assert mapped() <= others, "guest memory is still mapped"
    assert gc.isenabled() and sys.getswitchinterval() == pytest.approx(0.005)


def spin(cpu: ScriptedVcpu) -> Exit:
    return cpu.spin()


def once(*actions: Callable[[ScriptedVcpu], Exit | None]) -> Program:
    """One action a run; after the last the guest spins."""
    left = list(actions)

    def program(cpu: ScriptedVcpu) -> Exit:
        return (left.pop(0)(cpu) if left else cpu.spin()) or KICKED

    return program


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.001)


def vcpu(vm: Vm) -> ScriptedVcpu:
    engine = vm.engine
    assert isinstance(engine, ScriptedEngine)
    until(lambda: engine.vms and engine.vms[-1].vcpus and engine.vms[-1].vcpus[0].runs)
    return engine.vms[-1].vcpus[0]


def power_off(cpu: ScriptedVcpu) -> None:
    cpu.io.port_write(0x604, 2, 5 << 10 | 1 << 13)


def reset(cpu: ScriptedVcpu) -> None:
    cpu.io.port_write(0xCF9, 1, 6)


def test_a_guest_that_powers_off(make: Make) -> None:
    vm = make(once(power_off))
    vm.start()
    outcome = vm.wait(10)
    assert outcome is not None and outcome.end is End.POWERED_OFF and outcome.exit_status == 0
    assert vm.state is State.ENDED
    vm.stop()
    assert vm.wait() is outcome


def test_the_first_processor_starts_where_the_kernel_is(make: Make) -> None:
    vm = make(spin)
    vm.start()
    state = vcpu(vm).state
    assert state["rip"] == LOAD + 0x200 and state["rax"] == 0
    memory = vcpu(vm).vm.memory
    assert memory.read(LOAD, len(CODE)) == CODE
    assert memory.read(0xE0000, 8) == b"RSD PTR "


def test_stop_is_a_request_and_can_come_early(make: Make) -> None:
    vm = make(spin)
    vm.stop()
    outcome = vm.wait(10)
    assert outcome is not None and outcome.end is End.STOPPED
    with pytest.raises(UserError, match="cannot start a VM that is ended"):
        vm.start()


def test_wait_has_a_timeout(make: Make) -> None:
    vm = make(spin)
    vm.start()
    assert vm.wait(0.01) is None


@pytest.mark.parametrize("state", [s for s in State if s is not State.CLOSED])
@pytest.mark.parametrize("step", Step)
def test_the_table_is_the_rule(make: Make, state: State, step: Step) -> None:
    vm = make(spin)
    for before in {
        State.CREATED: (),
        State.RUNNING: (Step.START,),
        State.FROZEN: (Step.START, Step.FREEZE),
        State.ENDED: (Step.END,),
    }[state]:
        vm._ask(before)
    assert vm.state is state
    after = TRANSITIONS.get((state, step))
    if after is None:
        with pytest.raises(UserError, match=f"cannot {step.value} a VM that is {state.value}"):
            vm._ask(step)
        assert vm.state is state
    else:
        vm._ask(step)
        assert vm.state is after


def test_a_closed_vm_refuses_everything_but_closing(make: Make) -> None:
    vm = make(spin)
    vm.close()
    vm.close()
    vm.stop()
    vm.power_button()
    for act in (vm.start, vm.freeze, vm.thaw):
        with pytest.raises(UserError, match="closed"):
            act()


def test_closing_a_running_vm_stops_it(make: Make) -> None:
    with make(spin) as vm:
        vm.start()
        cpu = vcpu(vm)
    outcome = vm.wait(0)
    assert outcome is not None and outcome.end is End.STOPPED
    assert cpu.closed and cpu.vm.closed


def test_freeze_stops_processors_and_time(make: Make) -> None:
    def program(cpu: ScriptedVcpu) -> Exit:
        time.sleep(0.0005)
        return KICKED

    vm = make(program)
    vm.start()
    cpu = vcpu(vm)
    vm.freeze()
    runs, now = cpu.runs, vm.board.clock.now_ns()
    time.sleep(0.03)
    assert (cpu.runs, vm.board.clock.now_ns()) == (runs, now)
    assert cpu.vm.offsets == []
    vm.thaw()
    assert cpu.vm.offsets == [vm.board.clock.tsc_offset]
    until(lambda: cpu.runs > runs)
    assert now < vm.board.clock.now_ns() < now + 30_000_000 + 5_000_000_000


def test_freezing_a_spinning_guest_a_hundred_times(make: Make) -> None:
    vm = make(spin)
    vm.start()
    cpu = vcpu(vm)
    for _ in range(100):
        vm.freeze()
        runs = cpu.runs
        assert vm._processors[0]._parked.is_set()
        vm.thaw()
        until(lambda runs=runs: cpu.runs > runs)


def test_a_freeze_of_a_halted_guest_keeps_it_halted(make: Make) -> None:
    vm = make(lambda cpu: HALTED)
    vm.start()
    cpu = vcpu(vm)
    vm.freeze()
    vm.thaw()
    time.sleep(0.02)
    assert cpu.runs == 1


def program_timer(cpu: ScriptedVcpu) -> None:
    """IRQ 0 through the 8259 pair: 1 ms, one-shot."""
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE)):
        cpu.io.port_write(port, 1, value)
    for port, value in ((0x43, 0x30), (0x40, 0xA9), (0x40, 0x04)):
        cpu.io.port_write(port, 1, value)


def test_a_halted_guest_is_woken_by_its_timer(make: Make) -> None:
    vectors: list[int | None] = []

    def interrupted(cpu: ScriptedVcpu) -> Exit | None:
        vectors.append(cpu.interrupts.acknowledge())
        power_off(cpu)
        return None

    vm = make(once(program_timer, lambda cpu: HALTED, interrupted))
    vm.start()
    outcome = vm.wait(10)
    assert outcome is not None and outcome.end is End.POWERED_OFF
    assert vectors == [0x20]


def test_a_guest_that_halts_with_interrupts_off_is_said_once_and_not_woken(make: Make) -> None:
    said: list[str] = []

    def nudge(cpu: ScriptedVcpu) -> Exit:
        program_timer(cpu)
        return HALTED_FOR_GOOD

    def nmi(cpu: ScriptedVcpu) -> Exit:
        assert cpu.interrupts.take_nmi()
        return HALTED_FOR_GOOD

    vm = make(once(nudge, nmi), diagnostics=said.append)
    vm.start()
    until(lambda: said)
    cpu = vcpu(vm)
    until(cpu.interrupts.pending)
    vm.freeze()
    vm.thaw()
    time.sleep(0.02)
    assert cpu.runs == 1
    with vm.board.lock:
        vm.board.lapics[0].accept(4, 0, False)  # type: ignore[attr-defined]  # an NMI wakes it
    until(lambda: cpu.runs == 2 and vm._processors[0].hopeless)
    assert len(said) == 1 and "interrupts off" in said[0]


def test_a_halt_after_asking_for_the_end_is_not_remarkable(make: Make) -> None:
    said: list[str] = []

    def off(cpu: ScriptedVcpu) -> Exit:
        power_off(cpu)
        return HALTED_FOR_GOOD

    vm = make(once(off), diagnostics=said.append)
    vm.start()
    assert vm.wait(10) and said == []


def test_the_guests_reset_starts_again_with_the_files_as_they_were(make: Make, kernel: Path) -> None:
    def scribble(cpu: ScriptedVcpu) -> None:
        cpu.vm.memory.write(LOAD, b"overwritten")
        cpu.vm.memory.write(32 << 20, b"left over")
        cpu.io.port_write(0x70, 1, 0x40)
        kernel.write_bytes(b"another file")
        reset(cpu)
        reset(cpu)

    vm = make(once(scribble))
    vm.start()
    engine = vm.engine
    assert isinstance(engine, ScriptedEngine)
    until(lambda: len(engine.vms) == 2 and engine.vms[1].vcpus and engine.vms[1].vcpus[0].runs)
    assert engine.vms[0].closed and not engine.vms[1].closed
    memory = engine.vms[1].memory
    assert memory.read(LOAD, len(CODE)) == CODE and memory.read(32 << 20, 9) == bytes(9)
    time.sleep(0.02)
    assert len(engine.vms) == 2, "one reset, however often it was asked for"


def test_a_reset_lets_go_of_the_engines_vm(make: Make) -> None:
    """Though it is full of cycles, and the collector rests."""
    vm = make(spin)
    vm.start()
    engine = vm.engine
    assert isinstance(engine, ScriptedEngine) and vcpu(vm).vm is engine.vms[0]
    old = weakref.ref(engine.vms.pop())
    vm.reset()
    vcpu(vm)
    assert old() is None


@pytest.mark.parametrize("error", [UserError("no more of this"), ZeroDivisionError("oops")])
def test_a_reset_that_fails_ends_the_vm(make: Make, error: Exception) -> None:
    vm = make(spin)
    vm.start()
    cpu = vcpu(vm)

    def refuse(*arguments: object) -> None:
        raise error

    cpu.vm.engine.create_vm = refuse  # type: ignore[method-assign, assignment]
    vm.reset()
    outcome = vm.wait(10)
    assert outcome is not None and outcome.end is End.FAILED and str(error) in str(outcome)
    assert cpu.closed


@pytest.mark.parametrize("port", ["cf9", "i8042", "fast"])
def test_every_way_to_reset(make: Make, port: str) -> None:
    where, value = {"cf9": (0xCF9, 6), "i8042": (0x64, 0xFE), "fast": (0x92, 1)}[port]
    vm = make(once(lambda cpu: cpu.io.port_write(where, 1, value)), no_reboot=True)
    vm.start()
    outcome = vm.wait(10)
    assert outcome is not None and outcome.end is End.REBOOTED and outcome.exit_status == 0


def test_a_vm_with_a_disk_freezes_resets_and_lets_go_of_it(make: Make, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    vm = make(spin, disks=[disk])
    with pytest.raises(UserError, match="disk"):
        make(spin, disks=[disk])
    vm.start()
    vcpu(vm)
    for _ in range(3):
        vm.freeze()
        vm.reset()
        vm.thaw()
        vm.reset()
    assert vm.wait(0.05) is None
    vm.close()
    make(spin, disks=[disk]).start()


def test_reset_by_the_program_and_while_frozen(make: Make) -> None:
    vm = make(spin, no_reboot=True)
    vm.start()
    engine = vm.engine
    assert isinstance(engine, ScriptedEngine)
    vcpu(vm)
    vm.freeze()
    vm.reset()
    until(lambda: len(engine.vms) == 2)
    time.sleep(0.02)
    assert vm.state is State.FROZEN and not any(cpu.runs for cpu in engine.vms[1].vcpus)
    vm.thaw()
    vcpu(vm)


def test_the_guest_asked_for_a_reset_before_it_was_frozen(make: Make) -> None:
    """The reset happens, and the guest is frozen before it runs again."""

    def last_word(cpu: ScriptedVcpu) -> None:
        cpu.spin()
        reset(cpu)

    vm = make(once(last_word))
    vm.start()
    first = vcpu(vm)
    until(lambda: not vm._processors[0]._sleeping)
    vm.freeze()
    engine = vm.engine
    assert isinstance(engine, ScriptedEngine)
    assert vm.state is State.FROZEN and first.closed and len(engine.vms) == 2
    time.sleep(0.02)
    assert not any(cpu.runs for cpu in engine.vms[1].vcpus)
    vm.thaw()
    vcpu(vm)


@pytest.mark.parametrize(
    ("action", "end"),
    [(power_off, End.POWERED_OFF), (lambda cpu: Exit(ExitReason.SHUTDOWN), End.TRIPLE_FAULT)],
    ids=["powered off", "triple fault"],
)
def test_a_guest_that_ended_is_not_frozen(make: Make, action: Callable[[ScriptedVcpu], Exit | None], end: End) -> None:
    def last_word(cpu: ScriptedVcpu) -> Exit | None:
        cpu.spin()
        return action(cpu)

    vm = make(once(last_word))
    vm.start()
    vcpu(vm)
    with pytest.raises(UserError, match="cannot freeze a VM that is ended"):
        vm.freeze()
    outcome = vm.wait(10)
    assert outcome is not None and outcome.end is end


def test_buttons_act_at_the_thaw(make: Make) -> None:
    vm = make(once(lambda cpu: cpu.io.port_write(0x602, 2, 1 << 8)))
    vm.start()
    cpu = vcpu(vm)
    board: Any = vm.board
    vm.freeze()
    frozen = [device.save() for device in board.devices]
    for _ in range(2):
        vm.power_button()
        vm.nmi()
    assert [device.save() for device in board.devices] == frozen
    vm.thaw()
    assert cpu.io.port_read(0x600, 2) & 1 << 8
    vm.freeze()
    vm.power_button()
    vm.reset()
    vm.thaw()
    assert not vcpu(vm).io.port_read(0x600, 2) & 1 << 8


def test_freezes_and_all_else_from_several_threads(make: Make) -> None:
    """Whoever asks, and whatever the guest asks meanwhile: it holds together, and goes on."""

    def program(cpu: ScriptedVcpu) -> Exit:
        if cpu.runs % 50 == 3:
            reset(cpu)
        return HALTED if cpu.runs % 3 else cpu.spin()

    vm = make(program, cpus=2)
    vm.start()
    acts = [vm.freeze, vm.thaw, vm.freeze, vm.thaw, vm.power_button, vm.nmi, vm.reset]
    errors: list[BaseException] = []

    def disturb(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                rng.choice(acts)()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=disturb, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [] and vm.wait(0) is None
    vm.freeze()
    cpus = [cpu for one in vm.engine.vms for cpu in one.vcpus]  # type: ignore[attr-defined]
    runs = [cpu.runs for cpu in cpus]
    time.sleep(0.02)
    assert [cpu.runs for cpu in cpus] == runs
    vm.thaw()
    vm.reset()
    vcpu(vm)


def test_a_vm_that_ends_while_it_is_frozen_and_thawed(make: Make) -> None:
    """Freeze and thaw are done, or say that there is nothing to freeze any more; nobody is left waiting."""
    for number in range(30):
        vm = make(once(lambda cpu: cpu.spin(), power_off) if number % 2 else spin)
        vm.start()

        def freeze(vm: Vm = vm) -> None:
            try:
                while True:
                    vm.freeze()
                    vm.thaw()
            except UserError as error:
                assert "ended" in str(error) or "closed" in str(error)

        threads = [threading.Thread(target=freeze) for _ in range(2)]
        for thread in threads:
            thread.start()
        if not number % 2:
            vm.stop()
        assert vm.wait(10) is not None
        if number % 3:
            vm.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def test_messages_that_start_and_stop_processors_come_at_any_time(make: Make) -> None:
    """A guest may have its devices send them, so that they come while it is reset, or one upon the other."""
    vm = make(spin, cpus=2)
    vm.start()
    board: Any = vm.board
    done = threading.Event()
    errors: list[BaseException] = []

    def send() -> None:
        try:
            while not done.is_set():
                with board.lock:
                    board.lapics[1].accept(5, 0, False)
                    board.lapics[1].accept(6, 8, False)
        except BaseException as error:
            errors.append(error)

    senders = [threading.Thread(target=send) for _ in range(2)]
    for sender in senders:
        sender.start()
    for _ in range(10):
        vm.freeze()
        vm.thaw()
        vm.reset()
        vcpu(vm)
    done.set()
    for sender in senders:
        sender.join(10)
    assert errors == [] and vm.wait(0) is None


def test_a_triple_fault_is_no_reboot(make: Make) -> None:
    def shutdown(cpu: ScriptedVcpu) -> Exit:
        cpu.exits.note("fault", 8)
        return Exit(ExitReason.SHUTDOWN)

    vm = make(once(shutdown))
    vm.start()
    outcome = vm.wait(10)
    assert outcome is not None and outcome.end is End.TRIPLE_FAULT and outcome.exit_status == 3
    assert outcome.registers["rip"] == LOAD + 0x200
    assert outcome.explanation is not None
    assert [str(one) for one in outcome.explanation.processors[0].exits] == ["fault 0x8, 1 times"]


def test_what_is_ours_is_said_to_be_ours(make: Make) -> None:
    vm = make(once(lambda cpu: Exit(ExitReason.FAILED, {"message": "no more room"})))
    vm.start()
    outcome = vm.wait(10)
    assert outcome is not None and outcome.exit_status == 4 and "no more room" in str(outcome)


def test_an_exception_on_a_processor_ends_the_vm(make: Make) -> None:
    def broken(cpu: ScriptedVcpu) -> Exit:
        raise ZeroDivisionError("oops")

    vm = make(broken)
    vm.start()
    outcome = vm.wait(10)
    assert outcome is not None and outcome.end is End.FAILED
    assert isinstance(outcome.error, InternalError) and "ZeroDivisionError: oops" in str(outcome)


def test_an_exception_in_a_timer_ends_the_vm(make: Make) -> None:
    vm = make(spin)
    vm.start()

    def broken() -> None:
        raise ZeroDivisionError("late")

    with vm.board.lock:
        vm.board.clock.timer(broken).arm(0)
    outcome = vm.wait(10)
    assert outcome is not None and outcome.end is End.FAILED and "late" in str(outcome)


def test_the_power_button_reaches_the_guest(make: Make) -> None:
    vm = make(once(lambda cpu: cpu.io.port_write(0x602, 2, 1 << 8)))
    vm.power_button()
    vm.start()
    cpu = vcpu(vm)
    vm.power_button()
    assert cpu.io.port_read(0x600, 2) & 1 << 8


def test_the_console_is_the_serial_port(make: Make) -> None:
    def talk(cpu: ScriptedVcpu) -> None:
        for byte in b"hello\r\n":
            cpu.io.port_write(0x3F8, 1, byte)
        cpu.io.port_write(0x3FC, 1, 2)  # RTS: ready to receive
        until(lambda: cpu.io.port_read(0x3FD, 1) & 1)
        cpu.io.port_write(0x3F8, 1, cpu.io.port_read(0x3F8, 1))
        power_off(cpu)

    vm = make(once(talk))
    vm.start()
    vm.console.expect("hello", timeout=10)
    vm.console.send("x")
    vm.console.expect("x", timeout=10)
    assert vm.wait(10)


def test_the_console_belongs_to_the_program_only_where_it_says_so(make: Make) -> None:
    vm = make(spin, console="none")
    with pytest.raises(UserError, match=r"lpc\.com1\.path"):
        vm.console  # noqa: B018


def test_every_serial_port_can_be_the_programs(make: Make) -> None:
    vm = make(once(lambda cpu: cpu.io.port_write(0x2E8, 1, ord("4"))), config={"lpc.com4.path": PROGRAM})
    vm.start()
    vm.serial("com4").expect("4", timeout=10)
    assert vm.console is vm.serial("com1") and vm.console.read() == ""
    with pytest.raises(UserError, match=r"lpc\.com2\.path"):
        vm.serial("com2")


def test_there_is_one_stdio(kernel: Path) -> None:
    with pytest.raises(UserError, match=r"lpc\.com2\.path: there is one stdio"):
        Vm(kernel=kernel, console="stdio", config={"lpc.com2.path": "stdio"})


def test_application_processors_start_by_init_and_sipi(make: Make) -> None:
    started = threading.Event()

    def program(cpu: ScriptedVcpu) -> Exit:
        if cpu.index == 0 and cpu.runs == 1:
            cpu.io.mmio_write(0xFEE00310, 4, 1 << 24)
            cpu.io.mmio_write(0xFEE00300, 4, 0x4500)  # INIT
            for _ in range(2):
                cpu.io.mmio_write(0xFEE00300, 4, 0x4608)  # STARTUP at 0x8000
        elif cpu.index == 1:
            assert cpu.io.mmio_read(0xFEE00020, 4) >> 24 == 1, "its own APIC, not the first one's"
            started.set()
        return cpu.spin()

    vm = make(program, cpus=3)
    vm.start()
    assert started.wait(10)
    cpus = vcpu(vm).vm.vcpus
    assert [cpu.index for cpu in cpus] == [0, 1], "no structures before the first start"
    cs = cpus[1].state["cs"]
    assert (cs["selector"], cs["base"], cpus[1].state["rip"]) == (0x800, 0x8000, 0)
    vm.freeze()
    runs = [cpu.runs for cpu in cpus]
    time.sleep(0.01)
    assert [cpu.runs for cpu in cpus] == runs
    vm.thaw()
    until(lambda: all(cpu.runs > before for cpu, before in zip(cpus, runs, strict=True)))


def test_init_takes_a_processor_back(make: Make) -> None:
    vm = make(spin, cpus=2)
    vm.start()
    vcpu(vm)
    board: Any = vm.board
    with board.lock:
        board.lapics[1].accept(6, 8, False)
    until(lambda: len(vcpu(vm).vm.vcpus) == 2 and vcpu(vm).vm.vcpus[1].runs)
    second = vcpu(vm).vm.vcpus[1]
    with board.lock:
        board.lapics[1].accept(5, 0, False)
    until(lambda: vm._processors[1]._held and vm._processors[1]._sleeping)
    runs = second.runs
    second.kick()
    time.sleep(0.01)
    assert second.runs == runs
    with board.lock:
        board.lapics[1].accept(6, 9, False)
    until(lambda: second.runs > runs)
    assert second.state["cs"]["base"] == 0x9000


def test_the_interpreter_is_set_for_guests_and_set_back(make: Make) -> None:
    first, second = make(spin), make(spin)
    first.start()
    second.start()
    assert not gc.isenabled() and sys.getswitchinterval() < 0.005
    first.stop()
    assert first.wait(10) and not gc.isenabled()
    second.stop()
    assert second.wait(10) and gc.isenabled()


def test_keyword_arguments_only_write_a_tree(make: Make, kernel: Path, tmp_path: Path) -> None:
    disk = tmp_path / "d%sk"
    disk.write_bytes(bytes(1 << 20))
    vm = make(spin, cmdline="a=%(b) 100%", cpus=2, name="n", disks=[f"{disk},ro"], config={"rtc.use_localtime": "no"})
    dump = vm.tree.dump()
    assert dump.splitlines() == [
        "boot.cmdline=a=%%(b) 100%%",
        f"boot.kernel={kernel}",
        "cpus=2",
        "lpc.com1.path=program",
        "memory.size=64M",
        "name=n",
        "pci.0.2.0.device=virtio-blk",
        f"pci.0.2.0.path={disk}".replace("%", "%%"),
        "pci.0.2.0.ro=true",
        "rtc.use_localtime=no",
    ]
    tree = Tree()
    for line in dump.splitlines():
        tree.assign(line)
    assert make(spin, tree=tree, kernel=None, memory=None).tree.dump() == dump


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kernel": None}, "nothing to boot"),
        ({"kernel": "/nowhere/vmlinuz"}, "no such file"),
        ({"memory": "0"}, "memory"),
        ({"cpus": 0}, "cpus"),
        ({"console": "carrier-pigeon"}, "no such serial backend"),
        ({"disks": ["/nowhere/disk"]}, "/nowhere/disk"),
        ({"devices": ["virtio-console,a=none", "virtio-console,a=none"]}, "pci.0.3.0.port.0.path: another port"),
        (
            {"config": {f"pci.0.{slot}.0.{key}": "1" for slot in (3, 4) for key in ("device", "bootindex")}},
            "pci.0.4.0.bootindex: 1 is the place of pci.0.3.0.bootindex too",
        ),
        ({"devices": ["virtio-console"]}, "pci.0.2.0.port: has no port"),
        ({"devices": ["virtio-rnd,rate=5"]}, "pci.0.2.0.rate: unknown configuration key; known here: none"),
        ({"config": {"pci.0.3.0.device": "virtio-fog"}}, "no such device"),
        ({"config": {"pci.0.3.0.path": "x"}}, "says nothing of its device"),
        ({"config": {"pci.0.32.0.device": "hostbridge"}}, "no such PCI place"),
        ({"config": {"pci.1.2.0.device": "hostbridge"}}, "no such PCI place"),
        ({"config": {"pci.0.2": "hostbridge"}}, "no such PCI place"),
        ({"config": {"lpc.com9.path": "x"}}, "com4"),
        ({"config": {"memory.sise": "64M"}}, r"memory\.size"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(make: Make, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        make(spin, **options)
    assert "\n" not in str(error.value)


def test_files_that_do_not_fit_are_said_at_the_start(make: Make) -> None:
    vm = make(spin, memory="18M")
    with pytest.raises(UserError, match="needs 20 MiB"):
        vm.start()
    assert vm.state is State.CREATED
