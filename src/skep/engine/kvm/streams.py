"""Ports that take a text byte by byte, a console's: KVM keeps what is written there (:mod:`skep.engine.kvm.posted`),
but only while much is written, and not for long.

A byte that comes alone is an exit as ever, and is seen at once. Where many follow one another, KVM is told to keep
them, and a thread looks every few milliseconds for what it kept, until nothing came for a while; then each is an exit
again.
"""

from __future__ import annotations

import mmap
import threading
import time

from skep.engine.kvm.posted import EMPTY, Posted, Ring

_MANY, _WINDOW = 64, 0.1
"""So many bytes within so many seconds are a stream."""
_BETWEEN = 0.002
"""Seconds from one look to the next: so long a byte waits."""
_QUIET = 25
"""Looks at nothing, after which the stream is over."""


class Streams:
    """One VM's. ``written`` is called on vCPUs' threads."""

    def __init__(self, posted: Posted) -> None:
        self._posted = posted
        self._mapping: mmap.mmap | None = None
        self._ring: Ring = EMPTY
        self._since = 0.0
        self._count = 0
        self._guard = threading.Lock()
        self._kept = False
        """KVM keeps what is written."""
        self._closed = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def adopt(self, vcpu: int) -> None:
        """A vCPU's descriptor. All show the same ring; this is a mapping of our own, for vCPUs end one by one."""
        if self._mapping is None:
            self._mapping = mmap.mmap(vcpu, mmap.PAGESIZE, offset=self._posted.at)
            self._ring = memoryview(self._mapping).cast("I")

    def written(self) -> None:
        """A byte of a stream came by an exit."""
        if self._kept:
            return  # the ring was full
        now = time.monotonic()
        if now - self._since > _WINDOW:
            self._since, self._count = now, 0
        self._count += 1
        if self._count >= _MANY:
            self._count = 0
            self._begin()

    def close(self) -> None:
        """Before the VM's descriptor."""
        with self._guard:
            self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        if self._mapping is not None:
            self._ring.release()
            self._mapping.close()

    def _begin(self) -> None:
        with self._guard:
            if self._kept or self._closed:
                return
            self._kept = True
            try:
                self._posted.keep_streams(True)
            except OSError:  # the host has no memory for it now; those that are kept all the same are looked for
                pass
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="skep-streams", daemon=True)
                self._thread.start()
        self._wake.set()

    def _main(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            quiet = 0
            while quiet < _QUIET and not self._closed:
                time.sleep(_BETWEEN)
                quiet = 0 if self._posted.make(self._ring, _nobody) else quiet + 1
            with self._guard:
                if self._kept:
                    self._kept = False
                    self._posted.keep_streams(False)
            self._posted.make(self._ring, _nobody)  # what came meanwhile


def _nobody(what: str, where: int, size: int, value: int) -> None:
    """Whose exit was it?"""
