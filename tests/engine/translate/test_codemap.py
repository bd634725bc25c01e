"""Which bytes were translated, beside sets of addresses."""

from __future__ import annotations

import random

from skep.engine.translate.codemap import CodeMap
from skep.memory import GuestMemory

PAGES = 3


def _marked(map_: CodeMap) -> set[int]:
    words = map_._bytes
    return {64 * line + bit for line in range(64 * PAGES) for bit in range(64) if words[line] >> bit & 1}


def test_marks_and_clears() -> None:
    choose = random.Random(5)
    memory = GuestMemory(1 << 20)
    map_ = CodeMap(memory)
    want: set[int] = set()
    for _ in range(3000):
        frame = choose.randrange(PAGES)
        start = choose.randrange(4096)
        pa, n = frame << 12 | start, choose.randint(1, min(4096 - start, choose.choice((8, 200, 4096))))
        action = choose.randrange(20)
        if action < 10:
            map_.mark(pa, n)
            want |= set(range(pa, pa + n))
        elif action < 16:
            map_.clear(pa, n)
            want -= set(range(pa, pa + n))
        elif action < 19:
            some = sum(1 << choose.randrange(4096) for _ in range(3)) & ~(1 << choose.randrange(4096))
            map_.mark_bits(frame, some)
            want |= {frame << 12 | bit for bit in range(4096) if some >> bit & 1}
        elif choose.random() < 0.3:
            map_.clear_page(frame)
            want = {byte for byte in want if byte >> 12 != frame}
        lines = {byte >> 6 for byte in want}
        assert [map_.mask[frame] >> i & 1 for frame in range(PAGES) for i in range(64)] == [
            int(line in lines) for line in range(64 * PAGES)
        ]
    assert _marked(map_) == want
    map_.clear_all()
    assert not _marked(map_) and not any(map_.mask)
    map_.close()
    memory.close()
