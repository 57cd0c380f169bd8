"""The joined inference operators as registered operators; their kernels are tested in the files of the kernels."""

from __future__ import annotations

import pytest
import torch

from .oracle import ss2d_problem


def arguments(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x, _, dt_weight, dt_bias, A, D = ss2d_problem(1, 3, 4, E=6, N=1, R=2, dtype=dtype)
    scan = (x, draw(4, 4, 6), dt_weight, dt_bias, (-A).log(), D, "cross2d")
    norm = (draw(6), draw(6), 1e-5)
    return {
        "norm_linear": (draw(2, 3, 6), *norm, draw(5, 6), None, torch.bfloat16),
        "norm_mlp": (draw(2, 3, 6), *norm, draw(9, 6), draw(9), draw(6, 9), draw(6), torch.float32),
        "linear_residual": (draw(2, 3, 5).bfloat16(), draw(6, 5), draw(6), draw(2, 3, 6)),
        "depthwise_silu": (x, draw(6, 1, 3, 3), draw(6)),
        "ss2d_norm": (*scan, *norm),
        "ss2d_residual": (*scan, *norm, draw(5, 6), draw(5), draw(1, 3, 4, 5)),
        "conv_norm_gelu": (draw(1, 3, 5, 8), draw(6, 3, 3, 3), draw(6), *norm, torch.float32),
        "conv_norm": (draw(1, 5, 8, 3), draw(6, 3, 3, 3), draw(6), *norm, torch.float32, torch.bfloat16),
    }


@pytest.mark.parametrize("name", arguments())
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.vmamba, name), arguments()[name])
