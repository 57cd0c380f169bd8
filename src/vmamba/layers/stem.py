"""The stem: image (B, in_chans, H, W) -> (B, H/P, W/P, C), P 4. Source: VMamba (arXiv 2401.10166), section 4.3.

P 2 and 1 are ours, for images so small that stages at 1/4 to 1/32 would have no pixels left to scan.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmamba.ops.inference import conv_norm, conv_norm_gelu
from vmamba.ops.training import WIDEST_CONV, conv_norm_kept

from .fusion import fused_dtype, fused_training_dtype, is_plain
from .norm import BranchNorm, StreamNorm, stream_dtype

__all__ = ["STEMS", "STRIDES", "ConvStem", "PatchStem"]

# of the two convolutions of v2, for each patch size
STRIDES = {4: (2, 2), 2: (2, 1), 1: (1, 1)}


def _as_nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _channels_last(image: Tensor) -> Tensor:
    # Copying the image of a few channels once spares copying the far larger maps that come out of the convolution.
    return image.contiguous(memory_format=torch.channels_last)


class PatchStem(nn.Module):
    """v1: PxP patches, projected and normalised. (B, in_chans, H, W) -> (B, H // P, W // P, C), H and W >= P.

    The pixels beyond the last whole patch are left out, as in the official code.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int = 4, device=None, dtype=None):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, device=device, dtype=dtype)
        self.norm = StreamNorm(dim, device=device, dtype=dtype)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(_as_nhwc(self.conv(_channels_last(image))))


class ConvStem(nn.Module):
    """v2: two 3x3 convolutions, each normalised. (B, in_chans, H, W) -> (B, ceil(H/P), ceil(W/P), C).

    For P = 4 both have stride 2, for 2 the first one, for 1 none.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int = 4, device=None, dtype=None):
        super().__init__()
        first, second = STRIDES[patch_size]
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=first, padding=1, **dd)
        self.norm1 = BranchNorm(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, kernel_size=3, stride=second, padding=1, **dd)
        self.norm2 = StreamNorm(dim, **dd)

    def forward(self, image: Tensor) -> Tensor:
        if self._is_usual():
            if (dtype := fused_dtype(self, image)) is not None:
                return self._forward_fused(image, dtype)
            if self.conv2.out_channels <= WIDEST_CONV and (dtype := fused_training_dtype(self, image)) is not None:
                return self._forward_training(image, dtype)
        x = self.act(self.norm1(_as_nhwc(self.conv1(_channels_last(image)))))
        return self.norm2(_as_nhwc(self.conv2(x.permute(0, 3, 1, 2))))

    def _is_usual(self) -> bool:
        return (
            self.conv1.stride == self.conv2.stride == (2, 2)
            and is_plain(self.conv1, nn.Conv2d)
            and is_plain(self.conv2, nn.Conv2d)
            and is_plain(self.norm1, BranchNorm)
            and is_plain(self.norm2, StreamNorm)
            and is_plain(self.act, nn.GELU)
        )

    def _forward_fused(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        conv, norm = self.conv1, self.norm1
        x = conv_norm_gelu(image, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, dtype)
        conv, norm = self.conv2, self.norm2
        out_dtype = stream_dtype(image, dtype)
        return conv_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, dtype, out_dtype)

    def _forward_training(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        conv, norm = self.conv1, self.norm1
        weights = (conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)
        x = conv_norm_kept(image, *weights, True, dtype, dtype)
        conv, norm = self.conv2, self.norm2
        weights = (conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)
        return conv_norm_kept(x.permute(0, 3, 1, 2), *weights, False, dtype, stream_dtype(image, dtype))


STEMS: dict[str, type[nn.Module]] = {"v1": PatchStem, "v2": ConvStem}
