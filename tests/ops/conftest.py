"""Op tests run with uninitialised memory filled with NaN: an element that is read before it is written shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vmamba.ops import portable


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    portable._scratch.kept.clear()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
