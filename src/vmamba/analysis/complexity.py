"""What a network costs on paper: parameters and operations for an image of a given size, without running it."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Complexity", "measure_complexity"]


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
    devices = {parameter.device.type for parameter in model.parameters()}
    if not devices <= {"cpu", "meta"}:
        raise ValueError(f"the model must be on the CPU or the meta device, it is on {', '.join(sorted(devices))}")
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        if "meta" in devices:
            model.to_empty(device="cpu")
        image = torch.empty(input_size)
        with FlopCounterMode(display=False) as ours:
            model(image)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.vmamba.ss2d_scan: _twice_the_papers}) as papers:
            model(image)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(parameters, ours.get_total_flops(), papers.get_total_flops() // 2)


def _twice_the_papers(x, p, dt_weight, dt_bias, A, D, *args, out_shape=None, **kwargs) -> int:
    """The papers' figure for a scan and delta's projection, from the shapes; doubled, since the sum is halved."""
    pixels, (K, E, R) = x[0] * x[1] * x[2], dt_weight
    return 2 * pixels * K * E * (9 * A[1] + 1 + R)
