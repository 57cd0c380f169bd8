"""Backbones of feature maps by name: ours, or any of timm's made like ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed, LayerNorm2d, PatchEmbed
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.layers.non_local_attn import BilinearAttnTransform
from timm.models import FeatureInfo
from torch import Tensor, nn

from .variants import check_name, list_models

__all__ = ["ImageSides", "TimmFeatures", "create_features"]

# What lets timm's models take images of any size: Swin and its relatives, which then, as the official segmentation and
# detection codes do, shift windows in the last stage too, which at 224 pixels is a single window; the others with patch
# embeddings; ViTs, which resample their positions; NaFlexViT. Other models do not know the words.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"strict_img_size": False, "always_partition": True},
    {"strict_img_size": False},
    {"dynamic_img_size": True},
    {"dynamic_img_pad": True},
    {},
)

_OF_FEATURES = ("out_indices", "feature_cls", "pretrained")  # options that say nothing about the names of parameters


@dataclass(frozen=True)
class ImageSides:
    """The heights and widths of images that a model takes.

    Args:
        multiple: of so many pixels, height and width.
        short: or so many fewer at most, which the model's strided convolutions, rounding up, do not notice.
        least: at least so many pixels, a multiple too.
        largest: height and width above which the model has no positions; None: there is no limit.
        made_for: the model's name, for the message that an image is too large.
    """

    multiple: tuple[int, int] = (1, 1)
    short: int = 0
    least: int = 1
    largest: tuple[int, int] | None = None
    made_for: str = "the backbone"

    def padding(self, height: int, width: int) -> tuple[int, int]:
        """Rows at the bottom and columns at the right that make an image one that the model takes.

        Raises:
            ValueError: it is larger than any such.
        """
        if self.largest is not None and (height > self.largest[0] or width > self.largest[1]):
            large = "{} x {}".format(*self.largest)
            raise ValueError(
                f"{self.made_for} takes images of at most {large} pixels, not of {height} x {width}: look through "
                f"windows or train on crops of {large}, make it for larger images where it takes img_size=, or take a "
                "backbone for any size, such as Swin or ConvNeXt"
            )
        bottom, right = (
            self._missing(side, multiple) for side, multiple in zip((height, width), self.multiple, strict=True)
        )
        return bottom, right

    def _missing(self, side: int, multiple: int) -> int:
        if side < self.least:
            return self.least - side
        rest = -side % multiple
        return rest if rest > self.short else 0


# What models take that have no patch embedding which tells, by the module of timm that their class is from; measured at
# every side of 60 to 130 pixels.
SIDES = {
    "csatv2": ImageSides((8, 8), least=64),  # a discrete cosine transform of blocks, and a stage of stride 64
    "dla": ImageSides((32, 32), short=1),  # pooling rounds down beside convolutions that round up
    "hieradet_sam2": ImageSides((32, 32), short=3),
    "hrnet": ImageSides((32, 32), short=3),  # coarse branches are enlarged two-fold and added to fine ones
    "inception_resnet_v2": ImageSides(least=75),  # convolutions without padding
    "inception_v3": ImageSides(least=75),
    "inception_v4": ImageSides(least=75),
    "tresnet": ImageSides((4, 4)),  # starts by folding blocks of pixels into channels
}
_COARSEST = 32  # stride of the last stage of the models that divide every stage into windows or grids

# Modules of timm that mark their models as of one image size although their features can be of any.
_TAKE_ANY = ("crossvit", "efficientvit_msra", "sequencer", "swiftformer", "swin_transformer_v2_cr", "twins", "xcit")
_TAKE_SMALLER = ("mvitv2",)  # its tables of relative positions are long enough for smaller images, too


class TimmFeatures(nn.Module):
    """A `features_only` model of timm made like our backbones: NCHW, and with `norm` a LayerNorm on each feature.

    Images (B, C, H, W) of sides that the model does not take are padded with zeros at the right and the bottom, as
    Swin's official segmentation and detection codes do, and the features cut to their share of the image, rounded up:
    (B, C_i, ceil(H / stride_i), ceil(W / stride_i)).

    Args:
        model: gives a list of features.
        norm: normalise them over their channels.
        least_stride: features of finer grids are left out.
        undecayed: names of the model's parameters that weight decay should leave alone.
        sides: what images it takes.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: bool = True,
        *,
        least_stride: int = 1,
        undecayed: frozenset[str] = frozenset(),
        sides: ImageSides | None = None,
    ):
        super().__init__()
        self.model = model
        self.sides = sides or ImageSides()
        strides = model.feature_info.reduction()
        self._taken = [i for i, stride in enumerate(strides) if stride >= least_stride]
        self.feature_info = FeatureInfo(model.feature_info.get_dicts(), tuple(self._taken))
        # Swin and others give (B, H, W, C) and say so
        self.channels_last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
        channels = self.feature_info.channels()
        self.norms = nn.ModuleList(LayerNorm2d(c) if norm else nn.Identity() for c in channels)
        self._undecayed = undecayed

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """What the model marks as not to be decayed, under this module's names."""
        return {f"model.{name}" for name in self._undecayed}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the model's own."""
        # one of timm's wrappers does not pass it on
        target = self.model if hasattr(self.model, "set_grad_checkpointing") else self.model.model
        target.set_grad_checkpointing(enable)

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[2:]
        bottom, right = self.sides.padding(height, width)
        padded = F.pad(images, (0, right, 0, bottom)) if bottom or right else images
        features = self.model(padded)
        features = [features[i] for i in self._taken]
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        if bottom or right:
            # what lies beyond has seen nothing but padding, and would shift everything that is resized to the image
            strides = self.feature_info.reduction()
            features = [
                feature[..., : -(-height // stride), : -(-width // stride)]
                for feature, stride in zip(features, strides, strict=True)
            ]
        return [norm(feature) for norm, feature in zip(self.norms, features, strict=True)]


def create_features(name: str, *, out_norm: bool = True, least_stride: int = 1, **options: Any) -> nn.Module:
    """A backbone of timm's registry, ours or any other: images (B, C, H, W) -> a list of NCHW features.

    Args:
        name: such as "vmamba_tiny_s1l8" or "swin_tiny_patch4_window7_224".
        out_norm: a LayerNorm on each feature, as the official VMamba, Swin and ConvNeXt have for dense prediction; the
            same rule for all.
        least_stride: leave out features of finer grids than this (of models other than ours).
        options: for `timm.create_model`: `out_indices`, `drop_path_rate`, `pretrained`, ...

    Raises:
        ValueError: there is no such model, or it does not take the options.
    """
    check_name(name)
    if name.partition(".")[0] in list_models():
        return _create(name, {"out_norm": out_norm} | options)
    model, used = _create_of_any_size(name, options)
    with torch.random.fork_rng(devices=[]):
        whole = timm.create_model(name, **{key: value for key, value in used.items() if key not in _OF_FEATURES})
    return TimmFeatures(
        model,
        out_norm,
        least_stride=least_stride,
        undecayed=_undecayed(whole, model),
        sides=_sides(name, whole, used),
    )


def _create(name: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, features_only=True, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, IndexError) as error:
        raise ValueError(f"{name} gives no features with the options {dict(options)}: {error}") from error


def _create_of_any_size(name: str, options: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the options that it was made with."""
    for extra in _ANY_SIZE[:-1]:
        used = extra | dict(options)
        try:
            return timm.create_model(name, features_only=True, **used), used
        except TypeError:
            continue
        except (ValueError, RuntimeError, AssertionError, AttributeError, IndexError):
            break  # not for want of a word: made again below, which says why
    used = dict(options)
    return _create(name, used), used


def _undecayed(whole: nn.Module, features: nn.Module) -> frozenset[str]:
    """The parameters of `features` that the whole model marks; timm's extractors rename them and lose the marks."""
    # `layers.0.blocks` of the model is `layers_0.blocks` in one extractor, and behind `model.` in another
    marked = {mark.replace(".", "_") for mark in getattr(whole, "no_weight_decay", set)()}
    names = [name for name, _ in features.named_parameters()]
    return frozenset(name for name in names if name.removeprefix("model.").replace(".", "_") in marked)


def _sides(name: str, whole: nn.Module, options: Mapping[str, Any]) -> ImageSides:
    """What images the whole model takes, made with these options."""
    family = type(whole).__module__.rpartition(".")[2]
    if family in SIDES:
        return SIDES[family]
    if partitions := [m.partition_size for m in whole.modules() if hasattr(m, "partition_size")]:
        return ImageSides(tuple(_COARSEST * max(cells) for cells in zip(*partitions, strict=True)), short=1)
    embedding = next((m for m in whole.modules() if isinstance(m, PatchEmbed | HybridEmbed)), None)
    if embedding is not None and not embedding.strict_img_size:
        return ImageSides((1, 1) if embedding.dynamic_img_pad else tuple(embedding.feat_ratio(as_scalar=False)))
    one_size = whole.pretrained_cfg.get("fixed_input_size") and not options.get("dynamic_img_size")
    if family == "byobnet" and not (one_size and _has(whole, BottleneckAttn | LambdaLayer)):
        return _sides_of_blocks(whole)
    if not one_size or family in _TAKE_ANY:
        return ImageSides()
    size = options.get("img_size") or whole.pretrained_cfg["input_size"][1:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    return ImageSides((1, 1) if family in _TAKE_SMALLER else size, largest=size, made_for=name)


def _sides_of_blocks(whole: nn.Module) -> ImageSides:
    """What a model takes of timm's ByobNet, which is made of blocks of many kinds."""
    if blocks := [m.block_size for m in whole.modules() if isinstance(m, HaloAttn | BilinearAttnTransform)]:
        return ImageSides((_COARSEST * max(blocks),) * 2, short=2)
    # a stage that is pooled, rounding down, beside a shortcut that rounds up
    pools = [m for m in whole.modules() if isinstance(m, nn.AvgPool2d)]
    if any(not pool.ceil_mode and pool.stride in (2, (2, 2)) for pool in pools):
        return ImageSides((_COARSEST, _COARSEST), short=1)
    return ImageSides()


def _has(model: nn.Module, kind: Any) -> bool:
    return any(isinstance(module, kind) for module in model.modules())
