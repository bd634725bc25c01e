"""Translations kept on disk."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from skep.engine.translate import TranslateEngine, blocks, engine, store
from skep.engine.translate.blocks import Cache
from tests.engine.tiny import Tiny
from tests.engine.translate.composed import composed


def segments(there: Path) -> list[Path]:
    """All files but the one of compiled routines."""
    return [path for path in there.iterdir() if path.suffix != ".routines"]


TEXT = """
    start: mov r15d, {value}
    lea rbx, [rip + data]
    mov ecx, 50
    again: mov rax, [rbx + 8]
    add rax, [rbx]
    cmp ecx, 25
    jb lower
    add r15, rax
    lower: push rcx
    call function
    pop rcx
    dec ecx
    jne again
    hlt
    function: lea rdx, [rdx + rcx * 2 + 1]
    test dl, 1
    je even
    inc r14
    even: mov dword [rbx + 16], {value}
    ret
    align 16
    data: dq 3, 5, 0
"""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "WORTH", 1)


def run(directory: Path | None, value: int = 0x12345678, text: str = TEXT) -> tuple[dict[str, int], int, Cache]:
    """Registers at the end, and how many blocks were adopted."""
    with Tiny(TranslateEngine(directory), text.format(value=value)) as guest:
        cache: Cache = guest.vcpu.cache  # type: ignore[attr-defined]
        guest.run()
        assert guest.exception is None
        state = guest.state
        return {name: state[name] for name in ("rax", "rcx", "rdx", "rbx", "r14", "r15")}, cache.store.adopted, cache


def test_the_second_time(tmp_path: Path) -> None:
    there = tmp_path / "code"
    plain, _, _ = run(None)
    first, adopted, _ = run(there)
    assert (first, adopted) == (plain, 0)
    second, adopted, cache = run(there)
    assert second == plain
    assert adopted >= 6 and cache.made == 0
    assert [p.suffix for p in segments(there)] == [".seg"]


def test_adopted_code_is_what_translation_makes(tmp_path: Path) -> None:
    """But for the order of blocks, and so for where jumps to the next one go."""
    there = tmp_path / "code"
    run(there)
    with Tiny(TranslateEngine(there), TEXT.format(value=7)) as guest:
        guest.run()
        cache: Cache = guest.vcpu.cache  # type: ignore[attr-defined]
        assert cache.made == 0
        for block in list(cache.blocks.values()):
            code = bytearray(cache.code[block.start : block.end])
            marks = cache.marks(block)
            made = composed(cache, block.pa, block.mode, block.start)
            if made.block.size != block.size:  # it went on into a block that was not there then
                continue
            other = bytearray(made.code)
            for site in made.links:
                code[site : site + 4] = other[site : site + 4] = bytes(4)
            assert code == other
            assert (made.block.entry, made.block.live) == (block.entry, block.live)
            assert cache.marks(block) == marks


def test_routines_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "code"
    monkeypatch.setattr(store, "WORTH", 1000)  # no segments
    plain = run(there)[0]
    (kept,) = there.iterdir()
    data = kept.read_bytes()
    monkeypatch.setattr(blocks, "_routines", lambda: pytest.fail("it was kept"))
    assert run(there)[0] == plain
    monkeypatch.undo()
    for spoil in (data[:-1], data[:900] + b"x" + data[901:], b""):
        kept.write_bytes(spoil)
        assert run(there)[0] == plain and kept.read_bytes() == data
    kept.write_bytes(data[:900] + b"x" + data[901:])
    kept.chmod(0o622)
    assert run(there)[0] == plain and kept.read_bytes() == data and kept.stat().st_mode & 0o777 == 0o600


def test_where_adopted_code_faults(tmp_path: Path) -> None:
    """The position map is as good as a translation's: #DE has the address of the division."""
    text = """
        start: lea rbx, [rip + data]
        mov r12d, 3
        again: mov eax, r12d
        call even
        dec r12d
        jns again
        hlt
        even: test al, 1
        jne odd
        ret
        odd: call divided
        ret
        divided: xor edx, edx
        mov ecx, {value}
        at: div dword [rbx]
        ret
        align 16
        data: dd 1
    """
    for divisor in (1, 0, 0):
        with Tiny(TranslateEngine(tmp_path / "code"), text.format(value=7)) as guest:
            guest.memory.write(guest.program["data"], bytes((divisor, 0, 0, 0)))
            guest.run()
            frame = guest.exception
            fault = None if frame is None else (frame.vector, frame.rip)
            assert fault == (None if divisor else (0, guest.program["at"]))
            cache: Cache = guest.vcpu.cache  # type: ignore[attr-defined]
            for block in cache.blocks.values():
                assert cache.locate(cache.buffer.rx + block.entry) == block.pa & 4095


