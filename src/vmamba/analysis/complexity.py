"""What a network costs on paper: parameters and operations for an image of a given size, module by module, unrun."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..models.detection import MaskRCNN

__all__ = ["Complexity", "ModuleCount", "count_modules", "detector_macs", "measure_complexity"]


class Complexity(NamedTuple):
    """Figures of one network for one input.

    parameters: how many. flops: operations, two for a multiply-accumulate, as torch counts. macs: multiply-accumulates
    as the VMamba papers count (see `count_modules`).
    """

    parameters: int
    flops: int
    macs: int


class ModuleCount(NamedTuple):
    """Figures of one module of a network, what is inside it included.

    name: its path in the network, "" for the network. kind: its class. parameters, flops, macs: as in `Complexity`.
    """

    name: str
    kind: str
    parameters: int
    flops: int
    macs: int

    @property
    def depth(self) -> int:
        """How many modules it lies in: 0 for the network."""
        return self.name.count(".") + 1 if self.name else 0


def count_modules(
    model: nn.Module, input_size: tuple[int, int, int, int], *, proposals: int = 1000, masks: int = 100
) -> list[ModuleCount]:
    """Count parameters and operations of every module of `model` on an input (B, C, H, W), in evaluation mode.

    Two conventions:
        macs: the papers' "FLOPs". One for each multiply-accumulate of products, convolutions and attention;
            9*B*L*E*N + B*L*E for the scan of every route, which is not halved (Mamba's convention; the second term is
            the skip); and as fvcore, the papers' counter, has it, 5 an element for a LayerNorm or GroupNorm, 4 without
            weights, and 2 and 1 for a BatchNorm.
        flops: two for each multiply-accumulate, 9*N + 2 for a step of the scan, nothing for norms: as torch counts.
    Activations, sums, pooling and resizing count in neither.

    Shapes alone are followed, so the model may be on the CPU or on the meta device, and costs no time to compute. It is
    left as it is: a copy is counted.

    Args:
        model: a network that takes images as one tensor, or a `MaskRCNN`.
        input_size: what the network sees. For a detector, B is 1 and the padding is included.
        proposals, masks: regions that a detector's box head and mask head count on, by default as mmdetection's
            counter has it. NMS and RoIAlign do not count.

    Returns:
        the network, then its modules in the order in which they were made. A module that is called several times has
        the sum; one that is not called, and has no module that is, has no operations.

    Raises:
        ValueError: if the model lies on another device.
    """
    with _shapes_alone(model) as model:
        passes = _detector_passes(model, input_size, proposals, masks) if isinstance(model, MaskRCNN) else None
        image = _like(model, *input_size)
        parts = passes or (lambda: model(image),)
        own = [_own_counts(model, parts, mapping) for mapping in (_TORCH, _PAPERS)]
        counts = []
        for name, module in model.named_modules():
            parameters = sum(parameter.numel() for parameter in module.parameters())
            flops, twice = (sum(n for path, n in count.items() if _is_inside(path, name)) for count in own)
            counts.append(ModuleCount(name, type(module).__name__, parameters, flops, twice // 2))
    return counts


def measure_complexity(model: nn.Module, input_size: tuple[int, int, int, int]) -> Complexity:
    """The figures of the whole network of `count_modules`.

    Raises:
        ValueError: if the model lies on another device.
    """
    _, _, *figures = count_modules(model, input_size)[0]
    return Complexity(*figures)


def detector_macs(
    detector: MaskRCNN, image_size: tuple[int, int] = (1280, 800), *, proposals: int = 1000, masks: int = 100
) -> dict[str, int]:
    """The `macs` of `count_modules` for a detector and one image, by part, and their "total".

    Args:
        image_size: H, W that the network sees, padding included.

    Raises:
        ValueError: if the detector lies neither on the CPU nor on the meta device.
    """
    counts = count_modules(detector, (1, 3, *image_size), proposals=proposals, masks=masks)
    macs = {count.name: count.macs for count in counts}
    parts = {
        "backbone": macs["backbone.body"],
        "pyramid": macs["backbone"] - macs["backbone.body"],
        "proposals": macs["rpn"],
        "boxes": macs["roi_heads.box_head"] + macs["roi_heads.box_predictor"],
    }
    if detector.has_masks:
        parts["masks"] = macs["roi_heads.mask_head"] + macs["roi_heads.mask_predictor"]
    return parts | {"total": macs[""]}


def _detector_passes(
    detector: MaskRCNN, input_size: tuple[int, int, int, int], proposals: int, masks: int
) -> tuple[Callable[[], Any], ...]:
    """What a detector computes for one image but for what depends on the image: NMS, and the choice of regions."""
    heads, channels = detector.roi_heads, detector.backbone.out_channels
    image = _like(detector, *input_size)
    regions = _like(detector, proposals, channels, *heads.box_roi_pool.output_size)
    passes = [
        lambda: detector.rpn.head(list(detector.backbone(image).values())),
        lambda: heads.box_predictor(heads.box_head(regions)),
    ]
    if detector.has_masks:
        areas = _like(detector, masks, channels, *heads.mask_roi_pool.output_size)
        passes.append(lambda: heads.mask_predictor(heads.mask_head(areas)))
    return tuple(passes)


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


def _is_inside(path: str, name: str) -> bool:
    return not name or path == name or path.startswith(f"{name}.")


def _own_counts(model: nn.Module, parts: tuple[Callable[[], Any], ...], mapping: dict[Any, Any]) -> dict[str, int]:
    """What FlopCounterMode counts while the parts run, by the innermost module of `model` at work ("" outside)."""
    counts: dict[str, int] = {}
    # of each module at work: the count when it began, and what the modules that it called have taken
    stack: list[list[int]] = []
    handles = []

    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:

        def begin(module: nn.Module, arguments: Any) -> None:
            stack.append([counter.get_total_flops(), 0])

        def end(name: str) -> None:
            start, inner = stack.pop()
            taken = counter.get_total_flops() - start
            counts[name] = counts.get(name, 0) + taken - inner
            if stack:
                stack[-1][1] += taken

        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(lambda module, arguments, result, name=name: end(name)))
        try:
            for part in parts:
                part()
        finally:
            for handle in handles:
                handle.remove()
    counts[""] = counts.get("", 0) + counter.get_total_flops() - sum(counts.values())
    return counts


# The papers' figures from the shapes, each doubled, since the sum is halved.


def _scan_papers(x, p, dt_weight, dt_bias, A, D, *args, out_shape=None, **kwargs) -> int:
    """A scan and delta's projection."""
    pixels, (K, E, R) = x[0] * x[1] * x[2], dt_weight
    return 2 * pixels * K * E * (9 * A[1] + 1 + R)


def _scan_1d_papers(u, delta, A, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(u) * (9 * A[1] + 1)


def _norm_papers(x, *args, out_shape=None, **kwargs) -> int:
    has_weight = any(isinstance(argument, torch.Size) for argument in args)
    return 2 * math.prod(x) * (5 if has_weight else 4)


def _batch_norm_papers(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x) * (1 if weight is None else 2)


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


_aten = torch.ops.aten
# the CPU's attention, which torch counts on CUDA alone
_TORCH = {_aten._scaled_dot_product_flash_attention_for_cpu: _attention}
_PAPERS = _TORCH | {
    torch.ops.vmamba.ss2d_scan: _scan_papers,
    torch.ops.vmamba.selective_scan: _scan_1d_papers,
    _aten.native_layer_norm: _norm_papers,
    _aten.native_group_norm: _norm_papers,
    _aten.native_batch_norm: _batch_norm_papers,
    # under this name too, or the counter takes it apart
    _aten.native_batch_norm.default: _batch_norm_papers,
}
