"""Op tests run with uninitialised memory filled with NaN: an element that is read before it is written shows.

In Triton's interpreter, what is read or written outside of the tensors shows as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from vmamba.ops import portable

from .bounds import Bounds


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    portable._scratch.kept.clear()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> Bounds:
    bounds = Bounds()
    if os.environ.get("TRITON_INTERPRET") == "1":
        bounds.install(monkeypatch)
    return bounds
