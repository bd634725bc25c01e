"""The translator against the host CPU: random instruction sequences must agree in everything that is defined.

A case is a sequence of one to a dozen random instructions, with what some need before them, from a random state to its
end or to the exception that ends it.

``SKEP_SEED`` replays a run or goes elsewhere: it is what stands before ``-user`` and its like in a failing sequence's
listing. The quick tests have fixed seeds, so that a change is judged by what it changed; the slow ones add one drawn at
random. ``SKEP_TOLD`` says how many failures are made small and shown.
"""

from __future__ import annotations

import os
import secrets

import pytest

from tests.engine.compare import minimize, run_sequences
from tests.engine.engines import translate
from tests.engine.forms import BASELINE, HOST
from tests.engine.generate import Generator
from tests.engine.generate_narrow import NarrowGenerator
from tests.engine.guestcpu import GuestCpu
from tests.engine.oracle import Oracle

SEEDS = [os.environ["SKEP_SEED"]] if "SKEP_SEED" in os.environ else ["skep", "hive"]
SLOW_SEEDS = SEEDS if "SKEP_SEED" in os.environ else ["skep", secrets.token_hex(4)]
_TOLD = int(os.environ.get("SKEP_TOLD", "5"))


def check(
    host: Oracle, seed: str, count: int, *, supervisor: bool = False, cpu_model: str = "host", bits: int = 64
) -> None:
    offered = HOST if cpu_model == "host" else BASELINE
    generator = Generator(seed, offered, supervisor) if bits == 64 else NarrowGenerator(seed, bits, offered)
    with GuestCpu(translate(), supervisor=supervisor, cpu_model=cpu_model) as guest:
        failed = list(run_sequences(generator, count, host, guest))
        shown = "\n\n".join(str(minimize(mismatch, host, guest)) for mismatch in failed[:_TOLD])
    assert not failed, f"{len(failed)} of {count} sequences differ from the host CPU:\n\n{shown}"


@pytest.mark.parametrize("seed", SEEDS)
def test_user(host: Oracle, seed: str) -> None:
    """Ring 3, everything the host has."""
    check(host, f"{seed}-user", 5000 // len(SEEDS))


@pytest.mark.parametrize("seed", SEEDS)
def test_supervisor(host: Oracle, seed: str) -> None:
    """Ring 0: another TLB, other rules for flags."""
    check(host, f"{seed}-supervisor", 2000 // len(SEEDS), supervisor=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_baseline(host: Oracle, seed: str) -> None:
    """x86-64-v2, the default CPU model."""
    check(host, f"{seed}-baseline", 1000 // len(SEEDS), cpu_model="baseline")


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("seed", SEEDS)
def test_narrow(host: Oracle, seed: str, bits: int) -> None:
    """Compatibility mode: flat 32-bit code, and 16-bit code in segments with a limit."""
    check(host, f"{seed}-narrow{bits}", 1000 // len(SEEDS), bits=bits)


MILLION = 1_000_000
PARTS = 100


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("seed", SLOW_SEEDS)
def test_many(host: Oracle, seed: str, part: int) -> None:
    """A million sequences altogether: three fifths in ring 3, one in ring 0, one in narrow code."""
    count = MILLION // PARTS // len(SLOW_SEEDS)
    kind = part % 10
    bits = {4: 16, 9: 32}.get(kind, 64)
    check(host, f"{seed}-many{part}", count, supervisor=kind in (2, 7), bits=bits)
