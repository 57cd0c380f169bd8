"""The kernels of the 1-D scan: on a GPU, or with TRITON_INTERPRET=1 (see test_triton_backend.py) on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

from vmamba.ops import selective_scan
from vmamba.ops.dispatch import BACKENDS
from vmamba.ops.reference import selective_scan_reference

from .oracle import TOLERANCE, error

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

ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "delta_bias")
RESULTS = ("y", "last_state", *ARGUMENTS)


def problem(batch, channels, L, N=2, K=1, dtype=torch.float32):
    """Arguments of the scan by name, steps and decays as in a trained model; weights fp32 or better."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.promote_types(dtype, torch.float32)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "u": randn(batch, channels, L).to(dtype),
        "delta": randn(batch, channels, L).to(dtype),
        "A": (-4 * torch.rand(channels, N, generator=generator, dtype=torch.float64) - 0.1).to(weights),
        "B": randn(batch, K, N, L).to(dtype),
        "C": randn(batch, K, N, L).to(dtype),
        "D": randn(channels).to(weights),
        "delta_bias": (randn(channels) - 2).to(weights),
    }


def results(name, arguments, gy, softplus=True, keep=True):
    """y, last state, and the gradients of what is present."""
    backend = BACKENDS[name]
    device = DEVICE if name == "triton" else "cpu"
    tensors = [t if t is None else t.to(device) for t in arguments.values()]
    y, last_state, states = backend.scan_forward(*tensors, softplus, keep)
    if keep:
        u, _, A, B, *_ = tensors
        assert tuple(states.shape) == tuple(backend.scan_states(u, A, B))
    gradients = backend.scan_backward(gy.to(device), *tensors, states, softplus)
    present = [g for g, t in zip(gradients, tensors, strict=True) if t is not None]
    assert all(g.numel() == 0 for g, t in zip(gradients, tensors, strict=True) if t is None)
    return y, last_state, *present


def oracle(arguments, gy, softplus=True):
    wide = {name: t if t is None else t.detach().double().requires_grad_() for name, t in arguments.items()}
    y, last_state = selective_scan_reference(**wide, delta_softplus=softplus)
    gradients = torch.autograd.grad(y, [t for t in wide.values() if t is not None], gy.double())
    return y.detach(), last_state.detach(), *gradients


def check(arguments, softplus=True, keep=True, floor=None) -> None:
    """Every result within the table's tolerance, or `floor`, or within twice what the portable backend loses."""
    u = arguments["u"]
    gy = torch.randn(u.shape, generator=torch.Generator().manual_seed(1)).to(u.dtype)
    wanted = oracle(arguments, gy, softplus)
    found = results("triton", arguments, gy, softplus, keep)
    plain = results("portable", arguments, gy, softplus)
    names = ["y", "last_state", *(name for name in ARGUMENTS if arguments[name] is not None)]
    units = BF16_UNITS if u.dtype == torch.bfloat16 else 1
    for name, out, by_portable, reference in zip(names, found, plain, wanted, strict=True):
        assert out.isfinite().all(), name
        assert out.is_contiguous() or name == "last_state", name
        # what is no more than a trace of a product of tiny numbers has no relative error to hold to
        if reference.norm() > 1e-20 or floor is None:
            limit = units * max(floor or TOLERANCE[u.dtype], 2 * error(by_portable, reference))
            assert error(out.cpu(), reference) <= limit, name
        given = arguments.get(name, by_portable)
        assert (out.dtype, out.shape) == (given.dtype if name != "y" else u.dtype, by_portable.shape), name


@pytest.mark.parametrize("L", [1, 16, 37, 128, 129, 300])
def test_awkward_lengths(L):
    check(problem(2, 3, L, N=1))


@pytest.mark.parametrize("N", [1, 3, 17])
@pytest.mark.parametrize("channels", [1, 20])
def test_states_and_channels(N, channels):
    # with one channel the gradient of its bias is one number, a sum of which much cancels
    check(problem(1, channels, 20, N=N), floor=5e-6)


@pytest.mark.parametrize(("channels", "K"), [(3, 3), (6, 2), (34, 2)])
def test_groups(channels, K):
    check(problem(2, channels, 5, K=K))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [2, 18])
