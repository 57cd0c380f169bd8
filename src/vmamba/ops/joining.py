"""Where joined operators may run: the dtype that they compute in, or None."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import BACKENDS, choose
from .library import is_transformed

__all__ = ["inference_dtype", "training_dtype"]


def inference_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which a network should run `ops.inference` on x, or None where it should run its layers one by one.

    That is a half dtype (autocast's, or x's own) on a device whose backend has kernels, while no gradients are recorded
    and no function transform (vmap, grad) looks on.
    """
    return None if torch.is_grad_enabled() else _joined_dtype(x)


def training_dtype(x: Tensor) -> torch.dtype | None:
    """The same while gradients are recorded, for `ops.training`."""
    return _joined_dtype(x) if torch.is_grad_enabled() else None


def _joined_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    if is_transformed() or device == "meta" or BACKENDS[choose("auto", device)].joined is None:
        return None
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None
