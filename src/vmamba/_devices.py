"""Devices that users name."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def choose_device(device: str, among: Sequence[str] = ("cuda", "mps", "cpu")) -> str:
    """The device that a user names; of "auto" the first of `among` that this machine has.

    Raises:
        ValueError: this machine does not have it, naming the device and what torch says of it.
    """
    if device == "auto":
        there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
        return next(name for name in among if there[name]())
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"this machine cannot compute on device {device!r}: {str(error).splitlines()[0]}") from error
    return device
