"""A VM that hangs: what only looks is answered all the same, and says where it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skep.control import actions
from skep.control.client import Client
from skep.control.controller import Controller
from skep.control.directory import Claim
from skep.control.performer import Performer
from skep.control.server import Server
from skep.control.text import lines
from skep.control.threads import look
from skep.engine.contract import Exit
from skep.errors import UserError
from skep.locks import Lock, Order
from skep.vm import Vm
from tests.boot.bzimage import bzimage
from tests.vm.scripted import HALTED, KICKED, ScriptedEngine, ScriptedVcpu


@pytest.fixture
def let_go() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


Start = Callable[[Callable[[ScriptedVcpu], Exit]], Vm]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, let_go: threading.Event) -> Iterator[Start]:
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    made: list[Vm] = []

    def start(program: Callable[[ScriptedVcpu], Exit], **options: Any) -> Vm:
        engine = ScriptedEngine(program)
        monkeypatch.setattr("skep.vm.lifecycle.choose_engine", lambda *_: (engine, "the test wants it"))
        made.append(Vm(kernel=tmp_path / "vmlinuz", memory="64M", name="hung", **options))
        made[-1].start()
        return made[-1]

    yield start
    let_go.set()
    for vm in made:
        vm.close()


def text_of_threads() -> str:
    return "\n".join(lines("threads", actions.encode(look())))


def test_a_stack_and_its_locks() -> None:
    ready, end = threading.Event(), threading.Event()
    first, second = Lock("test-first", Order.BLOCK), Lock("test-second", Order.CHARDEV)

    def holds() -> None:
        with first, second:
            ready.set()
            end.wait(10)

    def waits() -> None:
        with second:
            pass

    threads = [threading.Thread(target=holds, name="twin"), threading.Thread(target=waits, name="twin")]
    threads[0].start()
    ready.wait(10)
    threads[1].start()
    deadline = time.monotonic() + 10
    while not second._waiting and time.monotonic() < deadline:
        time.sleep(0.001)
    twins = [thread for thread in look().threads if thread.name == "twin"]
    end.set()
    for thread in threads:
        thread.join(10)
    assert [(thread.holds, thread.waits_for) for thread in twins] == [
        (["test-first", "test-second"], []),
        ([], ["test-second"]),
    ]
    assert [twin.tid for twin in twins] == [thread.native_id for thread in threads]
    assert any(frame.function == "holds" and frame.text == "end.wait(10)" for frame in twins[0].stack)
    assert twins[1].stack[-1].text == "self._inner.acquire()" and twins[1].state == "S"


def test_while_a_processor_hangs(start: Start, let_go: threading.Event) -> None:
    def hang(cpu: ScriptedVcpu) -> Exit:
        let_go.wait()
        return KICKED

    vm = start(hang)
    with Claim("hung") as claim, Server(Controller(vm), claim), Client("hung") as first, Client("hung") as second:
        with pytest.raises(UserError, match="hung: processor 0 does not answer; its thread's stack may say why"):
            first.request("registers")
        freezer = threading.Thread(target=first.request, args=("freeze",))
        freezer.start()
        time.sleep(0.1)
        assert second.request("status")["state"] == "running"
        text = "\n".join(lines("threads", second.request("threads")))
        assert "hang: let_go.wait()" in text
        assert "wait_until_parked: " in text
        let_go.set()
        freezer.join(10)
        assert second.request("status")["state"] == "frozen"


def test_while_somebody_keeps_the_boards_lock(start: Start, let_go: threading.Event) -> None:
    def hang(cpu: ScriptedVcpu) -> Exit:
        with vms[0].board.lock:
            let_go.wait()
        return KICKED

    vms: list[Vm] = []
    going = threading.Event()
    vms.append(start(lambda cpu: hang(cpu) if vms else cpu.spin()))
    vms[0].registers(0)  # wakes it, and now it hangs
    controller = Controller(vms[0])
    answers: list[object] = []
    controller.submit(actions.Power(), lambda reply: (answers.append(reply), going.set()))
    time.sleep(0.1)
    assert not answers, "the power button waits for the board"
    status = controller.perform(actions.Status())
    assert isinstance(status, actions.VmStatus) and status.state == "running"
    text = text_of_threads()
    assert "skep-hung-cpu0" in text and ", holds board\n" in text and ", waits for board\n" in text
    let_go.set()
    assert going.wait(10)
    assert answers == [{"result": {"state": "running"}}]


def test_registers_of_a_processor_in_every_state(start: Start, let_go: threading.Event) -> None:
    halt = threading.Event()
    vm = start(lambda cpu: HALTED if halt.is_set() else cpu.spin())
    assert vm.registers(0)["rip"]
    vm.freeze()
    assert vm.processors() == ("frozen",)
    assert vm.registers(0)["rip"]
    vm.thaw()
    halt.set()
    deadline = time.monotonic() + 10
    vm.registers(0)
    while vm.processors() != ("halted",) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert vm.registers(0)["rip"] and vm.processors() == ("halted",)
    vm.stop()
    vm.wait(10)
    with pytest.raises(UserError, match="hung: there is no processor 0 now"):
        vm.registers(0)


def test_what_an_engine_raises_is_the_askers(start: Start) -> None:
    vm = start(lambda cpu: cpu.spin())
    vm.registers(0)

    def broken() -> dict[str, Any]:
        raise ValueError("no state today")

    engine = vm.engine
    assert isinstance(engine, ScriptedEngine)
    engine.vms[0].vcpus[0].get_state = broken  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no state today"):
        vm.registers(0)
    assert Performer(vm)._reply(actions.Registers()) == {
        "error": {"message": "internal error: ValueError: no state today"}
    }
    del engine.vms[0].vcpus[0].get_state
    assert vm.registers(0)["rip"]