def test_dtypes(dtype, channels):
    check(problem(1, channels, 35, dtype=dtype))


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("absent", [("D",), ("delta_bias",), ("D", "delta_bias")])
def test_without_what_is_optional(softplus, absent):
    arguments = problem(1, 3, 20)
    if not softplus:
        arguments = {k: v.abs() if k in ("delta", "delta_bias") else v for k, v in arguments.items()}
    check({name: None if name in absent else t for name, t in arguments.items()}, softplus)


@pytest.mark.parametrize(("channels", "L"), [(2, 1300), (17, 300)])
def test_sequences_in_segments(monkeypatch, channels, L):
    from vmamba.ops.triton_backend import scan1d

    monkeypatch.setattr(scan1d, "_LEAST_TILES", 1)
    check(problem(1, channels, L, N=1))


def test_backward_without_states():
    check(problem(1, 2, 150), keep=False)


@pytest.mark.parametrize("bias", [-40.0, 40.0])
def test_both_ends_of_softplus_with_strong_decay(bias):
    arguments = problem(1, 3, 40)
    arguments["delta_bias"] += bias
    arguments["A"] *= 4  # to -16
    check(arguments, floor=1e-5)


def test_long_memory():
    """Decays of nearly 1: sums over all steps, of which much cancels."""
    arguments = problem(1, 2, 600, N=1)
    arguments["delta"] *= 0.1
    arguments["delta_bias"] = arguments["delta_bias"] * 0.1 - 7
    arguments["A"] = arguments["A"] * 0.1
    check(arguments, floor=5e-6)


def test_other_layouts_and_mixed_dtypes():
    arguments = problem(2, 4, 20)
    arguments["u"] = arguments["u"].transpose(1, 2).contiguous().transpose(1, 2)
    arguments["delta"] = torch.cat([arguments["delta"]] * 2, dim=2)[..., 3:23].to(torch.float16)
    arguments["B"] = arguments["B"][:, :, :, :1].expand(-1, -1, -1, 20)
    arguments["C"] = arguments["C"].to(torch.bfloat16)
    arguments["A"] = arguments["A"].double()
    assert not arguments["u"].is_contiguous()
    check(arguments)


def test_rows_of_a_larger_tensor_are_read_in_place():
    arguments = problem(2, 4, 48)
    both = torch.cat([arguments["u"], arguments["delta"]], dim=1)
    arguments["u"], arguments["delta"] = both.chunk(2, dim=1)
    check(arguments)


def test_an_empty_batch():
    tensors = [t.to(DEVICE) for t in problem(0, 3, 4).values()]
    y, last_state, states = BACKENDS["triton"].scan_forward(*tensors, True, True)
    gradients = BACKENDS["triton"].scan_backward(y, *tensors, states, True)
    assert y.shape == tensors[0].shape
    assert last_state.shape == (0, 3, 2)
    assert all((g == 0).all() and g.shape == t.shape for g, t in zip(gradients, tensors, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_on_the_gpu_it_is_the_automatic_choice():
    arguments = {name: t.cuda() for name, t in problem(2, 24, 70, dtype=torch.bfloat16).items()}
    found, named = (selective_scan(**arguments, delta_softplus=True, backend=b) for b in ("auto", "triton"))
    assert torch.equal(found, named)
    plain = selective_scan(**arguments, delta_softplus=True, backend="portable")
    assert error(found, plain) <= 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(4, 384, 4096, 16), (1, 4, 1_000_000, 2), (256, 48, 37, 1), (1, 32, 300, 256)])
def test_large_on_the_gpu_right_and_the_same_every_time(shape):
    arguments = {name: t.cuda() for name, t in problem(*shape, dtype=torch.bfloat16).items()}
    if shape[2] > 100_000:
        arguments["delta"] *= 0.1
        arguments["delta_bias"] = arguments["delta_bias"] * 0.1 - 6.7  # steps near 1e-3
        arguments["A"] /= 4
    gy = torch.randn_like(arguments["u"])
    first, second = (results("triton", arguments, gy) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    backend, wide = BACKENDS["portable"], [t.double() for t in arguments.values()]
    y, last_state, states = backend.scan_forward(*wide, True, False)
    wanted = (y, last_state, *backend.scan_backward(gy.double(), *wide, states, True))
    for name, out, reference in zip(RESULTS, first, wanted, strict=True):
        assert error(out, reference) <= TOLERANCE[torch.bfloat16], name
