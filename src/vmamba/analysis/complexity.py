"""What a network costs on paper: parameters and operations for an image of a given size, without running it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..models.detection import MaskRCNN

__all__ = ["Complexity", "detector_macs", "measure_complexity"]


class Complexity(NamedTuple):
    """Figures of one network for one input.

    parameters: how many. flops: operations, two for a multiply-accumulate, as torch counts. macs: multiply-accumulates
    as the VMamba papers count (see `measure_complexity`).
    """

    parameters: int
    flops: int
    macs: int


def measure_complexity(model: nn.Module, input_size: tuple[int, int, int, int]) -> Complexity:
    """Count `model`'s parameters and its operations on an input (B, C, H, W), in evaluation mode.

    Matrix products, convolutions, attention and scans count; norms, activations and resizing do not. `macs` are the
    papers' figures: one per multiply-accumulate, and 9*B*L*E*N + B*L*E for the scan of every route, which is not halved
    (Mamba's convention; the second term is the skip).

    Shapes alone are followed, so the model may be on the CPU or on the meta device, and costs no time to compute.

    Raises:
        ValueError: if the model lies on another device.
    """
    with _shapes_alone(model) as model:
        image = _like(model, *input_size)
        with FlopCounterMode(display=False) as counter:
            model(image)
        macs, _ = _papers_macs(model, image)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(parameters, counter.get_total_flops(), macs)


def detector_macs(
    detector: MaskRCNN, image_size: tuple[int, int] = (1280, 800), *, proposals: int = 1000, masks: int = 100
) -> dict[str, int]:
    """The `macs` of `measure_complexity` for a detector and one image, by part, and their "total".

    The box head counts on `proposals` regions and the mask head on `masks`, as mmdetection's counter has it; NMS and
    RoIAlign do not count.

    Args:
        image_size: H, W that the network sees, padding included.

    Raises:
        ValueError: if the detector lies neither on the CPU nor on the meta device.
    """
    counts: dict[str, int] = {}
    with _shapes_alone(detector) as detector:
        heads, channels = detector.roi_heads, detector.backbone.out_channels
        image = _like(detector, 1, 3, *image_size)
        counts["backbone"], _ = _papers_macs(detector.backbone.body, image)
        both, levels = _papers_macs(detector.backbone, image)
        counts["pyramid"] = both - counts["backbone"]
        counts["proposals"], _ = _papers_macs(detector.rpn.head, list(levels.values()))
        regions = _like(detector, proposals, channels, *heads.box_roi_pool.output_size)
        counts["boxes"], _ = _papers_macs(lambda x: heads.box_predictor(heads.box_head(x)), regions)
        if detector.has_masks:
            regions = _like(detector, masks, channels, *heads.mask_roi_pool.output_size)
            counts["masks"], _ = _papers_macs(lambda x: heads.mask_predictor(heads.mask_head(x)), regions)
    return counts | {"total": sum(counts.values())}


@contextmanager
def _shapes_alone(model: nn.Module) -> Iterator[Any]:
    """A copy of the model in evaluation mode, under a mode in which nothing is computed."""
    devices = {parameter.device.type for parameter in model.parameters()}
    if not devices <= {"cpu", "meta"}:
        raise ValueError(f"the model must be on the CPU or the meta device, it is on {', '.join(sorted(devices))}")
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        if "meta" in devices:
            model.to_empty(device="cpu")
        yield model


def _like(model: nn.Module, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=next(model.parameters()).dtype)


def _papers_macs(part: Callable[[Any], Any], x: Any) -> tuple[int, Any]:
    """Multiply-accumulates of `part` on x as the papers count, and its result."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.vmamba.ss2d_scan: _twice_the_papers}) as counter:
        result = part(x)
    return counter.get_total_flops() // 2, result


def _twice_the_papers(x, p, dt_weight, dt_bias, A, D, *args, out_shape=None, **kwargs) -> int:
    """The papers' figure for a scan and delta's projection, from the shapes; doubled, since the sum is halved."""
    pixels, (K, E, R) = x[0] * x[1] * x[2], dt_weight
    return 2 * pixels * K * E * (9 * A[1] + 1 + R)
