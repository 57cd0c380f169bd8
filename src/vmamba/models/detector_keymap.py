"""Parameter names of detectors: the official code's (mmdetection 3) and ours (torchvision's), one to one, both ways.

Pure functions on names and tensors. The background is the last class there and the first one here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from . import keymap

__all__ = ["is_official", "is_ours", "state_to_official", "state_to_ours"]

_OFFICIAL_BACKBONE, _OUR_BACKBONE = "backbone.", "backbone.body."
# official -> ours; a number is a level of the pyramid or a layer of the mask head
_MODULES = {
    "neck.lateral_convs.#.conv": "backbone.fpn.inner_blocks.#.0",
    "neck.fpn_convs.#.conv": "backbone.fpn.layer_blocks.#.0",
    "rpn_head.rpn_conv": "rpn.head.conv.0.0",
    "rpn_head.rpn_cls": "rpn.head.cls_logits",
    "rpn_head.rpn_reg": "rpn.head.bbox_pred",
    "roi_head.bbox_head.shared_fcs.0": "roi_heads.box_head.fc6",
    "roi_head.bbox_head.shared_fcs.1": "roi_heads.box_head.fc7",
    "roi_head.bbox_head.fc_cls": "roi_heads.box_predictor.cls_score",
    "roi_head.bbox_head.fc_reg": "roi_heads.box_predictor.bbox_pred",
    "roi_head.mask_head.convs.#.conv": "roi_heads.mask_head.#.0",
    "roi_head.mask_head.upsample": "roi_heads.mask_predictor.conv5_mask",
    "roi_head.mask_head.conv_logits": "roi_heads.mask_predictor.mask_fcn_logits",
}
_OUR_SCORES = "roi_heads.box_predictor.cls_score."


def is_official(names: Iterable[str]) -> bool:
    """Whether these are names of an official detector."""
    return any(name.startswith(("rpn_head.", "roi_head.")) for name in names)


def is_ours(names: Iterable[str]) -> bool:
    """Whether these are names of our detector."""
    return any(name.startswith(("rpn.head.", "roi_heads.")) for name in names)


def state_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official detector's state dict under our names, its background class first.

    Raises:
        ValueError: listing the names that have no counterpart.
    """
    backbone, heads = _split(state, _OFFICIAL_BACKBONE)
    renamed = {_OUR_BACKBONE + name: tensor for name, tensor in keymap.state_to_ours(backbone).items()}
    for name, tensor in _rename(heads, _MODULES, "official").items():
        renamed[name] = tensor.roll(1, dims=0) if name.startswith(_OUR_SCORES) else tensor
    return renamed


def state_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our detector's state dict under the official names, its background class last.

    Raises:
        ValueError: listing the names that have no counterpart, those of other backbones than VMamba among them.
    """
    backbone, heads = _split(state, _OUR_BACKBONE)
    heads = {n: tensor.roll(-1, dims=0) if n.startswith(_OUR_SCORES) else tensor for n, tensor in heads.items()}
    renamed = {_OFFICIAL_BACKBONE + name: tensor for name, tensor in keymap.state_to_official(backbone).items()}
    return renamed | _rename(heads, {ours: official for official, ours in _MODULES.items()}, "our")


def _split(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is under the prefix, without it, and the rest."""
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return inside, {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


def _rename(state: Mapping[str, Tensor], modules: Mapping[str, str], whose: str) -> dict[str, Tensor]:
    patterns = [
        (re.compile(re.escape(source).replace(r"\#", r"(\d+)")), target.replace("#", r"\1"))
        for source, target in modules.items()
    ]
    renamed, unknown = {}, []
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        found = [match.expand(target) for pattern, target in patterns if (match := pattern.fullmatch(module))]
        if found and leaf in ("weight", "bias"):
            renamed[f"{found[0]}.{leaf}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"no counterpart for {len(unknown)} {whose} name(s): {', '.join(sorted(unknown))}")
    return renamed
