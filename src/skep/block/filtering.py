"""Filters as a tree of options tells them: what is said of one, and what makes it then."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from skep.block.backend import File
from skep.block.filters import REQUESTS, CopyOnRead, Delay, Fault, Faulty, Throttle, Trace
from skep.block.format import Image
from skep.block.record import Recorder
from skep.block.tree import Layer
from skep.errors import UserError

Make = Callable[[File], File]


def _throttle(said: Layer) -> Make:
    bytes_, requests = said.size("bps"), said.number("iops")
    if not bytes_ and not requests:
        raise UserError("is missing, or iops is", said.where("bps"))
    return lambda below: Throttle(below, bytes_, requests)


def _delay(said: Layer) -> Make:
    milliseconds = said.number("ms")
    if milliseconds is None:
        raise UserError("is missing", said.where("ms"))
    return lambda below: Delay(below, milliseconds / 1000)


def _fault(said: Layer) -> Make:
    what = said.take("what")
    if what not in (None, *REQUESTS):
        raise UserError(f"is one of {', '.join(REQUESTS)}, not {what!r}", said.where("what"))
    start, end = said.size("start"), said.size("end")
    rule = Fault(what, start or 0, end, said.number("after") or 0, said.number("times"))
    return lambda below: Faulty(below, rule)


def _trace(said: Layer) -> Make:
    path = said.need("log")
    return lambda below: Trace(below, path)


def _record(said: Layer) -> Make:
    path = said.need("log")
    return lambda below: Recorder(below, path)


def _copy_on_read(said: Layer) -> Make:
    def make(below: File) -> File:
        if not isinstance(below, Image) or below.backing is None or below.read_only:
            raise UserError("is not an image over another one that is written to", said.where("file"))
        return CopyOnRead(below)

    return make


_TOLD: Mapping[str, Callable[[Layer], Make]] = {
    "throttle": _throttle,
    "delay": _delay,
    "fault": _fault,
    "trace": _trace,
    "record": _record,
    "copy-on-read": _copy_on_read,
}


def filter_told(driver: str, said: Layer) -> Make:
    """One of :data:`skep.block.registry.FILTERS`; takes its options. Raises UserError."""
    return _TOLD[driver](said)
