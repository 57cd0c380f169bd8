"""The scan of few walks: on a GPU, or with TRITON_INTERPRET=1 (see test_triton_backend.py) on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

from vmamba.ops.dispatch import BACKENDS

from .oracle import TOLERANCE, error, ss2d_oracle, ss2d_problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device"),
    # the interpreter's numpy; 2^x that overflows or underflows is right
    pytest.mark.filterwarnings("ignore:(over|under)flow encountered in exp2:RuntimeWarning"),
]

# the interpreter cuts fp32 off to bf16, an error of up to one unit in the last place; hardware rounds, half of one
BF16_UNITS = 2 if INTERPRETED else 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# steps of a lane, warps, segments: a tile not filled; several tiles one after another; segments of one and of two
TILES = [(4, 4, 1), (2, 1, 1), (2, 1, 8), (2, 1, 3)]


def check(problem, routes="cross2d", tile=None) -> None:
    """The sum of the routes within the table's tolerance, or within twice what the portable backend loses."""
    from vmamba.ops.triton_backend.ss2d import FewTile, few_outputs

    dtype = problem[0].dtype
    y, _ = ss2d_oracle(problem, torch.zeros_like(problem[0]), routes)
    plain, _ = BACKENDS["portable"].ss2d_forward(*problem, routes, False)
    x, p, dt_weight, dt_bias, A, D = (t.to(DEVICE) for t in problem)
    given = (x, p, dt_weight, dt_bias, (-A).log(), D, routes)
    parts = few_outputs(*given, FewTile(*tile) if tile else None)
    assert parts.dtype == dtype
    units = BF16_UNITS if dtype == torch.bfloat16 else 1
    found = parts.double().sum(0).to(dtype).cpu()
    assert error(found, y) <= units * max(TOLERANCE[dtype], 2 * error(plain, y))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_and_segments(dtype, tile):
    check(ss2d_problem(1, 5, 7, E=3, dtype=dtype), tile=tile)


@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 9), (9, 1), (3, 11)])
def test_awkward_sizes(H, W):
    check(ss2d_problem(2, H, W, E=2, dtype=torch.float32))


@pytest.mark.parametrize("routes", ["unidi", "bidi"])
def test_routes(routes):
    check(ss2d_problem(1, 4, 5, E=3, dtype=torch.float32), routes)


@pytest.mark.parametrize(("R", "E"), [(1, 17), (20, 16)])
def test_ranks_and_channels(R, E):
    check(ss2d_problem(1, 2, 3, E=E, R=R, dtype=torch.bfloat16))


@pytest.mark.parametrize("bias", [-40.0, 40.0])
def test_both_ends_of_softplus_with_strong_decay(bias):
    problem = ss2d_problem(1, 2, 9, E=3, dtype=torch.float32)
    problem[3] = problem[3] + bias
    problem[4] = problem[4] * 4  # to -16
    check(problem)


def test_many_walks_go_elsewhere():
    from vmamba.ops.triton_backend.ss2d import few_outputs

    problem = ss2d_problem(1, 1, 1, E=2, dtype=torch.float32)
    problem[0], problem[1] = problem[0].expand(2000, 1, 1, 2), problem[1].expand(2000, 1, 1, problem[1].shape[3])
    x, p, dt_weight, dt_bias, A, D = (t.to(DEVICE) for t in problem)
    assert few_outputs(x, p, dt_weight, dt_bias, (-A).log(), D, "cross2d") is None
