"""The LayerNorm inside a branch, and what may normalise the scan's output (B, H, W, E), by the configuration's names.

Source: VMamba (arXiv 2401.10166), the ablation of the normalisation after SS2D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import ConvNHWC

__all__ = ["SSM_OUT_NORMS", "BranchNorm", "StreamNorm", "stream_dtype"]


class BranchNorm(nn.LayerNorm):
    """LayerNorm over channels whose result, under autocast, has autocast's dtype. Shapes as in `nn.LayerNorm`.

    Autocast runs a LayerNorm in fp32 and returns fp32, which the linear layer after it casts down again: three times
    the bytes for numbers that are rounded all the same. torch's kernel computes mean and variance in fp32 for any
    input.
    """

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return F.layer_norm(
                x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps
            )


def stream_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the residual stream, the sum that branches are added to, where x is computed on in `dtype`.

    `dtype` itself, but fp32 under autocast to fp16, whose range a stream may leave. bf16 costs little
    (docs/decisions.md) and halves the bytes of every norm and sum.
    """
    return torch.float32 if dtype == torch.float16 and torch.is_autocast_enabled(x.device.type) else dtype


class StreamNorm(BranchNorm):
    """LayerNorm over channels that opens the residual stream of a stage: under autocast it gives `stream_dtype`."""

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            with torch.autocast(device, enabled=False):
                return nn.LayerNorm.forward(self, x.float())
        return super().forward(x)


class DepthwiseConvNorm(nn.Module):
    """Depthwise 3x3 convolution, zero-padded, without bias, in the place of a norm. (B, H, W, E) -> (B, H, W, E)."""

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        self.conv = ConvNHWC(channels, channels, 3, padding=1, groups=channels, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvolvedLayerNorm(DepthwiseConvNorm):
    """LayerNorm over channels, then the depthwise convolution. (B, H, W, E) -> (B, H, W, E)."""

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__(channels, device, dtype)
        self.norm = BranchNorm(channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class SpatialSoftmax(nn.Module):
    """Softmax over all pixels of each channel. (B, H, W, E) -> (B, H, W, E)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).softmax(dim=1).view_as(x)


# name -> callable (channels, device=, dtype=) giving the module
SSM_OUT_NORMS = {
    "layernorm": BranchNorm,
    "none": lambda channels, device=None, dtype=None: nn.Identity(),
    "dwconv3": DepthwiseConvNorm,
    "cnorm": ConvolvedLayerNorm,
    "softmax": lambda channels, device=None, dtype=None: SpatialSoftmax(),
    "sigmoid": lambda channels, device=None, dtype=None: nn.Sigmoid(),
}
