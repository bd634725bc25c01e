"""Fixtures of all tests."""

from __future__ import annotations

import pytest

from skep.errors import UserError
from skep.guest import debian


@pytest.fixture(scope="session")
def guest() -> debian.Guest:
    """Debian's cloud kernel and an initramfs, from the cache or the system's packages."""
    try:
        return debian.obtain()
    except UserError as error:
        pytest.skip(f"no guest to boot: {error}")
