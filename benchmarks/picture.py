"""The rows as a picture: one bar each, how many times as fast as QEMU, on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from benchmarks.figures import Row, means
from benchmarks.rows import CAP

LEFT, RIGHT, TOP, STEP, BAR = 130, 60, 34, 20, 13
WIDTH = 720
LEAST = 0.25
"""The scale's left end."""
COLOURS = {"integer": "#2f6f9f", "FP and SIMD": "#c8821e", "system": "#4d8a4b"}


def draw(rows: Sequence[Row]) -> str:
    """An SVG document."""
    shown = [row for row in rows if row.speed is not None]
    average = means(shown)
    parts: list[str] = []
    y = TOP
    for group in dict.fromkeys(row.group for row in shown):
        parts.append(_text(8, y + BAR - 2, f"{group}: geometric mean {average[group]:.2f}", weight="bold"))
        y += STEP
        for row in shown:
            if row.group == group and row.speed is not None:
                parts += _bar(y, row.name, row.speed, COLOURS[group])
                y += STEP
        y += STEP // 2
    grid = []
    for tick in (0.25, 0.5, 1, 2, 4, 8, 16):
        x = _x(tick)
        colour = "#000" if tick == 1 else "#ddd"
        grid.append(f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{y}" stroke="{colour}" stroke-width="1"/>')
        grid.append(_text(x, TOP - 10, f"{tick:g}", anchor="middle"))
    head = _text(8, TOP - 10, "times QEMU's speed", weight="bold")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 6}" width="{WIDTH}" height="{y + 6}"'
        ' font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{y + 6}" fill="#fff"/>\n' + "\n".join([*grid, head, *parts]) + "\n</svg>\n"
    )


def _x(value: float) -> float:
    place = math.log(max(LEAST, value) / LEAST) / math.log(CAP / LEAST)
    return LEFT + place * (WIDTH - LEFT - RIGHT)


def _bar(y: int, name: str, speed: float, colour: str) -> list[str]:
    """A bar from 1 to the speed: to the right where Skep is faster, to the left where it is not."""
    one, end = _x(1), _x(speed)
    left, width = min(one, end), abs(end - one)
    label = f"{speed:.1f}" if speed < CAP else f"{CAP:g} or more"
    return [
        _text(LEFT - 8, y + BAR - 2, name, anchor="end"),
        f'<rect x="{left:.1f}" y="{y}" width="{max(1.0, width):.1f}" height="{BAR}" fill="{colour}"/>',
        _text(max(one, end) + 4, y + BAR - 2, label),
    ]


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
