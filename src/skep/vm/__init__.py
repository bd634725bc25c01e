"""The VM: created, started, frozen, thawed, reset, stopped.

    with skep.Vm(kernel="vmlinuz", initrd="initrd.img", cmdline="console=ttyS0") as vm:
        vm.start()
        vm.console.expect("# ")
        vm.console.send("poweroff -f\\n")
        print(vm.wait())

What may follow what is one table, :data:`TRANSITIONS`, and all of it happens on one thread of the VM's, one step after
the other, whoever asked: the program, or the guest (``lifecycle.py``). Each processor is a thread that runs guest code
until the engine gives up control, and then attends to what was asked of it (``processor.py``).
"""

from skep.vm.lifecycle import PROGRAM, Vm
from skep.vm.saved import VmState
from skep.vm.states import TRANSITIONS, End, Outcome, State, Step

__all__ = ["PROGRAM", "TRANSITIONS", "End", "Outcome", "State", "Step", "Vm", "VmState"]
