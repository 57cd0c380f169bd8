"""Convolution of channels-last tensors without a copy."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ConvNHWC"]


class ConvNHWC(nn.Conv2d):
    """`nn.Conv2d` for (B, H, W, C) input and (B, H', W', C') output; parameters as in `nn.Conv2d`.

    The permuted view of a channels-last tensor is an NCHW tensor in `torch.channels_last` memory format, which torch
    convolves as it lies.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
