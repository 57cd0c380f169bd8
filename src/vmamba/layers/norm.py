"""What may normalise the scan's output (B, H, W, E), by the names a configuration uses.

Source: VMamba (arXiv 2401.10166), the ablation of the normalisation after SS2D.
"""

from __future__ import annotations

from torch import Tensor, nn

from .conv import ConvNHWC

__all__ = ["SSM_OUT_NORMS"]


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
        self.norm = nn.LayerNorm(channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class SpatialSoftmax(nn.Module):
    """Softmax over all pixels of each channel. (B, H, W, E) -> (B, H, W, E)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).softmax(dim=1).view_as(x)


# name -> callable (channels, device=, dtype=) giving the module
SSM_OUT_NORMS = {
    "layernorm": nn.LayerNorm,
    "none": lambda channels, device=None, dtype=None: nn.Identity(),
    "dwconv3": DepthwiseConvNorm,
    "cnorm": ConvolvedLayerNorm,
    "softmax": lambda channels, device=None, dtype=None: SpatialSoftmax(),
    "sigmoid": lambda channels, device=None, dtype=None: nn.Sigmoid(),
}
