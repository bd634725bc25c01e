"""The translator against the host CPU: random instruction sequences must agree in everything that is defined.

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
from tests.engine.guestcpu import GuestCpu
from tests.engine.oracle import Oracle

SEEDS = [os.environ["SKEP_SEED"]] if "SKEP_SEED" in os.environ else ["skep", "hive"]
SLOW_SEEDS = SEEDS if "SKEP_SEED" in os.environ else ["skep", secrets.token_hex(4)]
_TOLD = int(os.environ.get("SKEP_TOLD", "5"))


def check(host: Oracle, seed: str, count: int, *, supervisor: bool = False, cpu_model: str = "host") -> None:
    generator = Generator(seed, HOST if cpu_model == "host" else BASELINE, supervisor)
    with GuestCpu(translate(), supervisor=supervisor, cpu_model=cpu_model) as guest:
        failed = list(run_sequences(generator, count, host, guest))
        shown = "\n\n".join(str(minimize(mismatch, host, guest)) for mismatch in failed[:_TOLD])
    assert not failed, f"{len(failed)} of {count} sequences differ from the host CPU:\n\n{shown}"


@pytest.mark.parametrize("seed", SEEDS)
def test_user(host: Oracle, seed: str) -> None:
    """Ring 3, everything the host has."""
    check(host, f"{seed}-user", 6000 // len(SEEDS))


@pytest.mark.parametrize("seed", SEEDS)
def test_supervisor(host: Oracle, seed: str) -> None:
    """Ring 0: another TLB, other rules for flags."""
    check(host, f"{seed}-supervisor", 3000 // len(SEEDS), supervisor=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_baseline(host: Oracle, seed: str) -> None:
    """x86-64-v2, the default CPU model."""
    check(host, f"{seed}-baseline", 1000 // len(SEEDS), cpu_model="baseline")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("seed", SLOW_SEEDS)
def test_many(host: Oracle, seed: str, part: int) -> None:
    """100,000 sequences altogether."""
    check(host, f"{seed}-many{part}", 100_000 // 10 // len(SLOW_SEEDS), supervisor=part % 3 == 2)
