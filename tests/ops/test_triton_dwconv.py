"""The kernels of the depthwise convolution: on a GPU, or by Triton's interpreter (see test_triton_backend.py)."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from vmamba.ops import depthwise_conv3x3
from vmamba.ops.dispatch import BACKENDS

from .oracle import TOLERANCE, error
from .test_dwconv import arguments, by_torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device"),
    # the interpreter's numpy; 2^x that overflows is what makes the sigmoid 0
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

# one pixel, one row, one column, several images in a share of the rows, a block that W * E does not fill, E odd
SIZES = [(1, 1, 1, 3), (2, 1, 9, 5), (2, 9, 1, 16), (3, 4, 3, 8), (2, 5, 7, 24)]
# the interpreter cuts fp32 off to bf16, an error of up to one unit in the last place; hardware rounds, half of one
BF16_UNITS = 2 if INTERPRETED else 1
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _fp32_is_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def kernels():
    from vmamba.ops.triton_backend import dwconv

    return dwconv


def results(forward, backward, x, weight, bias, gy, activation) -> list[Tensor]:
    gradients = backward(gy, x, weight, bias, activation)
    return [forward(x, weight, bias, activation), *gradients[: 2 if bias is None else 3]]


def wanted(x, weight, bias, gy, activation) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = by_torch(*leaves, *[None] * (3 - len(leaves)), activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy.double())]


def check(kernels, x, weight, bias, gy, activation, tile) -> None:
    """Against fp64: within the table's tolerance, or within twice what torch's own operators lose in this dtype."""
    x, weight, bias, gy = (t if t is None else t.to(DEVICE) for t in (x, weight, bias, gy))
    portable = BACKENDS["portable"]
    units = BF16_UNITS if x.dtype == torch.bfloat16 else 1
    found = results(
        lambda *t: kernels.conv_forward(*t, tile),
        lambda *t: kernels.conv_backward(*t, tile, tile),
        *(x, weight, bias, gy, activation),
    )
    by_portable = results(portable.conv_forward, portable.conv_backward, x, weight, bias, gy, activation)
    references = wanted(x, weight, bias, gy, activation)
    for name, out, plain, reference in zip(
        ("y", "gx", "gweight", "gbias"), found, by_portable, references, strict=False
    ):
        assert out.dtype == x.dtype
        assert error(out, reference) <= units * max(TOLERANCE[x.dtype], 2 * error(plain, reference)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("activation", "bias"), [("silu", True), ("silu", False), ("none", True)])
def test_output_and_every_gradient(kernels, size, dtype, activation, bias):
    x, weight, bias = arguments(*size, dtype=dtype, bias=bias)
    gy = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    check(kernels, x, weight, bias, gy, activation, kernels.Tile(block=128, warps=1, stages=1, programs=6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, (1, 2, 37, 33)])
@pytest.mark.parametrize(("activation", "bias"), [("silu", True), ("none", False)])
def test_few_numbers_with_weights_of_any_dtype(kernels, size, dtype, activation, bias):
    x, weight, bias = (t if t is None else t.to(DEVICE) for t in arguments(*size, dtype=dtype, bias=bias))
    wide = torch.promote_types(dtype, torch.float32)
    found = kernels.conv_forward(x, weight.to(wide), None if bias is None else bias.to(wide), activation)
    plain = BACKENDS["portable"].conv_forward(x, weight, bias, activation)
    reference = by_torch(*(t if t is None else t.double() for t in (x, weight, bias)), activation)
    assert found.dtype == dtype
    units = BF16_UNITS if dtype == torch.bfloat16 else 1
    assert error(found, reference) <= units * max(TOLERANCE[dtype], 2 * error(plain, reference))


@pytest.mark.parametrize("programs", [1, 7, 1000])
def test_any_sharing_of_the_rows(kernels, programs):
    size = (3, 4, 5, 8)
    x, weight, bias = arguments(*size)
    gy = torch.randn(size, dtype=x.dtype)
    check(kernels, x, weight, bias, gy, "silu", kernels.Tile(block=32, warps=1, stages=1, programs=programs))


def test_strided_inputs_without_and_with_a_copy(kernels):
    wide, weight, bias = arguments(E=16)
    weight, bias = weight[:8], bias[:8]
    tile = kernels.Tile(block=64, warps=1, stages=1)
    halves = wide.chunk(2, dim=3)
    # half of the channels, as a gate leaves it, is read as it lies; a transposed image and a crop are copied
    for x in (halves[0], halves[1], halves[1].transpose(1, 2), halves[0][:, 1:, 2:]):
        gy = torch.randn(1, dtype=x.dtype).expand(x.shape)
        check(kernels, x, weight, bias, gy, "silu", tile)
    assert kernels._pitched(halves[1])[0] is halves[1]


@pytest.mark.parametrize("value", [80.0, -80.0, 2e4, -2e4])
def test_both_ends_of_silu(kernels, value):
    x, weight, bias = arguments(1, 2, 3, 4, torch.float32)
    x, weight, bias = x * 1e-3, weight * 0, torch.full_like(bias, value)
    weight[:, :, 1, 1] = 1
    check(kernels, x, weight, bias, torch.ones_like(x), "silu", kernels.FORWARD)


def test_through_the_public_function_with_gradients(kernels, monkeypatch):
    backend = BACKENDS["portable"]._replace(conv_forward=kernels.conv_forward, conv_backward=kernels.conv_backward)
    monkeypatch.setitem(BACKENDS, "portable", backend)
    x, weight, bias = (t.to(DEVICE).requires_grad_() for t in arguments())
    leaves = (x, weight, bias)
    y = depthwise_conv3x3(x, weight, bias, backend="portable")
    reference = by_torch(*leaves, "silu")
    pairs = zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (y, reference)), strict=True)
    for gradient, of_reference in pairs:
        torch.testing.assert_close(gradient, of_reference)
    assert depthwise_conv3x3(x[:0], weight, bias, backend="portable").shape == (0, *x.shape[1:])


def test_the_same_bits_every_time(kernels):
    x, weight, bias = (t.to(DEVICE) for t in arguments(3, 4, 5, 8, torch.float32))
    first, second = (kernels.conv_backward(x, x, weight, bias, "silu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
