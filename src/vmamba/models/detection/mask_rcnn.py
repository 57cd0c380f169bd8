"""Mask R-CNN with a feature pyramid on VMamba, or on any backbone of timm; as Faster R-CNN without the masks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ..features import ImageSides, create_features
from .parts import (
    DetectionTransform,
    PyramidAnchors,
    PyramidRoIAlign,
    RegionHeads,
    RegionPredictor,
    RegionProposals,
    RegionProposalsHead,
)

__all__ = ["MaskRCNN", "PyramidBackbone", "mask_rcnn"]

_BOX_BINS, _MASK_BINS = 7, 14  # cells of a region, each way, that the box head and the mask head see
_DIVISIBLE = 32  # height and width of a batch are padded to multiples of this, as published
_FINEST_STRIDE = 4  # features finer than this are left out: the published detectors start here


class PyramidBackbone(nn.Module):
    """Stage features of a backbone -> an FPN with one level a stage, and one more of half the size.

    Images (B, C, H, W) -> {"0": (B, channels, H/4, W/4), "1": ..., "pool": ...}.

    Args:
        body: gives a list of features, has timm's `feature_info`; NHWC features are told by its `output_fmt`.
        channels: of every level.

    Raises:
        ValueError: if the body's strides are no pyramid.
    """

    def __init__(self, body: nn.Module, channels: int):
        super().__init__()
        strides = body.feature_info.reduction()
        self._taken = [i for i, stride in enumerate(strides) if stride >= _FINEST_STRIDE]
        self.strides = tuple(strides[i] for i in self._taken)
        if not self.strides or any(b != 2 * a for a, b in zip(self.strides, self.strides[1:], strict=False)):
            raise ValueError(
                f"the backbone's features have strides {list(strides)}, but a pyramid needs each to be twice the one "
                "before: take a hierarchical backbone, or choose features with backbone_kwargs={'out_indices': ...}"
            )
        in_channels = [body.feature_info.channels()[i] for i in self._taken]
        self.body = body
        self.fpn = FeaturePyramidNetwork(in_channels, channels, extra_blocks=LastLevelMaxPool())
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        self.out_channels = channels
        self._channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return self.fpn(OrderedDict((str(level), features[i]) for level, i in enumerate(self._taken)))


class MaskRCNN(GeneralizedRCNN):
    """torchvision's detector: a list of images (C, H, W) in [0, 1] -> detections, or losses in training.

    In evaluation each image's result is a dict of `boxes` (N, 4) x1 y1 x2 y2 in pixels, `labels` (N,) int64 from 1,
    `scores` (N,) and, with a mask head, `masks` (N, 1, H, W) bool; the highest score first. In training `targets` is a
    list of dicts of `boxes`, `labels` and `masks` (N, H, W), and the result a dict of losses to add up.

    Raises:
        ValueError: in training, for targets that are missing or do not fit, naming the target.
    """

    classes: int

    @property
    def has_masks(self) -> bool:
        """Whether there is a mask head."""
        return self.roi_heads.has_mask()

    def forward(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None):
        """As torchvision's, but nothing waits for a GPU before the backbone's kernels are on their way to it."""
        if self.training:
            self._check_parts(targets, len(images))
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, resized = self.transform(images, targets)
        features = self.backbone(batch.tensors)
        if self.training:
            self._check_values(targets)
        proposals, proposal_losses = self.rpn(batch, features, resized)
        found, losses = self.roi_heads(features, proposals, batch.image_sizes, resized)
        if self.training:
            return losses | proposal_losses
        return self.transform.postprocess(found, batch.image_sizes, original_sizes)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters that weight decay should leave alone, under this network's names."""
        return {f"backbone.body.{name}" for name in getattr(self.backbone.body, "no_weight_decay", set)()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping their activations."""
        self.backbone.body.set_grad_checkpointing(enable)

    def _check_parts(self, targets: Sequence[Mapping[str, Tensor]] | None, images: int) -> None:
        if targets is None or len(targets) != images:
            raise ValueError(f"training needs a target for every image: {images} images, {len(targets or ())} targets")
        needed = {"boxes", "labels"} | ({"masks"} if self.has_masks else set())
        for i, target in enumerate(targets):
            if missing := sorted(needed - set(target)):
                hint = ": without masks, build the detector with masks=False" if missing == ["masks"] else ""
                raise ValueError(f"target {i} has no {', '.join(missing)}{hint}")

    def _check_values(self, targets: Sequence[Mapping[str, Tensor]]) -> None:
        every_box, every_label = (torch.cat([target[name] for target in targets]) for name in ("boxes", "labels"))
        # one wait for a GPU, where each target by itself took three
        wrong = (every_box[:, 2:] <= every_box[:, :2]).any(dim=1) | (every_label < 1) | (every_label > self.classes)
        if not wrong.any():
            return
        for i, target in enumerate(targets):
            boxes, labels = target["boxes"], target["labels"]
            if (flat := (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)).any():
                raise ValueError(f"target {i} has a box without an area: {boxes[flat][0].tolist()} (x1 y1 x2 y2)")
            if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= self.classes:
                raise ValueError(
                    f"labels must be 1 to {self.classes} (0 is the background), target {i} has {int(labels.min())} to "
                    f"{int(labels.max())}"
                )


def mask_rcnn(
    backbone: str | nn.Module = "vmamba_tiny_s1l8",
    classes: int = 80,
    *,
    masks: bool = True,
    channels: int = 256,
    fc_channels: int = 1024,
    anchor_scale: float = 8.0,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    score_threshold: float = 0.05,
    max_detections: int = 100,
    out_norm: bool = True,
    backbone_kwargs: Mapping[str, Any] | None = None,
) -> MaskRCNN:
    """Mask R-CNN as the official VMamba detectors are, with random weights where none are asked for.

    Args:
        backbone: a name that timm knows, or a module that gives a list of features and has timm's `feature_info`.
        classes: number of object classes; the background does not count.
        masks: False for a detector of boxes alone (Faster R-CNN).
        channels: of the pyramid and the convolutions on it. fc_channels: of the box head's two layers.
        anchor_scale: side of the square anchor of a level, in that level's pixels; 8 is 32 image pixels at stride 4.
        min_size, max_size: pixels of the short side and at most of the long side that the detector works at; several
            `min_size` are drawn from in training, and the last one is evaluated at.
        score_threshold, max_detections: what is reported, an image.
        out_norm: a LayerNorm on each feature of a backbone made by name, as the official detectors have on VMamba, Swin
            and ConvNeXt; the same rule for all.
        backbone_kwargs: for `timm.create_model`, such as `{"pretrained": True}` or `{"drop_path_rate": 0.2}`.

    Raises:
        ValueError: for an unknown backbone, one without a pyramid of features, one of smaller images than
            `max_size`, or a value that cannot be.
    """
    sizes = (min_size,) if isinstance(min_size, int) else tuple(min_size)
    _check(isinstance(classes, int) and classes >= 1, "classes", classes, "a positive number of object classes")
    _check(bool(sizes) and min(sizes) >= 1, "min_size", min_size, "positive")
    _check(max_size >= max(sizes, default=1), "max_size", max_size, f"at least min_size ({min_size})")
    _check(0 <= score_threshold < 1, "score_threshold", score_threshold, "in [0, 1)")
    _check(max_detections >= 1, "max_detections", max_detections, "at least 1")
    _check(anchor_scale > 0, "anchor_scale", anchor_scale, "positive")
    if isinstance(backbone, nn.Module):
        _check(not backbone_kwargs, "backbone_kwargs", backbone_kwargs, "left out when backbone is a module")
        body = backbone
    else:
        body = create_features(
            backbone, **({"out_norm": out_norm, "least_stride": _FINEST_STRIDE} | dict(backbone_kwargs or {}))
        )
        _check_sizes(backbone, body, max_size)
    pyramid = PyramidBackbone(body, channels)
    strides = pyramid.strides

    head = TwoMLPHead(channels * _BOX_BINS**2, fc_channels)
    for layer in (head.fc6, head.fc7):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    mask_parts: tuple[nn.Module, ...] = ()
    if masks:
        predictor = MaskRCNNPredictor(channels, channels, classes)
        nn.init.zeros_(predictor.conv5_mask.bias)
        nn.init.zeros_(predictor.mask_fcn_logits.bias)
        mask_parts = PyramidRoIAlign(strides, _MASK_BINS), MaskRCNNHeads(channels, (channels,) * 4, 1), predictor
    anchors = PyramidAnchors((*strides, 2 * strides[-1]), anchor_scale)
    detector = MaskRCNN(
        pyramid,
        RegionProposals(anchors, RegionProposalsHead(channels, anchors.num_anchors_per_location()[0])),
        RegionHeads(
            PyramidRoIAlign(strides, _BOX_BINS),
            head,
            RegionPredictor(fc_channels, classes),
            *mask_parts,
            score_threshold=score_threshold,
            max_detections=max_detections,
        ),
        DetectionTransform(
            sizes, max_size, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD), size_divisible=_DIVISIBLE
        ),
    )
    detector.classes = classes
    return detector


def _check_sizes(name: str, body: nn.Module, max_size: int) -> None:
    """Refuse a backbone whose positions end before the images that the detector works at."""
    largest = getattr(body, "sides", ImageSides()).largest  # ours have none and no limit
    if largest is None:
        return
    limit = min(largest) // _DIVISIBLE * _DIVISIBLE
    if max_size > limit:
        raise ValueError(
            f"{name} takes images of at most {largest[0]} x {largest[1]} pixels, but the detector works at up to "
            f"{max_size}: give min_size and max_size of at most {limit}, make it for larger images where it takes "
            "backbone_kwargs={'img_size': ...}, or take a backbone for any size, such as Swin or ConvNeXt"
        )


def _check(fits: bool, name: str, value: object, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
