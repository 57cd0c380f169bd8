from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from vmamba.ops.reference import selective_scan_reference, ss2d_scan_reference

from .oracle import ss2d_problem

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


@pytest.mark.parametrize("N", [1, 16])
def test_selective_scan_is_the_official_one_with_every_gradient(golden, N):
    tensors = load_file(golden / "ops.safetensors")
    case = {name: tensors[f"s6.N{N}.{name}"].requires_grad_() for name in NAMES}
    y, _ = selective_scan_reference(*(case[name] for name in NAMES), delta_softplus=True)
    assert (y - tensors[f"s6.N{N}.out"]).norm() <= 1e-10 * y.norm()
    gradients = torch.autograd.grad(y, list(case.values()), tensors[f"s6.N{N}.grad_out"])
    for name, gradient in zip(NAMES, gradients, strict=True):
        wanted = tensors[f"s6.N{N}.grad_{name}"]
        assert (gradient - wanted).norm() <= 1e-10 * wanted.norm(), name


def test_constant_decay_in_closed_form():
    # delta = 1, B = C = u = 1, A = log(1/2): h_l = 2 - 2^-l
    ones = torch.ones(1, 1, 20, dtype=torch.float64)
    A = torch.full((1, 1), 0.5, dtype=torch.float64).log()
    y, last_state = selective_scan_reference(ones, ones, A, ones[:, None], ones[:, None])
    wanted = 2 - 0.5 ** torch.arange(20, dtype=torch.float64)
    torch.testing.assert_close(y[0, 0], wanted)
    torch.testing.assert_close(last_state[0, 0, 0], wanted[-1])


def test_two_dimensional_scan_of_one_pixel_is_the_sum_of_its_routes():
    x, p, dt_weight, dt_bias, A, D = ss2d_problem(1, 1, 1, 3, N=1, R=2)
    code, B, C = p.view(4, 4).split([2, 1, 1], dim=1)
    delta = torch.nn.functional.softplus(torch.einsum("ker,kr->ke", dt_weight, code) + dt_bias)
    wanted = (delta * B * C * x.view(3) + D.view(4, 3) * x.view(3)).sum(0)
    torch.testing.assert_close(ss2d_scan_reference(x, p, dt_weight, dt_bias, A, D).view(3), wanted)
