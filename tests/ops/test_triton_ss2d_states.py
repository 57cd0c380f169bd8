"""The kernels of the fused SS2D for many states: what their lanes, blocks of states and scratch make of odd sizes."""

from __future__ import annotations

import pytest
import torch

from vmamba.ops.dispatch import BACKENDS

from .oracle import SS2D_ARGUMENTS, error, ss2d_problem
from .test_triton_ss2d import INTERPRETED, check, pytestmark, results

__all__ = ["pytestmark"]


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch):
    from vmamba.ops.triton_backend import ss2d

    monkeypatch.setattr(ss2d, "_MANY", 2)


@pytest.mark.parametrize(("N", "R", "E"), [(4, 17, 33), (5, 33, 2), (16, 1, 64), (18, 2, 3)])
def test_blocks_of_states_ranks_and_widths(N, R, E):
    check(ss2d_problem(1, 2, 3, E, N=N, R=R, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    check(ss2d_problem(1, 3, 6, E=32, N=16, R=2, dtype=dtype))


def test_fp64_is_left_to_the_portable_backend():
    check(ss2d_problem(1, 2, 3, E=3, N=4, dtype=torch.float64))


@pytest.mark.parametrize("routes", ["unidi", "bidi"])
def test_routes(routes):
    check(ss2d_problem(2, 3, 5, E=3, N=3, dtype=torch.float32), routes)


@pytest.mark.parametrize("N", [3, 17])
def test_walks_in_segments(monkeypatch, N):
    from vmamba.ops.triton_backend import ss2d_states

    monkeypatch.setattr(ss2d_states, "_LEAST_TILES", 1)
    check(ss2d_problem(1, 3, 7, E=3, N=N, dtype=torch.float32))


def test_programs_that_take_several_walks(monkeypatch):
    from vmamba.ops.triton_backend import ss2d_states

    monkeypatch.setattr(ss2d_states, "_PROGRAMS", 3)
    check(ss2d_problem(2, 2, 9, E=3, N=3, dtype=torch.float32))


def test_no_state_is_kept_for_backward():
    problem = ss2d_problem(1, 2, 3, E=3, N=4, dtype=torch.float32)
    assert BACKENDS["triton"].ss2d_states(problem[0], problem[4], "cross2d") == (0,)


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize(("N", "R"), [(2, 6), (16, 24), (40, 48)])
def test_large_on_the_gpu_the_same_every_time(N, R):
    problem = [t.cuda() for t in ss2d_problem(3, 28, 27, E=96, R=R, N=N, dtype=torch.bfloat16)]
    gy = torch.randn_like(problem[0])
    first, second = (results("triton", problem, gy, "cross2d", True) for _ in range(2))
    plain = results("portable", [t.float().cpu() for t in problem], gy.float().cpu(), "cross2d", True)
    for name, a, b, wanted in zip(("y", *SS2D_ARGUMENTS), first, second, plain, strict=True):
        assert torch.equal(a, b), name
        assert error(a.cpu(), wanted) <= 6e-3, name
