"""A detector from a file of weights alone: what it is made of is read off the weights."""

from __future__ import annotations

import os
from typing import Any

from ..checkpoint import load_state, read_checkpoint
from ..detector_keymap import is_ours
from ..variants import recognise_backbone
from .mask_rcnn import MaskRCNN, mask_rcnn

__all__ = ["load_detector"]


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
    detector = mask_rcnn(backbone or recognise_backbone(state, "backbone.body.", file), **(made | options))
    load_state(detector, state, file)
    return detector.eval()
