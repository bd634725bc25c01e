"""Fixtures of all tests."""

from __future__ import annotations

import os
import shutil
import tempfile

import hypothesis
import pytest

from skep.errors import UserError
from skep.guest import debian
from skep.guest import root as debian_root

pytest_plugins = ["tests.nested.plugin"]

_RUN = pytest.StashKey[str]()

hypothesis.settings.register_profile("skep", deadline=None)  # a busy machine is not a failure
hypothesis.settings.load_profile("skep")


def pytest_configure(config: pytest.Config) -> None:
    """VMs of tests have a run directory of their own: their names are nobody else's business."""
    config.stash[_RUN] = os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="skep-run-")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_RUN], ignore_errors=True)


@pytest.fixture(params=["translate", pytest.param("kvm", marks=pytest.mark.hardware)])
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine, for a test whose guest needs a whole processor."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def guest() -> debian.Guest:
    """Debian's cloud kernel and an initramfs, from the cache or the system's packages."""
    try:
        return debian.obtain()
    except UserError as error:
        pytest.skip(f"no guest to boot: {error}")


@pytest.fixture(scope="session")
def root() -> debian_root.Root:
    """A Debian root, from the cache or made in a minute or two."""
    try:
        return debian_root.obtain()
    except UserError as error:
        pytest.skip(f"no root to boot: {error}")
