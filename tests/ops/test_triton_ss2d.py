"""The kernels of the fused SS2D: on a GPU, or with TRITON_INTERPRET=1 (see test_triton_backend.py) on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

from vmamba.ops.dispatch import BACKENDS

from .oracle import SS2D_ARGUMENTS, TOLERANCE, error, ss2d_oracle, ss2d_problem

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


@pytest.fixture(autouse=True, params=["exchange", "four walkers", "narrow"])
def kernel_for_one_state(request, monkeypatch):
    """Every test with each of the kernels for N = 1."""
    from vmamba.ops.triton_backend import ss2d

    monkeypatch.setattr(ss2d, "_OWN_KERNEL", 1 if request.param == "four walkers" else 1 << 20)
    monkeypatch.setattr(ss2d, "_NARROW", 99 if request.param == "narrow" else 0)


def check(problem, routes="cross2d", keep=True) -> None:
    """Output and every gradient within the table's tolerance, or within twice what the portable backend loses."""
    generator = torch.Generator().manual_seed(1)
    dtype = problem[0].dtype
    gy = torch.randn(problem[0].shape, generator=generator).to(dtype)
    y, gradients = ss2d_oracle(problem, gy, routes)
    found, plain = (results(name, problem, gy, routes, keep) for name in ("triton", "portable"))
    units = BF16_UNITS if dtype == torch.bfloat16 else 1
    for name, out, by_portable, wanted in zip(("y", *SS2D_ARGUMENTS), found, plain, (y, *gradients), strict=True):
        limit = units * max(TOLERANCE[dtype], 2 * error(by_portable, wanted))
        assert error(out.cpu(), wanted) <= limit, name
    for out, given in zip(found, (problem[0], *problem), strict=True):
        assert out.dtype == given.dtype
        assert out.shape == given.shape


def results(name, problem, gy, routes, keep):
    device = DEVICE if name == "triton" else "cpu"
    problem, gy = [t.to(device) for t in problem], gy.to(device)
    y, states = BACKENDS[name].ss2d_forward(*problem, routes, keep)
    if keep:
        assert tuple(states.shape) == tuple(BACKENDS[name].ss2d_states(problem[0], problem[4], routes))
    return y, *BACKENDS[name].ss2d_backward(gy, *problem, states, routes)


@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 19), (19, 1), (5, 7), (4, 8)])
def test_awkward_sizes(H, W):
    check(ss2d_problem(1, H, W, E=3, dtype=torch.float32))


@pytest.mark.parametrize(("N", "E"), [(2, 3), (3, 33), (16, 3)])
def test_more_states_than_one(N, E):
    check(ss2d_problem(1, 2, 3, E, N=N, dtype=torch.float32))


@pytest.mark.parametrize("routes", ["unidi", "bidi"])
def test_routes(routes):
    check(ss2d_problem(1, 4, 5, E=3, dtype=torch.float32), routes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    check(ss2d_problem(1, 4, 4, E=64, dtype=dtype))


@pytest.mark.parametrize("R", [1, 17])
def test_ranks(R):
    check(ss2d_problem(2, 1, 3, E=5, R=R, dtype=torch.float32))


@pytest.mark.parametrize("N", [1, 2])
def test_walks_in_segments(monkeypatch, N):
    from vmamba.ops.triton_backend import ss2d

    monkeypatch.setattr(ss2d, "_LEAST_TILES", 1)
    check(ss2d_problem(1, 5, 7, E=3, N=N, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "E"), [(1, 3), (1, 40), (2, 3)])
@pytest.mark.parametrize("few", [0, 320])
def test_the_layer_norm_after_the_scan(monkeypatch, N, E, dtype, few):
    from vmamba.ops.triton_backend import ss2d

    problem = ss2d_problem(2, 3, 5, E, N=N, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn((2, E), generator=generator, dtype=torch.float64)
    y, _ = ss2d_oracle(problem, torch.zeros_like(problem[0]), "cross2d")
    wanted = torch.nn.functional.layer_norm(y, (E,), weight, bias, 1e-5)
    monkeypatch.setattr(ss2d, "_FEW_TILES", few)
    given = [t.to(DEVICE) for t in problem]
    given[4] = (-given[4]).log()
    found = ss2d.ss2d_norm_forward(*given, "cross2d", weight.to(DEVICE), bias.to(DEVICE), 1e-5)
    assert found.dtype == dtype
    # of two roundings in bf16, those of the routes and that of y, a norm over few channels can make a little more
    assert error(found.cpu(), wanted) <= 4 * TOLERANCE[dtype]


def test_more_channels_than_a_product_takes():
    check(ss2d_problem(2, 1, 3, E=130, dtype=torch.float32))


def test_many_steps_for_one_program_of_products(monkeypatch):
    from vmamba.ops.triton_backend import ss2d

    monkeypatch.setattr(ss2d, "_PRODUCTS", 1)
    check(ss2d_problem(3, 5, 7, E=3, dtype=torch.float32))
    check(ss2d_problem(5, 1, 2, E=3, N=2, dtype=torch.float32))


def test_backward_without_states():
    check(ss2d_problem(1, 2, 5, E=3, dtype=torch.float32), keep=False)


@pytest.mark.parametrize("bias", [-40.0, 40.0])
def test_both_ends_of_softplus_with_strong_decay(bias):
    problem = ss2d_problem(1, 2, 9, E=3, dtype=torch.float32)
    problem[3] = problem[3] + bias
    problem[4] = problem[4] * 4  # to -16
    gy = torch.ones_like(problem[0])
    y, gradients = ss2d_oracle(problem, gy, "cross2d")
    found = results("triton", problem, gy, "cross2d", True)
    plain = results("portable", problem, gy, "cross2d", True)
    for name, out, by_portable, wanted in zip(("y", *SS2D_ARGUMENTS), found, plain, (y, *gradients), strict=True):
        assert out.isfinite().all(), name
        # what is no more than a trace of a product of tiny numbers has no relative error to hold to
        if wanted.norm() > 1e-20:
            assert error(out.cpu(), wanted) <= max(1e-5, 2 * error(by_portable, wanted)), name


def test_other_layouts_and_a_mixed_dtype():
    x, p, *weights = ss2d_problem(1, 3, 4, E=5, dtype=torch.float32)
    x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    check([x, p.to(torch.float16), *weights])


def test_an_empty_batch():
    problem = [t.to(DEVICE) for t in ss2d_problem(0, 3, 4, E=5, dtype=torch.float32)]
    y, states = BACKENDS["triton"].ss2d_forward(*problem, "cross2d", True)
    gradients = BACKENDS["triton"].ss2d_backward(y, *problem, states, "cross2d")
    assert y.shape == problem[0].shape
    assert all((g == 0).all() for g in gradients)


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_large_on_the_gpu_the_same_every_time():
    problem = [t.cuda() for t in ss2d_problem(4, 56, 57, E=96, R=6, dtype=torch.bfloat16)]
    gy = torch.randn_like(problem[0])
    first, second = (results("triton", problem, gy, "cross2d", True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
