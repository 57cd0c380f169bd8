"""Convolution of channels-last tensors without a copy."""

from __future__ import annotations

from torch import Tensor, nn

from vmamba.ops import depthwise_conv3x3

__all__ = ["ConvNHWC", "DepthwiseConv3x3SiLU"]


class ConvNHWC(nn.Conv2d):
    """`nn.Conv2d` for (B, H, W, C) input and (B, H', W', C') output; parameters as in `nn.Conv2d`.

    The permuted view of a channels-last tensor is an NCHW tensor in `torch.channels_last` memory format, which torch
    convolves as it lies.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConv3x3SiLU(nn.Conv2d):
    """SiLU of a zero-padded depthwise 3x3 convolution, in one kernel where there is one, on (B, H, W, E)."""

    def __init__(self, channels: int, bias: bool = True, device=None, dtype=None):
        super().__init__(channels, channels, 3, padding=1, groups=channels, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv3x3(x, self.weight, self.bias, "silu")