def test_other_constants(tmp_path: Path) -> None:
    """As in a kernel that was loaded at another address."""
    there = tmp_path / "code"
    run(there)
    plain, _, _ = run(None, 0x01020304)
    result, adopted, cache = run(there, 0x01020304)
    assert result == plain and adopted >= 6 and cache.made == 0


@pytest.mark.parametrize("taken", [0, 1])
def test_other_distances(tmp_path: Path, taken: int) -> None:
    """Of what is addressed relative to RIP: in the block, and where it looked ahead."""
    text = """
        start: mov ecx, 5
        mov r15, [rip + data]
        cmp ecx, {taken}
        ja far
        add dword [rip + data], 0x01234567
        far: mov ebx, [rip + data]
        add ebx, 1
        hlt
        align 256
        {pad}
        data: dq 3
    """.replace("{taken}", str(5 * taken))
    for pad in ("", "dq 1, 2, 3", "db 1\ndb 2\n" * 300):
        there = text.replace("{pad}", pad)
        expected, _, _ = run(None, text=there)
        result, adopted, cache = run(tmp_path / "code", text=there)
        assert result == expected and expected["rbx"] == (4 if not taken else 0x01234567 + 4)
        assert (adopted and cache.made == 0) or not pad


def test_what_was_looked_at_counts(tmp_path: Path) -> None:
    """The block before a jump saves flags or not by what it saw behind the jump: other code there, another block."""
    text = """
        start: lea rbx, [rip + data]
        mov ecx, 3
        cmp ecx, 5
        jmp next
        next: mov eax, [rbx]
        {reader} r14b
        hlt
        data: dq 1
    """
    there = tmp_path / "code"
    for reader, expected in (("mov r14b, 1\nnot", 0xFE), ("setb", 1), ("setae", 0)):
        for _ in range(2):
            result, _, _ = run(there, text=text.replace("{reader}", reader))
            assert result["r14"] & 0xFF == expected


