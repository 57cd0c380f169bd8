"""Devices that users name."""

from __future__ import annotations

import torch


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ValueError: naming the device and what torch says of it.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"this machine cannot compute on device {device!r}: {str(error).splitlines()[0]}") from error
