"""What two processors' work is beside one's."""

from __future__ import annotations

from benchmarks.processors import lines


def test_what_is_printed() -> None:
    """The median of the rounds' ratios: two processes did twice the work in the time given."""
    rounds = [
        {"one": 1.0, "two": 1.0, "one_cpu": 1.0, "two_cpu": 2.5},
        {"one": 1.0, "two": 1.25, "one_cpu": 1.0, "two_cpu": 2.0},
        {"one": 1.0, "two": 2.0, "one_cpu": 1.0, "two_cpu": 4.0},
    ]
    _, row = lines({"crc": {"skep": rounds, "qemu": rounds[:1]}})
    assert row.split() == ["crc", "skep", "1.60", "(1.60)", "qemu", "2.00", "(1.60)"]
