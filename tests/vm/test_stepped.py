"""A processor of a whole VM, stepped while the VM stands still, whoever has its interrupt controllers."""

from __future__ import annotations

import time

import pytest

from skep.engine.contract import ExitReason
from skep.engine.debug import Debug
from tests.engine.engines import ALONE_ON_HARDWARE, ON_HARDWARE, WHOLE_ON_HARDWARE
from tests.vm.test_guests import kernel
from tests.vm.test_saved import Made, counts_on, make

__all__ = ["kernel", "make"]


@pytest.mark.parametrize(  # not the translator, which parks in the run
    "engine", ["kvm", "kvm alone", "kvm whole", ON_HARDWARE, ALONE_ON_HARDWARE, WHOLE_ON_HARDWARE]
)
def test_a_processor_is_stepped_and_goes_on(make: Made, engine: str) -> None:
    """Through a loop of two instructions, an increment of memory first."""
    vm = make(engine, "s")
    vm.start()
    vm.console.expect("Hi\n", timeout=20)
    counts_on(vm)
    vm.freeze()
    vcpu = vm._processors[0]._vcpu
    assert vcpu is not None
    vcpu.set_debug(Debug(step=True))
    places, counts = [], []
    for _ in range(6):
        left = vcpu.run()
        assert left.reason is ExitReason.DEBUG and left.detail["step"]
        places.append(vcpu.get_state()["rip"])
        counts.append(vm.board.memory.load_u64(0x70000))
    assert len(set(places)) == 2 and places[:2] * 3 == places
    assert counts[-1] - counts[0] in (2, 3)
    vcpu.set_debug(Debug())
    vm.thaw()
    time.sleep(0.01)
    counts_on(vm)
