"""Models from the official code's arguments: its constructor's, or its YAML configurations.

Source: https://github.com/MzeroMiko/VMamba, whose `forward_type` strings become fields of `VMambaConfig` here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .config import VMambaConfig
from .vmamba import VMamba

__all__ = ["from_official"]

# What the official constructor takes for an argument that is left out.
_DEFAULTS: dict[str, Any] = {
    "patch_size": 4,
    "in_chans": 3,
    "num_classes": 1000,
    "depths": (2, 2, 9, 2),
    "dims": (96, 192, 384, 768),
    "ssm_d_state": 16,
    "ssm_ratio": 2.0,
    "ssm_dt_rank": "auto",
    "ssm_act_layer": "silu",
    "ssm_conv": 3,
    "ssm_conv_bias": True,
    "ssm_drop_rate": 0.0,
    "ssm_init": "v0",
    "forward_type": "v2",
    "mlp_ratio": 4.0,
    "mlp_act_layer": "gelu",
    "mlp_drop_rate": 0.0,
    "gmlp": False,
    "drop_path_rate": 0.1,
    "patch_norm": True,
    "norm_layer": "ln",
    "downsample_version": "v2",
    "patchembed_version": "v1",
    "use_checkpoint": False,
    "posembed": False,
    "imgsize": 224,
    "post_norm": False,
}

# An official YAML's MODEL.VSSM key -> constructor argument, and what the YAML takes when it is left out.
_YAML_VSSM: dict[str, tuple[str, Any]] = {
    "PATCH_SIZE": ("patch_size", 4),
    "IN_CHANS": ("in_chans", 3),
    "DEPTHS": ("depths", (2, 2, 9, 2)),
    "EMBED_DIM": ("dims", 96),
    "SSM_D_STATE": ("ssm_d_state", 16),
    "SSM_RATIO": ("ssm_ratio", 2.0),
    "SSM_DT_RANK": ("ssm_dt_rank", "auto"),
    "SSM_ACT_LAYER": ("ssm_act_layer", "silu"),
    "SSM_CONV": ("ssm_conv", 3),
    "SSM_CONV_BIAS": ("ssm_conv_bias", True),
    "SSM_DROP_RATE": ("ssm_drop_rate", 0.0),
    "SSM_INIT": ("ssm_init", "v0"),
    "SSM_FORWARDTYPE": ("forward_type", "v2"),
    "MLP_RATIO": ("mlp_ratio", 4.0),
    "MLP_ACT_LAYER": ("mlp_act_layer", "gelu"),
    "MLP_DROP_RATE": ("mlp_drop_rate", 0.0),
    "PATCH_NORM": ("patch_norm", True),
    "NORM_LAYER": ("norm_layer", "ln"),
    "DOWNSAMPLE": ("downsample_version", "v2"),
    "PATCHEMBED": ("patchembed_version", "v2"),
    "POSEMBED": ("posembed", False),
    "GMLP": ("gmlp", False),
}
_YAML_WITHOUT_EFFECT = ("SSM_RANK_RATIO",)  # read by withdrawn forward types only

# Forward types that compute one function with different kernels and precisions, and the routes they walk.
_FORWARD_TYPES = dict.fromkeys(("v0", "v0seq", "v01", "v02", "v03", "v04", "v05", "v2", "v3"), "cross2d") | {
    "v051d": "unidi",
    "v052d": "bidi",
    "v052dc": "cascade2d",
}
_OUT_NORMS = {f"_on{name}": name for name in ("none", "dwconv3", "cnorm", "softmax", "sigmoid")}
_INITS = {"v0": "mamba", "v1": "rand", "v2": "zero"}


def from_official(arguments: Mapping[str, Any] | str | os.PathLike) -> VMamba:
    """Our model of what the official code would build.

    Args:
        arguments: keyword arguments of the official constructor, a parsed official YAML configuration (with its MODEL
            section), or the path of one. What is left out takes the official default.

    Raises:
        FileNotFoundError: if there is no such YAML.
        ValueError: naming what it cannot represent and why.
    """
    if not isinstance(arguments, Mapping):
        arguments = _read_yaml(Path(arguments))
    if "MODEL" in arguments:
        arguments = _from_yaml(arguments)
    if unknown := sorted(set(arguments) - set(_DEFAULTS)):
        raise ValueError(f"no official argument {', '.join(unknown)}: there are {', '.join(_DEFAULTS)}")
    given = _DEFAULTS | dict(arguments)
    model = VMamba(_config(given), in_chans=given["in_chans"], num_classes=given["num_classes"])
    model.set_grad_checkpointing(bool(given["use_checkpoint"]))
    return model


def _config(given: Mapping[str, Any]) -> VMambaConfig:
    norm_layer = str(given["norm_layer"]).lower()
    if norm_layer not in ("ln", "ln2d"):
        raise ValueError(f"norm_layer {given['norm_layer']!r} cannot be represented: only ln and ln2d (one function)")
    for name, only in (("patch_size", 4), ("patch_norm", True), ("ssm_drop_rate", 0), ("mlp_drop_rate", 0)):
        if given[name] != only:
            raise ValueError(f"{name}={given[name]!r} cannot be represented: only {only!r}")
    scan = _scan(str(given["forward_type"]))
    if str(given["forward_type"]) in ("v0", "v0seq"):
        if norm_layer == "ln2d":
            raise ValueError("forward_type v0 with norm_layer ln2d is an error in the official code too: use ln or v05")
        # the official v0 has these whatever its arguments say
        scan |= {"ssm_act": "silu", "ssm_conv": 3, "ssm_conv_bias": True, "ssm_init": "mamba"}
    else:
        if given["ssm_init"] not in _INITS:
            raise ValueError(f"ssm_init must be one of {', '.join(_INITS)}, got {given['ssm_init']!r}")
        scan |= {
            "ssm_act": str(given["ssm_act_layer"]).lower(),
            "ssm_conv": max(given["ssm_conv"], 0) if given["ssm_conv"] != 1 else 0,  # below 2 is none
            "ssm_conv_bias": given["ssm_conv_bias"],
            "ssm_init": _INITS[given["ssm_init"]],
        }
    return VMambaConfig(
        depths=given["depths"],
        dims=given["dims"],
        d_state=given["ssm_d_state"],
        dt_rank=given["ssm_dt_rank"],
        ssm_ratio=given["ssm_ratio"],
        mlp_ratio=max(given["mlp_ratio"], 0.0),  # not above 0 is none
        mlp_act=str(given["mlp_act_layer"]).lower(),
        gated_mlp=given["gmlp"],
        stem=given["patchembed_version"],
        downsample=given["downsample_version"],
        post_norm=given["post_norm"],
        pos_embed=given["posembed"],
        img_size=given["imgsize"],
        drop_path_rate=given["drop_path_rate"],
        **scan,
    )


def _scan(forward_type: str) -> dict[str, Any]:
    """The fields that a `forward_type` stands for; its suffixes come off in the order of the official code."""
    rest = forward_type.removesuffix("_no32")  # a precision, not a function
    fields: dict[str, Any] = {"ssm_out_act": rest.endswith("_oact")}
    rest = rest.removesuffix("_oact")
    fields["ssm_gate"] = not rest.endswith("_noz")
    rest = rest.removesuffix("_noz")
    fields["ssm_gate_act"] = not rest.endswith("_nozact")
    rest = rest.removesuffix("_nozact")
    suffix = next((suffix for suffix in _OUT_NORMS if rest.endswith(suffix)), "")
    fields["ssm_out_norm"] = _OUT_NORMS.get(suffix, "layernorm")
    rest = rest.removesuffix(suffix)
    if rest not in _FORWARD_TYPES or (rest in ("v0", "v0seq") and rest != forward_type):
        raise ValueError(
            f"forward_type {forward_type!r} cannot be represented: bases are {', '.join(_FORWARD_TYPES)}, then at most "
            f"one of {', '.join(_OUT_NORMS)}, then _nozact, _noz, _oact, _no32 in this order (v0 and v0seq alone)"
        )
    return fields | {"routes": _FORWARD_TYPES[rest]}


def _read_yaml(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, Mapping) or "MODEL" not in content:
        raise ValueError(f"{path} is no official configuration: it has no MODEL section")
    return content


def _from_yaml(content: Mapping[str, Any]) -> dict[str, Any]:
    """Official constructor arguments from a parsed official YAML. What is not about the network is left aside."""
    if any(content.get("BASE") or ()):
        raise ValueError(f"this configuration builds on {content['BASE']}: merge them into one file")
    model = content["MODEL"] or {}
    if (kind := model.get("TYPE", "vssm")) != "vssm":
        raise ValueError(f"MODEL.TYPE {kind!r} cannot be represented: only vssm")
    vssm = dict(model.get("VSSM") or {})
    for name in _YAML_WITHOUT_EFFECT:
        vssm.pop(name, None)
    if unknown := sorted(set(vssm) - set(_YAML_VSSM)):
        raise ValueError(f"no official setting MODEL.VSSM.{', '.join(unknown)}: there are {', '.join(_YAML_VSSM)}")
    arguments = {argument: vssm.get(name, default) for name, (argument, default) in _YAML_VSSM.items()}
    return arguments | {
        "num_classes": model.get("NUM_CLASSES", 1000),
        "drop_path_rate": model.get("DROP_PATH_RATE", 0.1),
        "imgsize": (content.get("DATA") or {}).get("IMG_SIZE", 224),
        "use_checkpoint": (content.get("TRAIN") or {}).get("USE_CHECKPOINT", False),
    }
