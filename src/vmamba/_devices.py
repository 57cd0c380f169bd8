"""Devices that users name, and small tensors that stay on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def devices_here() -> tuple[str, ...]:
    """The kinds of device that this machine has, the fastest first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return tuple(name for name, is_there in there.items() if is_there)


def choose_device(device: str, among: Sequence[str] = ("cuda", "mps", "cpu")) -> str:
    """The device that a user names; of "auto" the fastest of `among` that this machine has.

    Raises:
        ValueError: this machine does not have it, naming the device and what torch says of it.
    """
    if device == "auto":
        return next(name for name in devices_here() if name in among)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"this machine cannot compute on device {device!r}: {str(error).splitlines()[0]}") from error
    return device


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these values (N,) that is made once: a GPU would be waited for at every step to take it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
