"""UPerNet: pyramid pooling, a feature pyramid and two classifiers on four stage features, for semantic segmentation.

Source: Xiao et al., *Unified Perceptual Parsing for Scene Understanding* (arXiv 1807.10221), in the form in which
VMamba (arXiv 2401.10166) uses it: 512 channels, and an auxiliary fully convolutional head on stage 3.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_state, read_checkpoint
from .features import TimmFeatures, create_features
from .variants import recognise_backbone

__all__ = ["FCNHead", "TimmFeatures", "UPerHead", "UPerNet", "create_upernet", "upernet_from_checkpoint"]

POOL_GRIDS = (1, 2, 3, 6)  # UPerNet, section 3.1; cells a side of the pooled grids
STAGES = 4
AUXILIARY_STAGE = 2  # the third


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, ReLU: (B, C_in, H, W) -> (B, C, H, W)."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class PixelClassifier(nn.Conv2d):
    """The 1x1 convolution from features to class scores."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__(channels, num_classes, 1)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, H, W) at another height and width: bilinear, corners not aligned, without antialiasing."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """Four features, finest first, (B, C_i, H_i, W_i) -> class scores (B, num_classes, H_0, W_0).

    Args:
        in_channels: C_0 to C_3.
        num_classes: scores a pixel.
        channels: width of everything between.
        dropout: share of the channels dropped before the classifier, in training.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 512, dropout: float = 0.1):
        super().__init__()
        *finer, coarsest = in_channels
        self.pyramid = nn.ModuleList(ConvNormAct(coarsest, channels, 1) for _ in POOL_GRIDS)
        self.pyramid_fusion = ConvNormAct(coarsest + len(POOL_GRIDS) * channels, channels, 3)
        self.laterals = nn.ModuleList(ConvNormAct(c, channels, 1) for c in finer)
        self.smoothings = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in finer)
        self.fusion = ConvNormAct(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = PixelClassifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        *finer, coarsest = features
        pooled = [
            resize(conv(F.adaptive_avg_pool2d(coarsest, grid)), coarsest.shape[2:])
            for grid, conv in zip(POOL_GRIDS, self.pyramid, strict=True)
        ]
        levels = [self.pyramid_fusion(torch.cat([coarsest, *pooled], dim=1))]
        for feature, lateral in zip(reversed(finer), reversed(self.laterals), strict=True):
            x = lateral(feature)
            levels.insert(0, x + resize(levels[0], x.shape[2:]))
        finest = levels[0].shape[2:]
        smooth = [conv(level) for conv, level in zip(self.smoothings, levels[:-1], strict=True)] + levels[-1:]
        x = self.fusion(torch.cat([resize(level, finest) for level in smooth], dim=1))
        return self.classifier(self.dropout(x))


class FCNHead(nn.Module):
    """One feature (B, C_in, H, W) -> class scores (B, num_classes, H, W), for the auxiliary loss."""

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, dropout: float = 0.1):
        super().__init__()
        self.block = ConvNormAct(in_channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = PixelClassifier(channels, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.block(feature)))


class UPerNet(nn.Module):
    """Images -> class scores of every pixel.

    Images (B, in_chans, H, W) become scores (B, num_classes, H, W), resized bilinearly from the grid of the first
    stage. In training mode `forward` returns a pair: these, and the scores of the auxiliary head.

    Train on several GPUs with `torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)`, as published: a process holds two
    to four crops in the recipes, too few for statistics of its own. Names and checkpoints stay the same.

    Args:
        backbone: images -> a list of four NCHW features, finest first, with timm's `feature_info`.
        num_classes: scores a pixel.
        channels, auxiliary_channels: widths of the two heads.
        dropout: before both classifiers.

    Raises:
        ValueError: unless the backbone gives four features and there is a class.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 150,
        *,
        channels: int = 512,
        auxiliary_channels: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        in_channels = backbone.feature_info.channels()
        if len(in_channels) != STAGES:
            raise ValueError(f"UPerNet takes {STAGES} features, this backbone gives {len(in_channels)}: {in_channels}")
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be a positive integer, got {num_classes!r}")
        self.num_classes = num_classes
        self.backbone = backbone
        self.decode_head = UPerHead(in_channels, num_classes, channels, dropout)
        self.auxiliary_head = FCNHead(in_channels[AUXILIARY_STAGE], num_classes, auxiliary_channels, dropout)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.backbone(images)
        size = images.shape[2:]
        scores = resize(self.decode_head(features), size)
        if not self.training:
            return scores
        return scores, resize(self.auxiliary_head(features[AUXILIARY_STAGE]), size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters that weight decay should leave alone, under this network's names."""
        return {f"backbone.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping their activations."""
        self.backbone.set_grad_checkpointing(enable)


def create_upernet(
    backbone: str,
    num_classes: int = 150,
    *,
    pretrained: bool = False,
    channels: int = 512,
    auxiliary_channels: int = 256,
    dropout: float = 0.1,
    out_norm: bool = True,
    **backbone_options: Any,
) -> UPerNet:
    """UPerNet on a backbone of timm's registry, ours or any other.

    Args:
        backbone: such as "vmamba_tiny_s1l8" or "convnext_tiny"; its last four features are taken.
        num_classes, channels, auxiliary_channels, dropout: as in `UPerNet`.
        pretrained: start from the backbone's released classification weights.
        out_norm: a LayerNorm on each feature, as the official VMamba, Swin and ConvNeXt have; the same rule for all.
        backbone_options: for `timm.create_model`: `drop_path_rate`, `in_chans`.

    Raises:
        ValueError: if there is no such model, it does not take the options, or it has fewer than four features.
    """
    features = create_features(
        backbone, out_norm=out_norm, pretrained=pretrained, out_indices=STAGES, **backbone_options
    )
    return UPerNet(
        features,
        num_classes,
        channels=channels,
        auxiliary_channels=auxiliary_channels,
        dropout=dropout,
    )


def upernet_from_checkpoint(path: str | os.PathLike, backbone: str | None = None, **backbone_options: Any) -> UPerNet:
    """The UPerNet of a file, in evaluation mode; the number of classes and the widths are the file's.

    Args:
        path: an official segmentation checkpoint, or one of `save_checkpoint`.
        backbone: its name; left out, the one of our variants whose parameters have the file's names and shapes.
        backbone_options: as in `create_upernet`.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`; the file is of no UPerNet, or of another backbone.
    """
    state = read_checkpoint(path)
    try:
        num_classes, channels = state["decode_head.classifier.weight"].shape[:2]
        auxiliary_channels = state["auxiliary_head.classifier.weight"].shape[1]
    except KeyError as error:
        raise ValueError(f"{path} holds no UPerNet: it has no {error}") from error
    backbone = backbone or recognise_backbone(state, "backbone.", path)
    widths = {"channels": channels, "auxiliary_channels": auxiliary_channels}
    model = create_upernet(backbone, num_classes, **widths, **backbone_options)
    load_state(model, state, path)
    return model.eval()
