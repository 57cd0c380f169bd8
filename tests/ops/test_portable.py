from __future__ import annotations

import time

import pytest
import torch

from vmamba.ops import ROUTES, portable, selective_scan
from vmamba.ops.reference import ss2d_scan_reference

from .oracle import AWKWARD_SIZES, SS2D_ARGUMENTS, TOLERANCE, error, ss2d_oracle, ss2d_problem


def cotangent(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype)


def check(problem, routes, tolerance):
    gy = cotangent(problem[0])
    wanted, wanted_gradients = ss2d_oracle(problem, gy, routes)
    y = portable.ss2d_forward(*problem, routes)
    assert y.dtype == problem[0].dtype
    assert error(y, wanted) <= tolerance
    gradients = portable.ss2d_backward(gy, *problem, routes)
    for name, argument, gradient, reference in zip(SS2D_ARGUMENTS, problem, gradients, wanted_gradients, strict=True):
        assert gradient.dtype == argument.dtype, name
        assert error(gradient, reference) <= tolerance, name


@pytest.mark.parametrize("size", AWKWARD_SIZES, ids=str)
@pytest.mark.parametrize("routes", ROUTES)
def test_output_and_gradients_equal_the_reference(routes, size):
    check(ss2d_problem(2, *size, E=5, N=2), routes, TOLERANCE[torch.float64])


@pytest.mark.parametrize("N", [1, 16])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype(dtype, N):
    check(ss2d_problem(1, 11, 12, E=8, N=N, dtype=dtype), "cross2d", TOLERANCE[dtype])


def test_images_walked_in_several_blocks(monkeypatch):
    monkeypatch.setattr(portable, "_BLOCK_ELEMENTS", 2 * 6 * 6 * 4 * 2)  # two images of five at a time
    check(ss2d_problem(5, 6, 6, E=4), "cross2d", TOLERANCE[torch.float64])


def test_an_empty_batch():
    problem = ss2d_problem(0, 4, 5, E=3)
    assert portable.ss2d_forward(*problem, "cross2d").shape == (0, 4, 5, 3)
    gradients = portable.ss2d_backward(problem[0], *problem, "cross2d")
    assert [g.shape for g in gradients] == [t.shape for t in problem]
    assert all(g.eq(0).all() for g in gradients[2:])


def test_non_contiguous_inputs():
    x, p, *weights = ss2d_problem(2, 6, 7, E=4)
    x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    p = torch.cat([p, p], dim=-1)[..., : p.shape[-1]]
    assert not x.is_contiguous()
    assert not p.is_contiguous()
    check([x, p, *weights], "cross2d", TOLERANCE[torch.float64])


def test_inputs_are_left_as_they_were():
    problem = ss2d_problem(2, 5, 5, E=4)
    copies = [t.clone() for t in problem]
    portable.ss2d_forward(*problem, "cross2d")
    portable.ss2d_backward(torch.ones_like(problem[0]), *problem, "cross2d")
    assert all(torch.equal(t, copy) for t, copy in zip(problem, copies, strict=True))


@pytest.mark.parametrize("shift", [-40.0, 40.0], ids=["delta near 0", "delta near 40"])
def test_both_ends_of_softplus(shift):
    # Rounding delta A, in the hundreds here, moves a decay by that many roundings, whoever computes it: so the measure
    # is what the plain loop loses in fp32, over several cotangents.
    x, p, dt_weight, dt_bias, A, D = ss2d_problem(1, 7, 9, E=6, dtype=torch.float32)
    problem = [x, p, dt_weight, dt_bias + shift, A * 4, D]  # |A| up to 16
    ours, loops = torch.zeros(7), torch.zeros(7)
    for seed in range(8):
        gy = cotangent(x, seed)
        y, gradients = ss2d_oracle(problem, gy, "cross2d")
        leaves = [t.clone().requires_grad_() for t in problem]
        loop = ss2d_scan_reference(*leaves)
        results = [portable.ss2d_forward(*problem, "cross2d"), *portable.ss2d_backward(gy, *problem, "cross2d")]
        plain = [loop, *torch.autograd.grad(loop, leaves, gy)]
        wanted = [y, *gradients]
        ours = ours.maximum(torch.tensor([error(t, w) for t, w in zip(results, wanted, strict=True)]))
        loops = loops.maximum(torch.tensor([error(t, w) for t, w in zip(plain, wanted, strict=True)]))
    assert (ours <= (2 * loops).clamp_min(TOLERANCE[torch.float32])).all(), f"{ours} against the loop's {loops}"


def test_softplus_is_accurate_where_delta_is_small():
    z = torch.linspace(-25, 25, 4001)
    out, work = torch.empty_like(z), [torch.empty_like(z) for _ in range(2)]
    portable._softplus(z, out, work)
    wanted = torch.nn.functional.softplus(z.double(), threshold=100)
    assert ((out - wanted) / wanted).abs().max() < 2e-6


def test_a_long_walk_keeps_its_memory():
    # delta near 1e-3 and A = -1: a decay of 0.999 a step, so a pixel is still seen thousands of steps later
    length, E = 4096, 4
    u = torch.randn(1, E, length)
    delta = torch.full((1, E, length), 1e-3)
    A = -torch.ones(E, 1)
    ones = torch.ones(1, 1, 1, length)
    wanted = selective_scan(*(t.double() for t in (u, delta, A, ones, ones)), backend="reference")
    assert error(selective_scan(u, delta, A, ones, ones), wanted) <= TOLERANCE[torch.float32]
    assert error(selective_scan(u.bfloat16(), delta, A, ones, ones), wanted) <= TOLERANCE[torch.bfloat16]


def test_scratch_memory_is_kept_within_its_bound_and_usable_across_grad_modes():
    problem = ss2d_problem(1, 6, 6, E=4, dtype=torch.float32)
    with torch.inference_mode():
        first = portable.ss2d_forward(*problem, "cross2d")
    with torch.no_grad():
        assert torch.equal(first, portable.ss2d_forward(*problem, "cross2d"))
    assert all(flat.nbytes <= portable._SCRATCH_KEPT for flat in portable._scratch.kept.values())
    large = portable._scratch.take(first, [(portable._SCRATCH_KEPT // 4 + 1,)])
    assert large[0].nbytes > portable._SCRATCH_KEPT
    assert all(flat.nbytes <= portable._SCRATCH_KEPT for flat in portable._scratch.kept.values())


def best_time(function, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return min(times)


@pytest.mark.slow
def test_speed_against_the_reference_and_linearity():
    # the figures proper are made by benchmarks/cpu.py; thread time and one thread keep this one steady on a busy
    # machine
    torch.use_deterministic_algorithms(False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small, large = (ss2d_problem(1, side, side, E=96, R=6, dtype=torch.float32) for side in (28, 56))
        forward = best_time(lambda: portable.ss2d_forward(*large, "cross2d"))
        loop = best_time(lambda: ss2d_scan_reference(*large), repeats=2)
        assert loop >= 4 * forward, f"portable {forward:.4f} s, reference {loop:.4f} s"
        backward = [
            best_time(lambda problem=problem: portable.ss2d_backward(problem[0], *problem, "cross2d"))
            for problem in (small, large)
        ]
        assert backward[1] <= 6 * backward[0], f"784 pixels {backward[0]:.4f} s, 3136 pixels {backward[1]:.4f} s"
    finally:
        torch.set_num_threads(threads)
