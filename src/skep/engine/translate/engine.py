"""The translator as an engine, and a VM's part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from skep.contracts.constantports import ConstantPorts
from skep.contracts.interrupts import EngineChips, LocalApics, LocalInterrupts
from skep.contracts.io import Doorbells, IoSpace, PostedWrites
from skep.engine.amd64 import features
from skep.engine.translate import emission
from skep.engine.translate.blocks import CODE_SIZE, Cache
from skep.engine.translate.dirty import WrittenPages
from skep.engine.translate.faults import CATCHER
from skep.engine.translate.shared import Shared
from skep.engine.translate.statistics import statistics
from skep.engine.translate.store import Store
from skep.engine.translate.store import identity as store_identity
from skep.engine.translate.vcpu import TranslateVcpu
from skep.errors import UserError
from skep.memory import PAGE, GuestMemory


class TranslateEngine:
    """Runs guests without hardware virtualization (docs/translator.md)."""

    name = "translate"
    hosts_apics = hosts_chips = scales_tsc = wants_huge_pages = False
    description = f"translate, {'pure Python' if emission.__file__.endswith('.py') else 'compiled by mypyc'}"

    def __init__(self, code_cache: Path | None = None, code_size: int = CODE_SIZE) -> None:
        """``code_cache``: the directory where translations are kept from one VM to the next; None: they are not.
        ``code_size``: bytes of translated code that a VM has at a time, 8 MiB to 1 GiB."""
        self._code_cache = code_cache
        self._code_size = code_size

    def create_vm(
        self,
        memory: GuestMemory,
        io: IoSpace,
        max_vcpus: int,
        cpu_model: str,
        tsc_offset: int,
        tsc_hz: int | None = None,
        time_of_day: Callable[[], int] | None = None,
    ) -> TranslateVm:
        features.require()
        if memory.page_size > PAGE:
            what = "the translator sees guest memory by small pages"
            raise UserError(what, "memory.hugepages", "use transparent, or --engine kvm")
        made_by = store_identity() if self._code_cache else ""
        store = Store(self._code_cache if made_by else None, made_by)
        cache = Cache(memory, store, self._code_size, max_vcpus)
        return TranslateVm(Shared(memory, io, max_vcpus, cpu_model, tsc_offset, cache, time_of_day))


class TranslateVm:
    """A VM's part of the translator: the translations and what they rest on."""

    def __init__(self, shared: Shared) -> None:
        self.max_vcpus = shared.max_vcpus
        self.local_apics: LocalApics | None = None
        self.chips: EngineChips | None = None
        self.doorbells: Doorbells | None = None
        self.posted: PostedWrites | None = None
        self.withheld: tuple[str, ...] = ()
        self.shared = shared
        self.cache = shared.cache
        self.vcpus: list[TranslateVcpu] = []
        self._observed = False
        CATCHER.add(self.cache.buffer.rx, self.cache.buffer.size, self.cache.stubs["fault_exit"])
        shared.memory.add_write_listener(self._written)
        self._dirty = WrittenPages(self.cache)
        shared.memory.add_map_listener(shared.overlays)
        shared.memory.add_dirty_source(self._dirty)

    def create_vcpu(self, index: int, interrupts: LocalInterrupts) -> TranslateVcpu:
        vcpu = TranslateVcpu(self.shared, index, interrupts)
        if self._observed:
            vcpu.observe()
        self.vcpus.append(vcpu)
        return vcpu

    def freeze(self) -> None:
        self.cache.world.freeze()

    def thaw(self) -> None:
        self.cache.world.thaw()

    def set_tsc_offset(self, offset: int) -> None:
        self.shared.tsc_offset = offset
        for vcpu in self.vcpus:
            vcpu.msrs.set_tsc_offset(offset)
        if self.shared.clock is not None:
            self.shared.clock.stopped()

    def kvm_clock(self, tsc: int) -> int:
        return 0 if self.shared.clock is None else self.shared.clock.at(tsc)

    def set_kvm_clock(self, tsc: int, ns: int) -> None:
        if self.shared.clock is not None:
            self.shared.clock.set(tsc, ns)

    def answer_ports(self, constants: ConstantPorts) -> None:
        self.shared.constants = constants.address

    def observe(self, *, times: bool, perf_map: bool) -> None:
        self._observed = times
        if perf_map:
            self.shared.name_code()

    def statistics(self) -> dict[str, int | float]:
        return statistics(self.cache, self.vcpus)

    def _written(self, gpa: int, n: int) -> None:
        """Somebody who is no vCPU has changed memory: its translations go before anybody can know of the change."""
        map_ = self.cache.map
        map_.changes = object()
        mask = map_.mask
        for frame in range(gpa >> 12, (gpa + n - 1 >> 12) + 1):
            if mask[frame]:
                self.cache.written(gpa, n)
                return

    def close(self) -> None:
        memory = self.shared.memory
        memory.remove_dirty_source(self._dirty)
        memory.remove_map_listener(self.shared.overlays)
        memory.remove_write_listener(self._written)
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        CATCHER.remove(self.cache.buffer.rx)
        self.shared.close()
