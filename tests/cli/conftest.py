"""Commands in the tests compute on the CPU, whatever the machine has: what they print is compared word for word."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
