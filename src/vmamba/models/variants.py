"""The named models, as timm's registry knows them. Each states only what differs from `VMambaConfig`'s defaults.

Source: VMamba (arXiv 2401.10166v4), tables of architectures and results; the released weights of
https://github.com/MzeroMiko/VMamba.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .checkpoint import checkpoint_filter_fn, file_state
from .vmamba import FeatureGetter, VMamba

__all__ = ["check_name", "list_models", "recognise_backbone"]  # register_model adds the entry points

_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"


def _cfg(**differences: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2401.10166",
        "paper_name": "VMamba: Visual State Space Model",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
        **differences,
    }


def _released(file: str, **figures: float) -> dict[str, Any]:
    # The release files hold a pickled training configuration beside the weights, which timm's own reader refuses:
    # custom_load sends them through VMamba.load_pretrained. `figures` are ImageNet-1K validation figures.
    notes = tuple(f"imagenet1k {name} {value}" for name, value in figures.items())
    return _cfg(url=_RELEASES + file, custom_load=True, notes=notes)


def _small(size: int) -> dict[str, Any]:
    # no released weights: trained from scratch by the user, on whole small images, in ten classes unless told otherwise
    grid = size // 32
    return _cfg(num_classes=10, input_size=(3, size, size), pool_size=(grid, grid), crop_pct=1.0)


default_cfgs = generate_default_cfgs(
    {
        "vanilla_vmamba_tiny.in1k": {
            **_released("%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth", top1=82.171, top5=96.032, loss=0.7879),
            "first_conv": "stem.conv",
        },
        "vanilla_vmamba_small.in1k": {
            **_released("%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", top1=83.461, top5=96.470, loss=0.7161),
            "first_conv": "stem.conv",
        },
        "vanilla_vmamba_base.in1k": {
            **_released("%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth", top1=83.729, top5=96.624, loss=0.6968),
            "first_conv": "stem.conv",
        },
        "vmamba_tiny_s2l5.in1k": _released(
            "%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth", top1=82.489, top5=95.996, loss=0.7805
        ),
        "vmamba_small_s2l15.in1k": _released(
            "%23v2cls/vssm_small_0229_ckpt_epoch_222.pth", top1=83.649, top5=96.594, loss=0.7186
        ),
        "vmamba_base_s2l15.in1k": _released(
            "%23v2cls/vssm_base_0229_ckpt_epoch_237.pth", top1=83.879, top5=96.712, loss=0.7198
        ),
        "vmamba_tiny_s1l8.in1k": _released("%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth", top1=82.6),
        "vmamba_small_s1l20.in1k": _released("%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth", top1=83.339, top5=96.426),
        "vmamba_base_s1l20.in1k": _released(
            "%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth", top1=83.791, top5=96.614, loss=0.7243
        ),
        "vmamba_nano.untrained": _small(32),
        "vmamba_micro.untrained": _small(64),
    }
)


def list_models() -> list[str]:
    """Names of the models that `timm.create_model` knows through this package."""
    return sorted(default_cfgs)


def check_name(name: str) -> None:
    """Refuse a name that is of no model in timm's registry.

    Raises:
        ValueError: naming close ones.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see `vmamba models` and timm.list_models()"
        raise ValueError(f"there is no model {name!r}; {hint}")


def recognise_backbone(state: Mapping[str, Tensor], prefix: str, path: str | os.PathLike) -> str:
    """Which model's backbone has the parameters (names and shapes) that a state dict has under `prefix`; all differ.

    Raises:
        ValueError: none; names the file at `path`, which the state is from, and the models.
    """
    shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in state.items() if name.startswith(prefix)}
    for name in list_models():
        backbone = timm.create_model(name, features_only=True, out_norm=True, device="meta")
        if shapes == {key: tensor.shape for key, tensor in file_state(backbone).items()}:
            return name
    raise ValueError(f"the backbone in {path} is none of {', '.join(list_models())}: name the one it is (timm's name)")


def _create(variant: str, pretrained: bool, architecture: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    options = dict(options)
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": FeatureGetter}
    if options.get("features_only"):
        feature_cfg["out_norm"] = options.pop("out_norm", False)
    return build_model_with_cfg(
        VMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **(architecture | options),
    )


# The first generation: gated, sixteen states, no MLP.
_VANILLA = {
    "d_state": 16,
    "ssm_ratio": 2.0,
    "ssm_conv_bias": True,
    "ssm_gate": True,
    "mlp_ratio": 0.0,
    "stem": "v1",
    "downsample": "v1",
}


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vanilla-VMamba-T, 22.9M parameters."""
    architecture = {**_VANILLA, "depths": (2, 2, 9, 2), "drop_path_rate": 0.2}
    return _create("vanilla_vmamba_tiny", pretrained, architecture, kwargs)


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vanilla-VMamba-S, 44.4M parameters."""
    architecture = {**_VANILLA, "depths": (2, 2, 27, 2), "drop_path_rate": 0.3}
    return _create("vanilla_vmamba_small", pretrained, architecture, kwargs)


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vanilla-VMamba-B, 76.3M parameters."""
    architecture = {**_VANILLA, "depths": (2, 2, 27, 2), "dims": 128, "drop_path_rate": 0.6}
    return _create("vanilla_vmamba_base", pretrained, architecture, kwargs)


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-T[s2l5], 30.7M parameters."""
    architecture = {"depths": (2, 2, 5, 2), "ssm_ratio": 2.0, "drop_path_rate": 0.2}
    return _create("vmamba_tiny_s2l5", pretrained, architecture, kwargs)


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-S[s2l15], 50.1M parameters."""
    architecture = {"depths": (2, 2, 15, 2), "ssm_ratio": 2.0, "drop_path_rate": 0.3}
    return _create("vmamba_small_s2l15", pretrained, architecture, kwargs)


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-B[s2l15], 88.6M parameters."""
    architecture = {"depths": (2, 2, 15, 2), "dims": 128, "ssm_ratio": 2.0, "drop_path_rate": 0.6}
    return _create("vmamba_base_s2l15", pretrained, architecture, kwargs)


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-T[s1l8], 30.2M parameters."""
    return _create("vmamba_tiny_s1l8", pretrained, {"drop_path_rate": 0.2}, kwargs)


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-S[s1l20], 49.0M parameters."""
    architecture = {"depths": (2, 2, 20, 2), "drop_path_rate": 0.3}
    return _create("vmamba_small_s1l20", pretrained, architecture, kwargs)


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-B[s1l20], 86.6M parameters."""
    architecture = {"depths": (2, 2, 20, 2), "dims": 128, "drop_path_rate": 0.5}
    return _create("vmamba_base_s1l20", pretrained, architecture, kwargs)


@register_model
def vmamba_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """For images of about 32 pixels, 1.1M parameters. Ours, without released weights."""
    architecture = {"depths": (1, 1, 2, 1), "dims": 32, "mlp_ratio": 2.0, "img_size": 32}
    return _create("vmamba_nano", pretrained, architecture, kwargs)


@register_model
def vmamba_micro(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """For images of 64 pixels and up, 5.6M parameters. Ours, without released weights."""
    architecture = {"depths": (2, 2, 4, 2), "dims": 48, "drop_path_rate": 0.1, "img_size": 64}
    return _create("vmamba_micro", pretrained, architecture, kwargs)
