"""Random problems for the scans, and their results by the reference in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from vmamba.ops.judge import TOLERANCE, error  # noqa: F401  the tests' one table of tolerances
from vmamba.ops.reference import ss2d_scan_reference

# H, W: one row, one column, one pixel, primes, square, and a chunk that its last pixels do not fill
AWKWARD_SIZES = [(1, 9), (9, 1), (1, 1), (7, 13), (8, 8), (5, 6), (4, 16)]

SS2D_ARGUMENTS = ("x", "p", "dt_weight", "dt_bias", "A", "D")


def ss2d_problem(
    B: int, H: int, W: int, E: int, N: int = 1, R: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """(x, p, dt_weight, dt_bias, A, D) with steps and decays as in a trained model; weights fp32 or better."""
    generator = torch.Generator().manual_seed(seed)
    K, weights = 4, torch.promote_types(dtype, torch.float32)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [
        randn(B, H, W, E).to(dtype),
        randn(B, H, W, K * (R + 2 * N)).to(dtype),
        (0.3 * randn(K, E, R)).to(weights),
        (randn(K, E) - 2).to(weights),
        (-4 * torch.rand(K * E, N, generator=generator, dtype=torch.float64) - 0.1).to(weights),
        randn(K * E).to(weights),
    ]


def ss2d_oracle(problem: list[Tensor], gy: Tensor, routes: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of the reference in fp64."""
    inputs = [t.detach().double().requires_grad_() for t in problem]
    y = ss2d_scan_reference(*inputs, routes)
    return y.detach(), torch.autograd.grad(y, inputs, gy.double())
