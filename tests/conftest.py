"""What tests of every room share."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"  # large optional data, beside the repository


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of optional data; the test is skipped, saying so, where there is none."""
    if not SHARED.is_dir():
        pytest.skip("optional data: there is no folder `shared` beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def golden() -> Path:
    """The tensors of the official code that the tests carry themselves."""
    return Path(__file__).parent / "golden"
