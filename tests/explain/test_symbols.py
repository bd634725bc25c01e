"""Names of a kernel's addresses: from a System.map, and from tables laid out as Linux's build does it."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.engine.amd64 import msrs
from skep.engine.amd64.registers import Cr0, Cr4, Efer, Pte
from skep.errors import UserError
from skep.explain.amd64 import AddressSpace
from skep.explain.linux import Image, Kallsyms, Physical, find_image, find_log, find_symbols, fit
from skep.explain.symbols import SystemMap
from skep.memory import GuestMemory

TEXT = 0xFFFF_FFFF_8100_0000
SLIDE = 0x1E00_0000
MAP = """\
0000000000000000 A fixed_percpu_data
0000000000001000 A cpu_tss_rw
ffffffff81000000 T _text
ffffffff81000040 T start_kernel
ffffffff81000400 t helper.cold
ffffffff81800000 T asm_exc_page_fault
ffffffff81800100 T entry_SYSCALL_64
ffffffff82000000 D jiffies
"""


@pytest.fixture
def system_map(tmp_path: Path) -> SystemMap:
    path = tmp_path / "System.map"
    path.write_text(MAP)
    return SystemMap(path)


def test_a_system_map_names_functions(system_map: SystemMap) -> None:
    assert system_map.name(TEXT + 0x40) == "start_kernel"
    assert system_map.name(TEXT + 0x3FF) == "start_kernel+0x3bf"
    assert system_map.name(TEXT + 0x404) == "helper.cold+0x4"
    assert system_map.name(TEXT - 1) is None
    assert system_map.name(TEXT + 0xF0_0000) is None, "far behind the last function"
    system_map.slide = SLIDE
    assert system_map.name(TEXT + SLIDE + 0x41) == "start_kernel+0x1"
    assert system_map.name(TEXT + 0x41) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "this is no System.map"),
        ("hello world\n" * 10, "this is no System.map"),
        ("\0\xff\n" * 100, "this is no System.map"),
        (
            "ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package\n",
            "this System.map only says that the real one is in the package linux-image-...-dbg",
        ),
    ],
)
def test_what_is_no_system_map_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "System.map"
    path.write_text(text)
    with pytest.raises(UserError, match="of the very kernel that is booted") as raised:
        SystemMap(path)
    assert str(raised.value).startswith(f"{path}: {says}")


def test_a_system_map_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*: no such file"):
        SystemMap(tmp_path / "none")


# A kernel in memory: 4 MiB at guest-physical 16 MiB, mapped where Linux would have it, moved by SLIDE.

BASE, SIZE = 16 << 20, 4 << 20
NAMES = sorted({f"function_{number * 7919 % 10007:x}" for number in range(3000)} | {"panic", "start_kernel"})


class Kernel:
    def __init__(self) -> None:
        self.memory = GuestMemory(32 << 20)
        pml4, pdpt, directory = 0x1000, 0x2000, 0x3000
        self.memory.store_u64(pml4 + 511 * 8, pdpt | Pte.P | Pte.RW)
        self.memory.store_u64(pdpt + 510 * 8, directory | Pte.P | Pte.RW)
        first = (TEXT + SLIDE >> 21) & 511
        for i in range(SIZE >> 21):
            self.memory.store_u64(directory + (first + i) * 8, BASE + (i << 21) | Pte.P | Pte.RW | Pte.PS)
        self.state = {
            "cr0": Cr0.PE | Cr0.PG, "cr4": Cr4.PAE, "efer": Efer.LME | Efer.LMA, "cr3": pml4,
            "idtr": {"base": TEXT + SLIDE + 0x300000, "limit": 4095},
            "msrs": {msrs.LSTAR: TEXT + SLIDE + 0x800100},
        }  # fmt: skip
        self.space = AddressSpace(self.memory, self.state)
        self.image = Image(TEXT + SLIDE, BASE, SIZE)

    def symbols(self) -> Kallsyms | None:
        return find_symbols(Physical(self.memory), self.image)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.memory.close()


def test_the_kernels_image_is_found_by_its_page_tables(kernel: Kernel) -> None:
    assert find_image(kernel.space) == kernel.image
    page = kernel.space.page(TEXT + SLIDE + 0x212345)
    assert page is not None and page.gpa == BASE + 0x212345


def gate(kernel: Kernel, handler: int) -> None:
    word = handler & 0xFFFF | 0x10 << 16 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48
    at = BASE + 0x300000 + 14 * 16
    kernel.memory.store_u64(at, word)
    kernel.memory.store_u64(at + 8, handler >> 32)


def test_the_slide_follows_from_what_the_processor_knows(kernel: Kernel, system_map: SystemMap) -> None:
    gate(kernel, TEXT + SLIDE + 0x800000)
    assert fit(system_map, kernel.space, kernel.state, kernel.image)
    assert system_map.slide == SLIDE
    kernel.state["msrs"] = {}  # before the first system call there is no LSTAR
    assert fit(system_map, kernel.space, kernel.state, kernel.image)
    kernel.state["idtr"] = {}  # and at first Linux's own IDT is not there either
    assert fit(system_map, kernel.space, kernel.state, kernel.image)
    assert system_map.slide == SLIDE


def test_a_map_of_another_kernel_is_told_from_the_right_one(kernel: Kernel, system_map: SystemMap) -> None:
    gate(kernel, TEXT + SLIDE + 0x900000)
    assert not fit(system_map, kernel.space, kernel.state, kernel.image)


# scripts/kallsyms.c


def align(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def tables(layout: str, absolute_percpu: bool = True, sequences: bool = False) -> tuple[bytes, dict[str, int]]:
    """What the linker finds in .tmp_vmlinux.kallsyms.S, and the functions' addresses."""
    choose = random.Random(3)
    tokens = [chr(number) if 32 < number < 127 else f"{choose.choice('aeiou')}{number:x}_" for number in range(256)]
    tokens[0], tokens[1] = "func", "tion_"  # common pieces have the codes that no letter has
    addresses: dict[str, int] = {}
    offsets, names, markers = b"", b"", []
    symbols = [("A", "percpu_base", 0), ("A", "percpu_next", 0x1000)] if absolute_percpu else []
    symbols += [("T" if i % 3 else "t", name, 0x100 * i) for i, name in enumerate(NAMES)]
    for number, (kind, name, offset) in enumerate(symbols):
        if number % 256 == 0:
            markers.append(len(names))
        if kind == "A":
            offsets += struct.pack("<i", offset)
        else:
            addresses[name] = TEXT + SLIDE + offset
            offsets += struct.pack("<i", -1 - offset if absolute_percpu else offset)
        text = kind + name
        pieces = bytes((0, 1)) if name.startswith("function_") else b""
        rest = name.removeprefix("function_") if pieces else name
        packed = text[:1].encode() + pieces + rest.encode()
        names += bytes((len(packed),)) + packed
    count = align(struct.pack("<I", len(symbols)))
    table = b"".join(token.encode() + b"\0" for token in tokens)
    starts, at = [], 0
    for token in tokens:
        starts.append(at)
        at += len(token) + 1
    base = struct.pack("<Q", TEXT + SLIDE)
    index = struct.pack("<256H", *starts)
    text = align(names) + align(struct.pack(f"<{len(markers)}I", *markers))
    if sequences:
        text += align(bytes(choose.randrange(1, 256) for _ in range(3 * len(symbols))))
    if layout == "6.1":
        return align(offsets) + base + count + text + align(table) + index, addresses
    return count + text + align(table) + index + align(offsets) + base, addresses