@pytest.mark.parametrize("spoil", ["short", "long", "bit", "empty", "magic"])
def test_a_spoiled_segment(tmp_path: Path, spoil: str) -> None:
    there = tmp_path / "code"
    plain, _, _ = run(there)
    (segment,) = segments(there)
    data = bytearray(segment.read_bytes())
    if spoil == "bit":
        data[len(data) * 2 // 3] ^= 4
    elif spoil == "magic":
        data[0] ^= 1
    else:
        data = {"short": data[:-7], "long": data + b"\0", "empty": bytearray()}[spoil]
    segment.write_bytes(data)
    result, adopted, _ = run(there)
    assert (result, adopted) == (plain, 0)
    assert segment not in segments(there)
    assert run(there)[1] > 0


def test_what_others_could_have_written(tmp_path: Path) -> None:
    there = tmp_path / "code"
    run(there)
    (segment,) = segments(there)
    segment.chmod(0o620)
    assert run(there)[1] == 0
    for p in segments(there):
        p.chmod(0o600)
    assert run(there)[1] > 0
    for mode in (0o755, 0o770, 0o701):
        there.chmod(mode)
        result, adopted, cache = run(there)
        assert adopted == 0 and "others" in cache.store.problem and result == run(None)[0]
    there.chmod(0o700)
    moved = tmp_path / "moved"
    there.rename(moved)
    there.symlink_to(moved)
    _, adopted, cache = run(there)
    assert adopted == 0 and cache.store.problem
    there.unlink()
    moved.rename(there)
    assert run(there)[1] > 0
    (segment, *_) = segments(there)
    elsewhere = tmp_path / segment.name
    segment.rename(elsewhere)
    for p in segments(there):
        p.unlink()
    segment.symlink_to(elsewhere)
    assert run(there)[1] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_owner(tmp_path: Path) -> None:
    there = tmp_path / "code"
    run(there)
    (segment,) = segments(there)
    os.chown(segment, 65534, 65534)
    assert run(there)[1] == 0
    os.chown(there, 65534, 65534)
    _, adopted, cache = run(there)
    assert adopted == 0 and cache.store.problem


def test_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result, _, cache = run(tmp_path / "file" / "code")
    assert result == run(None)[0] and cache.store.problem


def test_sources_that_changed_since_they_were_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade below a running process: nothing of the old version is kept under the new one's name, or taken."""
    there = tmp_path / "code"
    run(there)
    kept = sorted(there.iterdir())
    changed = max(path.stat().st_ctime_ns for path in Path(store.__file__).parent.glob("*.py"))
    assert store.identity(changed) == store.identity()
    assert store.identity(changed - 1) == ""
    monkeypatch.setattr(engine, "store_identity", lambda: store.identity(changed - 1))
    _, adopted, cache = run(there, text=TEXT.replace("inc r14", "add r14, 1"))
    assert adopted == 0 and cache.made
    assert sorted(there.iterdir()) == kept


def test_two_at_once(tmp_path: Path) -> None:
    there = tmp_path / "code"
    engine = TranslateEngine(there)
    with Tiny(engine, TEXT.format(value=1)) as one, Tiny(engine, TEXT.format(value=2)) as two:
        one.run()
        two.run()
    assert len(list(segments(there))) == 2
    assert run(there)[1] > 0


def test_two_of_the_same_at_once(tmp_path: Path) -> None:
    """What one has kept, the other does not keep again."""
    there = tmp_path / "code"
    engine = TranslateEngine(there)
    with Tiny(engine, TEXT.format(value=1)) as one, Tiny(engine, TEXT.format(value=1)) as two:
        one.run()
        two.run()
    assert len(list(segments(there))) == 1


def test_what_is_made_again_is_kept_once(tmp_path: Path) -> None:
    there = tmp_path / "code"
    run(there)
    (once,) = segments(there)
    size = once.stat().st_size
    once.unlink()
    with Tiny(TranslateEngine(there), TEXT.format(value=0x12345678)) as guest:
        cache: Cache = guest.vcpu.cache  # type: ignore[attr-defined]
        for _ in range(3):
            guest.run()
            cache.written(0, guest.memory.top)
            guest.set(rip=guest.program["start"])
    (again,) = segments(there)
    assert again.stat().st_size == size


@pytest.mark.parametrize("known", [False, True])
def test_another_one_removes_everything_meanwhile(tmp_path: Path, known: bool) -> None:
    """As it does when all of it together is too much: the segments that we use."""
    there = tmp_path / "code"
    if known:
        run(there)
    with Tiny(TranslateEngine(there), TEXT.replace("again:", "nop\nagain:").format(value=1)) as guest:
        guest.run()
        assert len(list(segments(there))) == known
        for path in segments(there):
            path.unlink()
    assert len(list(segments(there))) == 1
    assert run(there, 1, TEXT.replace("again:", "nop\nagain:"))[2].made == 0 or known


def test_a_draft_goes_with_its_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM that does little makes none; what a killed one leaves, another removes."""
    there = tmp_path / "code"
    monkeypatch.setattr(store, "WORTH", 1000)
    with Tiny(TranslateEngine(there), TEXT.format(value=1)) as guest:
        guest.run()
        assert not list(segments(there))
    monkeypatch.setattr(store, "WORTH", 1)
    with Tiny(TranslateEngine(there), TEXT.format(value=1)) as guest:
        guest.run()
        cache: Cache = guest.vcpu.cache  # type: ignore[attr-defined]
        cache.store.sort_notes()  # as at its end
        (draft,) = segments(there)
        os.utime(draft, ns=(0, 0))
        killed = draft.with_name(".killed.seg")
        killed.write_bytes(b"something")
        os.utime(killed, ns=(0, 0))
        run(there, 2)
        assert draft.exists() and not killed.exists()
    assert all(p.suffix == ".seg" and p.name[0] != "." for p in segments(there))


def test_many_segments_become_few(tmp_path: Path) -> None:
    there = tmp_path / "code"

    def variant(i: int) -> str:
        return TEXT.replace("lea rdx, [rdx + rcx * 2 + 1]", f"lea rdx, [rdx + rcx + {i + 1}]")

    for i in range(store.MAX_SEGMENTS + 1):
        run(there, text=variant(i))
    assert len(list(segments(there))) == 2
    for i in range(store.MAX_SEGMENTS + 1):
        _, adopted, cache = run(there, text=variant(i))
        assert adopted >= 6 and cache.made == 0


def test_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "code"
    run(there)
    (old,) = segments(there)
    monkeypatch.setattr(engine, "Store", partial(store.Store, limit=old.stat().st_size * 3 // 2))
    os.utime(old, ns=(0, 0))
    run(there, text=TEXT.replace("inc r14", "inc r14\ninc r14").replace("again:", "nop\nagain:"))
    (new,) = segments(there)
    assert new != old
