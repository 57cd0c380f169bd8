"""The stem's fused kernels: on a GPU, or with TRITON_INTERPRET=1 (see test_triton_backend.py) on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .oracle import TOLERANCE, error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device"),
    # the interpreter's numpy; 2^x that overflows is what makes Phi 0
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

# the interpreter cuts fp32 off to bf16, an error of up to one unit in the last place; hardware rounds, half of one
BF16_UNITS = 2 if INTERPRETED else 1
EPS = 1e-5
# (B, H, W): one pixel, one row, one column, odd, even, several images in a tile and a tile not filled
SIZES = [(1, 1, 1), (2, 1, 9), (1, 9, 1), (3, 5, 7), (2, 8, 6)]


@pytest.fixture(autouse=True)
def _fp32_is_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def kernels():
    from vmamba.ops.triton_backend import stem

    return stem


def parameters(CI: int, C: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Weight and bias of the convolution and of the norm, the first two with a common part over output channels."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight, bias = randn(C, CI, 3, 3) + randn(1, CI, 3, 3), randn(C) + 1
    return [t.to(dtype).to(DEVICE) for t in (weight, bias, 1 + randn(C) / 4, randn(C) / 2)]


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)


def by_torch(x: Tensor, weight, bias, norm_weight, norm_bias, dtype: torch.dtype, gelu: bool) -> Tensor:
    """x (B, CI, H, W); as autocast computes: the convolution in `dtype`, the norm and GELU in fp32 or better."""
    y = F.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), stride=2, padding=1).permute(0, 2, 3, 1)
    wide = torch.promote_types(dtype, torch.float32)
    y = F.layer_norm(y.to(wide), y.shape[3:], norm_weight.to(wide), norm_bias.to(wide), EPS)
    return (F.gelu(y) if gelu else y).to(dtype)


def check(found: Tensor, x: Tensor, parameters: list[Tensor], dtype: torch.dtype, gelu: bool) -> None:
    """Within the table's tolerance, or within twice what torch's own operators lose in this dtype."""
    wanted = by_torch(x.double(), *(t.double() for t in parameters), torch.float64, gelu)
    plain = by_torch(x, *parameters, dtype, gelu)
    units = BF16_UNITS if dtype == torch.bfloat16 else 1
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    assert error(found, wanted) <= units * max(TOLERANCE[dtype], 2 * error(plain, wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_the_first_convolution(kernels, size, dtype):
    B, H, W = size
    x, weights = image(B, 3, H, W), parameters(3, 24)
    found = kernels.conv_norm_gelu(x, *weights, EPS, dtype)
    assert found.dtype == dtype
    check(found, x, weights, dtype, gelu=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_the_second_convolution(kernels, size, dtype):
    B, H, W = size
    x, weights = image(B, 24, H, W, dtype=dtype), parameters(24, 48)
    found = kernels.conv_norm(x.permute(0, 2, 3, 1).contiguous(), *weights, EPS, dtype, torch.float32)
    assert found.dtype == torch.float32
    check(found.to(dtype), x, weights, dtype, gelu=False)


@pytest.mark.parametrize("C", [1, 16, 20, 33, 48, 64])
@pytest.mark.parametrize("CI", [1, 3, 5, 9])
def test_any_channels(kernels, CI, C):
    x, weights = image(1, CI, 3, 4), parameters(CI, C)
    check(kernels.conv_norm_gelu(x, *weights, EPS, torch.float32), x, weights, torch.float32, gelu=True)
    found = kernels.conv_norm(x.permute(0, 2, 3, 1), *weights, EPS, torch.float32, torch.float32)
    check(found, x, weights, torch.float32, gelu=False)


def test_layouts_and_dtypes_of_what_is_given(kernels):
    plain, weights = image(2, 3, 6, 10), parameters(3, 8)
    wide = image(2, 3, 6, 20)
    for x in (plain.contiguous(memory_format=torch.channels_last), wide[:, :, :, ::2], plain.half(), plain.double()):
        check(kernels.conv_norm_gelu(x, *weights, EPS, torch.float16), x, weights, torch.float16, gelu=True)
        found = kernels.conv_norm(x.permute(0, 2, 3, 1), *weights, EPS, torch.float16, torch.float16)
        check(found, x, weights, torch.float16, gelu=False)
    weights = parameters(3, 8, torch.float16)
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    check(kernels.conv_norm_gelu(plain, *weights, EPS, torch.float16), plain, weights, torch.float16, gelu=True)
    found = kernels.conv_norm(plain.permute(0, 2, 3, 1), *weights, EPS, torch.float16, torch.float16)
    check(found, plain, weights, torch.float16, gelu=False)


def test_more_tiles_than_programs(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", 2)
    x, weights = image(5, 3, 24, 23), parameters(3, 8)
    check(kernels.conv_norm_gelu(x, *weights, EPS, torch.float16), x, weights, torch.float16, gelu=True)


def test_an_image_without_contrast_and_one_far_from_zero(kernels):
    weights = parameters(3, 48)
    for x in (torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 1e3)):
        check(
            kernels.conv_norm_gelu(x.to(DEVICE), *weights, EPS, torch.float32),
            x.to(DEVICE),
            weights,
            torch.float32,
            True,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("CI", "C", "gelu"), [(3, 24, True), (24, 48, False)] if INTERPRETED else [(3, 48, True), (48, 96, False)]
)
def test_what_the_backward_needs_is_kept(kernels, CI, C, gelu, dtype):
    x, weights = image(3, CI, 5, 7, dtype=dtype), parameters(CI, C)
    out, normed, rstd = kernels.conv_norm_kept(x, *weights, EPS, gelu, dtype, torch.float32)
    check(out.to(dtype), x, weights, dtype, gelu)
    y = F.conv2d(x.double(), *(t.double() for t in weights[:2]), stride=2, padding=1).permute(0, 2, 3, 1)
    assert (rstd - (y.var(-1, correction=0) + EPS).rsqrt()).abs().max() <= 2e-2 * rstd.max()
    nothing = [torch.ones(C, device=DEVICE), torch.zeros(C, device=DEVICE)]
    check(normed, x, [*weights[:2], *nothing], dtype, gelu=False)


def test_no_images(kernels):
    weights = parameters(3, 8)
    assert kernels.conv_norm_gelu(image(0, 3, 5, 6), *weights, EPS, torch.float16).shape == (0, 3, 3, 8)
    assert kernels.conv_norm(image(0, 5, 6, 3), *weights, EPS, torch.float16, torch.float32).shape == (0, 3, 3, 8)


def test_gelu_is_precise_relative_to_itself(kernels):
    """One pixel a channel: weights that are zero but for the norm's bias give GELU of that bias."""
    z = torch.linspace(-5, 5, 48)
    nothing = torch.zeros(48, 3, 3, 3), torch.zeros(48), torch.zeros(48)
    weights = [t.to(DEVICE) for t in (*nothing, z)]
    y = kernels.conv_norm_gelu(image(1, 3, 1, 1), *weights, EPS, torch.float16).flatten().double().cpu()
    wanted = F.gelu(z.double())
    # fp16 is subnormal below 6e-5: there a rounding is 3e-8
    assert ((y - wanted).abs() <= 1.7e-3 * wanted.abs() + 4e-8).all()


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", [96, 128])
def test_the_stem_itself(kernels, C, dtype):
    x = image(9, 3, 225, 224)
    first, second = parameters(3, C // 2), parameters(C // 2, C)
    middle = kernels.conv_norm_gelu(x, *first, EPS, dtype)
    check(middle, x, first, dtype, gelu=True)
    out = kernels.conv_norm(middle, *second, EPS, dtype, dtype)
    check(out, middle.permute(0, 3, 1, 2), second, dtype, gelu=False)
    assert torch.equal(middle, kernels.conv_norm_gelu(x, *first, EPS, dtype))
    assert torch.equal(out, kernels.conv_norm(middle, *second, EPS, dtype, dtype))
