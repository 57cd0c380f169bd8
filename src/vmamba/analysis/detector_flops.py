"""Multiply-accumulates of a detector, part by part, in the convention of the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..models.detection import MaskRCNN

__all__ = ["detector_macs"]


def detector_macs(
    detector: MaskRCNN, image_size: tuple[int, int] = (1280, 800), *, proposals: int = 1000, masks: int = 100
) -> dict[str, int]:
    """Multiply-accumulates for one image, by part, and their "total". Nothing is computed: shapes alone are followed.

    The papers' convention: one per multiply-accumulate of matrix products and convolutions; for the selective scan 9 a
    state and 1 for the skip of every channel, pixel and route (Mamba); the box head on `proposals` regions and the mask
    head on `masks`, as mmdetection's counter has it; nothing for norms, activations, resampling and NMS.

    Args:
        image_size: H, W that the network sees, padding included.
    """
    heads, channels = detector.roi_heads, detector.backbone.out_channels
    training = detector.training
    detector.eval()
    counts: dict[str, int] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            parameter = next(detector.parameters())

            def like(*shape: int) -> torch.Tensor:
                return torch.empty(shape, dtype=parameter.dtype, device=parameter.device)

            image = like(1, 3, *image_size)
            counts["backbone"], _ = _count(detector.backbone.body, image)
            both, levels = _count(detector.backbone, image)
            counts["pyramid"] = both - counts["backbone"]
            counts["proposals"], _ = _count(detector.rpn.head, list(levels.values()))
            regions = like(proposals, channels, *heads.box_roi_pool.output_size)
            counts["boxes"], _ = _count(lambda x: heads.box_predictor(heads.box_head(x)), regions)
            if detector.has_masks:
                regions = like(masks, channels, *heads.mask_roi_pool.output_size)
                counts["masks"], _ = _count(lambda x: heads.mask_predictor(heads.mask_head(x)), regions)
    finally:
        detector.train(training)
    return counts | {"total": sum(counts.values())}


def _count(part: Callable[[Any], Any], x: Any) -> tuple[int, Any]:
    # the counter counts two operations a multiply-accumulate: what it is told of the scan is doubled to match
    scan = {torch.ops.vmamba.ss2d_scan: lambda *args, out_shape=None, **kwargs: 2 * _scan_macs(*args)}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=scan) as counter:
        result = part(x)
    return counter.get_total_flops() // 2, result


def _scan_macs(x, p, dt_weight, dt_bias, A, *_) -> int:
    pixels, (routes, channels, rank), states = x[0] * x[1] * x[2], dt_weight, A[1]
    return pixels * routes * channels * (9 * states + 1 + rank)  # rank: delta from its low-rank code, a matrix product
