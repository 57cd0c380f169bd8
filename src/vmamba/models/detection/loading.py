"""A detector from a file of weights alone: what it is made of is read off the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor

from ..checkpoint import load_checkpoint, read_checkpoint
from ..detector_keymap import is_ours
from ..variants import list_models
from .mask_rcnn import MaskRCNN, mask_rcnn

__all__ = ["load_detector"]

_BODY = "backbone.body."


def load_detector(file: str | os.PathLike, backbone: str | None = None, **options: Any) -> MaskRCNN:
    """The detector of a checkpoint, official or ours, in evaluation mode on the CPU.

    Number of classes, widths and whether there are masks are the file's.

    Args:
        backbone: a name that timm knows; None for the VMamba that the weights fit.
        options: of `mask_rcnn`; what weights do not tell, such as `min_size` and `anchor_scale`, is as there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no detector, or of another backbone.
    """
    state = read_checkpoint(file)
    if not is_ours(state):
        raise ValueError(f"{file} holds no detector, but a network alone")
    scores = state["roi_heads.box_predictor.cls_score.weight"]
    made = {
        "classes": len(scores) - 1,
        "fc_channels": scores.shape[1],
        "channels": len(state["rpn.head.cls_logits.weight"][0]),
        "masks": any(name.startswith("roi_heads.mask_head.") for name in state),
    }
    detector = mask_rcnn(backbone or _recognised(state, file), **(made | options))
    load_checkpoint(detector, file)
    return detector.eval()


def _recognised(state: Mapping[str, Tensor], file: str | os.PathLike) -> str:
    """The named VMamba whose parameters have these names and shapes."""
    shapes = {name.removeprefix(_BODY): t.shape for name, t in state.items() if name.startswith(_BODY)}
    for name in list_models():
        with torch.device("meta"):
            body = timm.create_model(name, features_only=True, out_norm=True)
        if {key.removeprefix("model."): tensor.shape for key, tensor in body.state_dict().items()} == shapes:
            return name
    raise ValueError(f"the backbone in {file} is none of {', '.join(list_models())}: name it (timm's name)")
