"""Parameter names of a segmentation network: mmsegmentation's (which the official code trains with) and ours.

As `keymap`, which does the backbone's part: pure, strict, both ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from . import keymap

__all__ = ["is_official", "is_ours", "state_to_official", "state_to_ours"]

_BACKBONE = "backbone."
_NUMBER = re.compile(r"\.\d+(?=\.)")
# official -> ours; N stands for a number
_MODULES = {
    "decode_head.psp_modules.N.1.conv": "decode_head.pyramid.N.conv",
    "decode_head.psp_modules.N.1.bn": "decode_head.pyramid.N.norm",
    "decode_head.bottleneck.conv": "decode_head.pyramid_fusion.conv",
    "decode_head.bottleneck.bn": "decode_head.pyramid_fusion.norm",
    "decode_head.lateral_convs.N.conv": "decode_head.laterals.N.conv",
    "decode_head.lateral_convs.N.bn": "decode_head.laterals.N.norm",
    "decode_head.fpn_convs.N.conv": "decode_head.smoothings.N.conv",
    "decode_head.fpn_convs.N.bn": "decode_head.smoothings.N.norm",
    "decode_head.fpn_bottleneck.conv": "decode_head.fusion.conv",
    "decode_head.fpn_bottleneck.bn": "decode_head.fusion.norm",
    "decode_head.conv_seg": "decode_head.classifier",
    "auxiliary_head.convs.0.conv": "auxiliary_head.block.conv",
    "auxiliary_head.convs.0.bn": "auxiliary_head.block.norm",
    "auxiliary_head.conv_seg": "auxiliary_head.classifier",
}
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def is_official(names: Iterable[str]) -> bool:
    """Whether these are names of mmsegmentation's encoder and decoder."""
    return any(name.startswith("decode_head.conv_seg.") for name in names)


def is_ours(names: Iterable[str]) -> bool:
    """Whether these are names of our UPerNet."""
    return any(name.startswith("decode_head.classifier.") for name in names)


def state_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under our names and shapes.

    Raises:
        ValueError: listing the names that have no counterpart, or two names for one parameter.
    """
    return _translate(state, keymap.state_to_ours, _MODULES, "official")


def state_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the official names.

    Raises:
        ValueError: listing the names that have no counterpart, such as those of a backbone that is no VMamba.
    """
    return _translate(state, keymap.state_to_official, {ours: name for name, ours in _MODULES.items()}, "our")


def _translate(
    state: Mapping[str, Tensor],
    translate_backbone: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    modules: Mapping[str, str],
    whose: str,
) -> dict[str, Tensor]:
    backbone = {n.removeprefix(_BACKBONE): tensor for n, tensor in state.items() if n.startswith(_BACKBONE)}
    translated = {_BACKBONE + name: tensor for name, tensor in translate_backbone(backbone).items()}
    unknown = []
    for name, tensor in state.items():
        if name.startswith(_BACKBONE):
            continue
        module, _, leaf = name.rpartition(".")
        number = _NUMBER.search(module)
        general = module if module in modules else _NUMBER.sub(".N", module, count=1)
        if general in modules and leaf in _LEAVES:
            translated[f"{modules[general].replace('.N', number[0] if number else '')}.{leaf}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"no counterpart for {len(unknown)} {whose} name(s): {', '.join(sorted(unknown))}")
    return translated