@pytest.mark.parametrize("layout", ["6.1", "6.4"])
@pytest.mark.parametrize("absolute_percpu", [True, False])
@pytest.mark.parametrize("sequences", [True, False])
def test_the_kernels_own_symbols(kernel: Kernel, layout: str, absolute_percpu: bool, sequences: bool) -> None:
    data, addresses = tables(layout, absolute_percpu, sequences)
    kernel.memory.write(BASE + 0x20_1008, data)
    symbols = kernel.symbols()
    assert symbols is not None
    for name, address in addresses.items():
        assert symbols.name(address) == name
        assert symbols.name(address + 0xFF) == f"{name}+0xff"
    assert symbols.name(TEXT + SLIDE - 1) is None


def test_tables_that_are_cut_off_or_altered_name_nothing_and_raise_nothing(kernel: Kernel) -> None:
    data, _ = tables("6.1")
    choose = random.Random(5)
    for _ in range(40):
        altered = bytearray(data)
        for _ in range(choose.choice((1, 10, 1000))):
            altered[choose.randrange(len(altered))] = choose.randrange(256)
        end = choose.choice((len(data), choose.randrange(len(data))))
        kernel.memory.write(BASE + 0x20_1008, bytes(len(data)))
        kernel.memory.write(BASE + 0x20_1008, altered[:end])
        symbols = kernel.symbols()
        for address in range(TEXT + SLIDE - 0x1000, TEXT + SLIDE + 0x100000, 0x4321):
            if symbols is not None:
                assert symbols.name(address) is None or isinstance(symbols.name(address), str)


# printk's ring


def ring(messages: list[str], junk: bytes = b"") -> bytes:
    """prb_data_block: an id, the text, and whatever was in its room."""
    data = b""
    for number, message in enumerate(messages):
        data += struct.pack("<Q", 0xFFFF_FFFF_FFFF_F000 + number) + align(message.encode() + junk)
    return data


def infos(messages: list[str]) -> bytes:
    return b"".join(
        struct.pack("<QQHBBI64x", number, number * 1_500_000_000, len(message), 0, 6, 1)
        for number, message in enumerate(messages)
    )


MESSAGES = ["Linux version 6.1.0-test (gcc)", *(f"message {number}: " + "x" * (number % 70) for number in range(300))]


@pytest.mark.parametrize("junk", [b"", b"\n", b"st\n", b"\0\0junk"])
def test_the_kernels_log(kernel: Kernel, junk: bytes) -> None:
    kernel.memory.write(BASE + 0x10_0000, b"Linux version %s by somebody\0")  # the format's own text is not the log
    kernel.memory.write(BASE + 0x20_0000, ring(MESSAGES, junk))
    kernel.memory.write(BASE + 0x30_0000, infos(MESSAGES))
    log = find_log(Physical(kernel.memory), kernel.image)
    assert log == [f"[{n * 1_500_000_000 // 10**9:5}.{n * 1_500_000 % 10**6:06}] {m}" for n, m in enumerate(MESSAGES)]


def test_a_log_without_its_records_has_no_times(kernel: Kernel) -> None:
    kernel.memory.write(BASE + 0x20_0000, ring(MESSAGES))
    assert find_log(Physical(kernel.memory), kernel.image) == MESSAGES


def test_terminal_controls_in_a_log_do_nothing(kernel: Kernel) -> None:
    messages = ["Linux version 6.1", "a\x1b[2Jb", "c\r\nd", "e"]
    kernel.memory.write(BASE + 0x20_0000, ring(messages))
    kernel.memory.write(BASE + 0x30_0000, infos(messages))
    assert [line.split("] ", 1)[1] for line in find_log(Physical(kernel.memory), kernel.image)] == [
        "Linux version 6.1", "a [2Jb", "c  d", "e",
    ]  # fmt: skip
