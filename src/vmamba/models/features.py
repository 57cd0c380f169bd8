"""Backbones of feature maps by name: ours, or any of timm's made like ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import FeatureInfo
from torch import Tensor, nn

from .variants import check_name, list_models

__all__ = ["TimmFeatures", "create_features"]

# What lets timm's Swin and its relatives take images of any size, and, as the official segmentation and detection codes
# do, shift windows in the last stage too, which at 224 pixels is a single window. Other models do not know the words.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"strict_img_size": False, "always_partition": True},
    {"strict_img_size": False},
    {},
)

_OF_FEATURES = ("out_indices", "feature_cls", "pretrained")  # options that say nothing about the names of parameters


class TimmFeatures(nn.Module):
    """A `features_only` model of timm made like our backbones: NCHW, and with `norm` a LayerNorm on each feature.

    Args:
        model: gives a list of features.
        norm: normalise them over their channels.
        least_stride: features of finer grids are left out.
        undecayed: names of the model's parameters that weight decay should leave alone.
    """

    def __init__(
        self, model: nn.Module, norm: bool = True, *, least_stride: int = 1, undecayed: frozenset[str] = frozenset()
    ):
        super().__init__()
        self.model = model
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
        features = self.model(images)
        features = [features[i] for i in self._taken]
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
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
    return TimmFeatures(model, out_norm, least_stride=least_stride, undecayed=_undecayed(name, used, model))


def _create(name: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, features_only=True, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
        raise ValueError(f"{name} gives no features with the options {dict(options)}: {error}") from error


def _create_of_any_size(name: str, options: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the options that it was made with."""
    for extra in _ANY_SIZE[:-1]:
        used = extra | dict(options)
        try:
            return timm.create_model(name, features_only=True, **used), used
        except TypeError:
            continue
        except (ValueError, RuntimeError, AssertionError, AttributeError):
            break  # not for want of a word: made again below, which says why
    used = dict(options)
    return _create(name, used), used


def _undecayed(name: str, options: Mapping[str, Any], features: nn.Module) -> frozenset[str]:
    """The parameters of `features` that the whole model marks; timm's extractors rename them and lose the marks."""
    with torch.random.fork_rng(devices=[]):
        whole = timm.create_model(name, **{key: value for key, value in options.items() if key not in _OF_FEATURES})
    # `layers.0.blocks` of the model is `layers_0.blocks` in one extractor, and behind `model.` in another
    marked = {mark.replace(".", "_") for mark in getattr(whole, "no_weight_decay", set)()}
    names = [name for name, _ in features.named_parameters()]
    return frozenset(name for name in names if name.removeprefix("model.").replace(".", "_") in marked)
