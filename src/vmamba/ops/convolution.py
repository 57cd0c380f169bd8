"""The depthwise 3x3 convolution with torch's own operators: for backends without kernels of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv", "conv_backward"]


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(conv(x) + bias), (B, H, W, E) -> (B, H, W, E); torch convolves the permuted view as it lies."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[3]).permute(0, 2, 3, 1)
    return F.silu(y) if activation == "silu" else y


def conv_backward(
    gy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; the last also without a bias, as that of a bias of zeros."""
    if activation == "silu":
        gy = torch.ops.aten.silu_backward(gy, conv(x, weight, bias, "none"))
    x, gy = x.permute(0, 3, 1, 2), gy.permute(0, 3, 1, 2)
    one, E = [1, 1], weight.shape[0]
    gx, gweight, gbias = torch.ops.aten.convolution_backward(
        gy, x, weight, [E], one, one, one, False, [0, 0], E, [True, True, True]
    )
    return gx.permute(0, 2, 3, 1), gweight, gbias
