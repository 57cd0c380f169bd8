"""Halving the grid between stages, (B, H, W, C) -> (B, ~H/2, ~W/2, C').

Source: VMamba (arXiv 2401.10166), section 4.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.ops.inference import conv_norm
from vmamba.ops.training import WIDEST_CONV, conv_norm_kept

from .conv import ConvNHWC
from .fusion import fused_dtype, fused_training_dtype, is_plain
from .norm import BranchNorm, StreamNorm, stream_dtype

__all__ = ["DOWNSAMPLES", "ConvDownsample", "OverlappedDownsample", "PatchMerging"]


class PatchMerging(nn.Module):
    """v1 (Swin's): every 2x2 pixels become one of 4C channels, normalised, then projected. Grid: ceil(H/2), ceil(W/2).

    An odd height or width is padded by one row or column of zeros at its end. (The official channels-first code pads
    other axes there; the official channels-last code and this agree.)
    """

    def __init__(self, in_dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        self.norm = BranchNorm(4 * in_dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * in_dim, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # Padded also by nothing: a branch on the parity of the size would tie an exported graph to it.
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # (even row, even column), (odd, even), (even, odd), (odd, odd): the order the released weights were trained in
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class ConvDownsample(nn.Module):
    """v2: convolution 2x2 of stride 2, normalised. Grid: H // 2, W // 2, as in the official code."""

    kernel_size, padding = 2, 0

    def __init__(self, in_dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        self.conv = ConvNHWC(
            in_dim, out_dim, self.kernel_size, stride=2, padding=self.padding, device=device, dtype=dtype
        )
        self.norm = StreamNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class OverlappedDownsample(ConvDownsample):
    """v3: convolution 3x3 of stride 2, zero-padded by 1, normalised. Grid: ceil(H/2), ceil(W/2)."""

    kernel_size, padding = 3, 1

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        if not is_plain(conv, ConvNHWC) or not is_plain(norm, StreamNorm):
            return super().forward(x)
        weights = (conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)
        if (dtype := fused_dtype(self, x)) is not None:
            return conv_norm(x, *weights, dtype, stream_dtype(x, dtype))
        if conv.out_channels <= WIDEST_CONV and (dtype := fused_training_dtype(self, x)) is not None:
            return conv_norm_kept(x.permute(0, 3, 1, 2), *weights, False, dtype, stream_dtype(x, dtype))
        return super().forward(x)


DOWNSAMPLES: dict[str, type[nn.Module]] = {"v1": PatchMerging, "v2": ConvDownsample, "v3": OverlappedDownsample}
