"""Parameter names: the official code's and ours, mapped one to one, both ways.

Pure functions on names and shapes. What has no counterpart is an error; nothing is guessed. Older official names are
understood on the way in and never written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["is_official", "is_ours", "state_to_official", "state_to_ours"]

# official -> ours, inside a block; the same for every architecture
_BLOCK = {
    "norm": "norm",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "op.in_proj": "ssm.in_proj",
    "op.conv2d": "ssm.conv",
    "op.x_proj_weight": "ssm.x_proj_weight",
    "op.dt_projs_weight": "ssm.dt_weight",
    "op.dt_projs_bias": "ssm.dt_bias",
    "op.A_logs": "ssm.A_log",
    "op.Ds": "ssm.D",
    "op.out_proj": "ssm.out_proj",
}
# The official names are positions in a Sequential, so these depend on what stands there.
_STEM = {"patch": {"0": "conv", "2": "norm"}, "conv": {"0": "conv1", "2": "norm1", "5": "conv2", "7": "norm2"}}
_DOWNSAMPLE = {"merging": {"norm": "norm", "reduction": "reduction"}, "conv": {"1": "conv", "3": "norm"}}
_OUT_NORM = {"layernorm": {"": ""}, "dwconv3": {".1": ".conv"}, "cnorm": {".0": ".norm", ".2": ".conv"}}

# Names that the official code has used before, and the present one.
_ALIASES = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"\.op\.x_proj\.weight$", ".op.x_proj_weight"),
    (r"\.op\.dt_projs\.(weight|bias)$", r".op.dt_projs_\1"),
)
# Patch merging written as a Sequential; only there is a parameter at position 2.
_MERGING_ALIASES = ((r"\.downsample\.1\.", ".downsample.norm."), (r"\.downsample\.2\.", ".downsample.reduction."))

_ROUTE_COUNT = 4  # K


class _Structure(NamedTuple):
    """The choices that decide which name stands where, and how many of each there are."""

    stem: str
    downsample: str
    out_norm: str
    stages: int
    blocks: int


def is_official(names: Iterable[str]) -> bool:
    """Whether these are names of the official network."""
    return any(name.startswith(("layers.", "patch_embed.")) for name in names)


def is_ours(names: Iterable[str]) -> bool:
    """Whether these are names of our network."""
    return any(name.startswith(("stages.", "stem.")) for name in names)


def state_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under our names and shapes, `out_norms.{i}` for a backbone's `outnorm{i}`.

    Raises:
        ValueError: listing the names that have no counterpart, or two names for one parameter.
    """
    canonical = _canonical(state)
    renamed = _rename(canonical, _modules(_structure(canonical, "layers", "patch_embed.5.", "op.out_norm")), "official")
    return {name: _our_shape(name, tensor) for name, tensor in renamed.items()}


def state_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the official names, as the official code of today saves it.

    Raises:
        ValueError: listing the names that have no counterpart.
    """
    modules = _modules(_structure(state, "stages", "stem.conv2.", "ssm.out_norm"))
    return _rename(state, {ours: official for official, ours in modules.items()}, "our")


def _canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under the official code's present names."""
    aliases = _ALIASES
    if any(".downsample.2." in name for name in state):
        aliases += _MERGING_ALIASES
    canonical: dict[str, Tensor] = {}
    for name, tensor in state.items():
        present = name
        for pattern, replacement in aliases:
            present = re.sub(pattern, replacement, present)
        if present in canonical:
            raise ValueError(f"two tensors for one parameter: {name} and another name of {present}")
        canonical[present] = tensor
    return canonical


def _structure(names: Iterable[str], stages: str, conv_stem: str, out_norm: str) -> _Structure:
    names = list(names)

    def has(part: str) -> bool:
        return any(part in name for name in names)

    if has(f"{out_norm}.2.") or has(f"{out_norm}.norm."):
        norm = "cnorm"
    elif has(f"{out_norm}.1.") or has(f"{out_norm}.conv."):
        norm = "dwconv3"
    else:
        norm = "layernorm"
    stage_numbers = [int(m[1]) for name in names if (m := re.match(rf"{stages}\.(\d+)\.", name))]
    block_numbers = [int(m[1]) for name in names if (m := re.match(rf"{stages}\.\d+\.blocks\.(\d+)\.", name))]
    return _Structure(
        stem="conv" if has(conv_stem) else "patch",
        downsample="merging" if has(".downsample.reduction.") else "conv",
        out_norm=norm,
        stages=max(stage_numbers, default=-1) + 1,
        blocks=max(block_numbers, default=-1) + 1,
    )


def _modules(structure: _Structure) -> dict[str, str]:
    """Official -> our names of everything that holds parameters in a network of that structure."""
    modules = {"pos_embed": "pos_embed", "classifier.norm": "head.norm", "classifier.head": "head.fc"}
    for official, ours in _STEM[structure.stem].items():
        modules[f"patch_embed.{official}"] = f"stem.{ours}"
    block = _BLOCK | {f"op.out_norm{a}": f"ssm.out_norm{b}" for a, b in _OUT_NORM[structure.out_norm].items()}
    for i in range(structure.stages):
        modules[f"outnorm{i}"] = f"out_norms.{i}"
        for j in range(structure.blocks):
            for official, ours in block.items():
                modules[f"layers.{i}.blocks.{j}.{official}"] = f"stages.{i}.blocks.{j}.{ours}"
        # theirs ends a stage, ours begins the next
        for official, ours in _DOWNSAMPLE[structure.downsample].items():
            modules[f"layers.{i}.downsample.{official}"] = f"stages.{i + 1}.downsample.{ours}"
    return modules


def _rename(state: Mapping[str, Tensor], modules: Mapping[str, str], whose: str) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if name in modules:  # a bare parameter
            renamed[modules[name]] = tensor
        elif leaf in ("weight", "bias") and module in modules:
            renamed[f"{modules[module]}.{leaf}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"no counterpart for {len(unknown)} {whose} name(s): {', '.join(sorted(unknown))}")
    return renamed


def _our_shape(name: str, tensor: Tensor) -> Tensor:
    """Parameters that official versions have stored in several shapes, in ours."""
    if name.endswith(("x_proj_weight", "dt_weight")) and tensor.shape[0] != _ROUTE_COUNT:
        return tensor.reshape(_ROUTE_COUNT, -1, tensor.shape[1])  # as the weight of a grouped 1x1 convolution
    if name.endswith("dt_bias") and tensor.ndim == 1:
        return tensor.reshape(_ROUTE_COUNT, -1)
    is_linear = name.endswith(("proj.weight", "fc1.weight", "fc2.weight", "reduction.weight"))
    if is_linear and tensor.shape[2:].numel() == 1:
        return tensor.flatten(1)  # as the weight of a 1x1 convolution
    return tensor
