"""The dense kernels for inference: on a GPU, or with TRITON_INTERPRET=1 (see test_triton_backend.py) on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from vmamba.ops.triton_backend.dense_kernels import gelu  # noqa: E402

from .oracle import TOLERANCE, error  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device"),
    # the interpreter's numpy; numbers of rows that are not there, and 2^x that underflows
    pytest.mark.filterwarnings("ignore:(over|under)flow encountered:RuntimeWarning"),
]

# the interpreter cuts fp32 off to bf16, an error of up to one unit in the last place; hardware rounds, half of one
BF16_UNITS = 2 if INTERPRETED else 1
EPS = 1e-6
FEW = 37  # rows: no tile is filled
DTYPES = [torch.bfloat16, torch.float16]
REGIMES = ["few rows", "many rows", "the library's products"]
# stream, output, computation
MIXES = [
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.float16, torch.float16),
]
# C: powers of two, sums of two, neither. In the interpreter what a kernel does is the same from the smallest up; on a
# GPU every case is a compilation, so there they are the widths of networks and one of no power's sum.
if INTERPRETED:
    CASES = [(C, regime, *mix) for C in (32, 48, 40, 13) for regime in REGIMES for mix in MIXES]
else:
    CASES = [
        (96, "few rows", *MIXES[0]), (96, "many rows", *MIXES[0]), (96, "many rows", *MIXES[1]),
        (192, "many rows", *MIXES[0]), (384, "few rows", *MIXES[0]), (384, "the library's products", *MIXES[1]),
        (40, "many rows", *MIXES[2]),
    ]  # fmt: skip
in_every_case = pytest.mark.parametrize(("C", "regime", "stream", "out_dtype", "dtype"), CASES, indirect=["regime"])


@pytest.fixture(scope="module")
def dense():
    from vmamba.ops.triton_backend import dense

    return dense


@pytest.fixture(params=REGIMES)
def regime(request, dense, monkeypatch):
    """Kernels for few rows and for many, each on few rows."""
    monkeypatch.setattr(dense, "_few", lambda *_: request.param == "few rows")
    monkeypatch.setattr(dense, "_LIBRARY_DEPTH", 0 if request.param.startswith("the") else 1 << 20)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(M, C, N, stream, weights=torch.float32, shift=0.5):
    """(x, norm_weight, norm_bias, w1, b1, w2, b2), on the device."""
    tensors = [
        (2 * randn(M, C) + shift).to(stream),
        *((0.2 * randn(C, seed=1) + 1).to(weights), (0.2 * randn(C, seed=2)).to(weights)),
        *((randn(N, C, seed=3) * C**-0.5).to(weights), (0.3 * randn(N, seed=4)).to(weights)),
        *((randn(C, N, seed=5) * N**-0.5).to(weights), (0.3 * randn(C, seed=6)).to(weights)),
    ]
    return [t.to(DEVICE) for t in tensors]


def norm(x, weight, bias, dtype=torch.float64):
    """LayerNorm in fp32 (or fp64), rounded to dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), EPS).to(dtype)


def linear(x, weight, bias):
    """As autocast does it, in x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def mlp(x, norm_weight, norm_bias, w1, b1, w2, b2, dtype=torch.float64):
    hidden = F.gelu(linear(norm(x, norm_weight, norm_bias, dtype), w1, b1))
    return x.to(torch.promote_types(x.dtype, dtype)) + linear(hidden, w2, b2)


def check(out, plain, wanted, dtype):
    """Within the table's tolerance for the output's dtype, or within twice what torch's own operators lose."""
    assert out.dtype == dtype
    assert out.shape == wanted.shape
    units = BF16_UNITS if torch.bfloat16 in (dtype, plain.dtype) or INTERPRETED else 1
    assert error(out, wanted) <= units * max(TOLERANCE[dtype], 2 * error(plain.to(dtype), wanted))


@pytest.mark.parametrize(("stream", "dtype"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("C", [13, 96, 128] if INTERPRETED else [13, 96, 768])
def test_layer_norm(dense, C, stream, dtype):
    x, weight, bias, *_ = problem(FEW, C, 1, stream, shift=3)
    out = dense.layer_norm(x, weight, bias, EPS, dtype)
    check(out, norm(x, weight, bias, dtype), norm(x.double(), weight, bias), dtype)


@in_every_case
def test_norm_linear(dense, regime, C, stream, out_dtype, dtype):
    bias = stream == torch.float32
    x, norm_weight, norm_bias, weight, b1, *_ = problem(FEW, C, (1 if bias else 4) * C, stream)
    b1 = b1 if bias else None
    out = dense.norm_linear(x, norm_weight, norm_bias, EPS, weight, b1, dtype)
    plain = linear(norm(x, norm_weight, norm_bias, dtype), weight, b1)
    check(out, plain, linear(norm(x.double(), norm_weight, norm_bias), weight, b1), dtype)


@in_every_case
def test_norm_mlp(dense, regime, C, stream, out_dtype, dtype):
    x, norm_weight, norm_bias, *rest = problem(FEW, C, 4 * C, stream)
    out = dense.norm_mlp(x, norm_weight, norm_bias, EPS, *rest, dtype, out_dtype)
    plain = mlp(x, norm_weight, norm_bias, *rest, dtype)
    check(out, plain, mlp(x.double(), norm_weight, norm_bias, *rest), out_dtype)


@in_every_case
def test_linear_residual(dense, regime, C, stream, out_dtype, dtype):
    residual, *_, weight, b2 = problem(FEW, C, C, stream)
    y = randn(FEW, C, seed=7).to(DEVICE, dtype)
    b2 = b2 if out_dtype == torch.float32 else None
    out = dense.linear_residual(y, weight, b2, residual, out_dtype)
    check(out, residual + linear(y, weight, b2), residual.double() + linear(y.double(), weight, b2), out_dtype)


@pytest.mark.parametrize("K", [13, 40, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dense, regime, K, dtype):
    y, (weight, *_) = randn(FEW, K).to(DEVICE, dtype), problem(FEW, K, 20, dtype)[3:]
    check(dense.linear(y, weight), linear(y, weight, None), linear(y.double(), weight, None), dtype)


@pytest.mark.parametrize("tile", [(16, 16, 1, 1), (16, 32, 2, 2), (32, 16, 4, 4)])
@pytest.mark.parametrize("K", [13, 96])
def test_few_rows_in_any_tiles(dense, K, tile):
    y, (weight, bias, *_) = randn(FEW, K).to(DEVICE, torch.float16), problem(FEW, K, 20, torch.float32)[3:]
    out = torch.empty(FEW, 20, dtype=torch.float16, device=DEVICE)
    dense._linear_few(y, weight, bias, out, tile=dense.FewTile(*tile))
    check(out, linear(y, weight, bias), linear(y.double(), weight, bias), torch.float16)


@pytest.mark.parametrize("C", [13, 96])
@pytest.mark.parametrize(("dtype", "stream"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_norm_linear_residual_of_parts(dense, C, dtype, stream):
    residual, norm_weight, norm_bias, weight, bias, *_ = problem(FEW, C, C, stream)
    parts = randn(4, FEW, C, seed=9).to(DEVICE, dtype)
    out = dense.norm_linear_residual(parts, norm_weight, norm_bias, EPS, weight, bias, residual)
    plain = residual + linear(norm(parts.float().sum(0), norm_weight, norm_bias, dtype), weight, bias)
    wanted = linear(norm(parts.double().sum(0), norm_weight, norm_bias), weight, bias)
    check(out, plain, residual.double() + wanted, stream)


@pytest.mark.usefixtures("regime")
def test_weights_already_rounded(dense):
    """The same bits from weights in bf16 as from the same weights in fp32, and from call to call."""
    x, *weights = problem(FEW, 32, 128, torch.float32, weights=torch.bfloat16)
    narrow, wide, again = (
        dense.norm_mlp(x, *given[:2], EPS, *given[2:], torch.bfloat16, torch.float32)
        for given in (weights, [t.float() for t in weights], weights)
    )
    assert torch.equal(narrow, wide)
    assert torch.equal(narrow, again)


@pytest.mark.usefixtures("regime")
def test_shapes_and_strides_of_images(dense):
    x, *weights = problem(2 * 3 * 5, 32, 128, torch.float32)
    of_rows = dense.norm_mlp(x, *weights[:2], EPS, *weights[2:], torch.bfloat16, torch.float32)
    images = x.view(2, 3, 5, 32)
    apart = images.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (images, apart):
        out = dense.norm_mlp(given, *weights[:2], EPS, *weights[2:], torch.bfloat16, torch.float32)
        assert torch.equal(out.view(-1, 32), of_rows)
    out = dense.norm_mlp(images[:0], *weights[:2], EPS, *weights[2:], torch.bfloat16, torch.float32)
    assert out.shape == (0, 3, 5, 32)


@pytest.mark.usefixtures("regime")
def test_not_a_number_stays_in_its_row(dense):
    x, *weights = problem(FEW, 32, 128, torch.float32)
    x[3, 1] = float("nan")
    out = dense.norm_mlp(x, *weights[:2], EPS, *weights[2:], torch.bfloat16, torch.float32)
    rows = out.isnan().any(1).nonzero().flatten().tolist()
    assert rows == [3]
    assert out[3].isnan().all()


def test_what_does_not_fit_is_refused(dense):
    x, norm_weight, norm_bias, w1, b1, w2, b2 = problem(FEW, 32, 128, torch.float32)
    with pytest.raises(TypeError, match="compute in"):
        dense.norm_linear(x, norm_weight, norm_bias, EPS, w1, b1, torch.float32)
    with pytest.raises(TypeError, match="none of"):
        dense.norm_mlp(x, norm_weight, norm_bias, EPS, w1, b1, w2, b2, torch.bfloat16, torch.float64)
    with pytest.raises(ValueError, match="rows of 32"):
        dense.norm_linear(x, norm_weight, norm_bias, EPS, w2, b2, torch.bfloat16)
    with pytest.raises(ValueError, match="residual has shape"):
        dense.linear_residual(x.bfloat16(), w1, b1, x, torch.float32)


@triton.jit
def gelu_kernel(v, out, SIZE: tl.constexpr, FINE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + o, gelu(tl.load(v + o), FINE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_exact_before_it_is_rounded(dtype):
    """Within 1/8 of a unit in the last place of the dtype, in the tail too, down to where it is 1e-7 of nothing."""
    v = torch.linspace(-30, 30, 1 << 17, device=DEVICE)
    out = torch.empty_like(v)
    gelu_kernel[(v.numel() // 1024,)](v, out, 1024, dtype == torch.float16)
    wanted = v.double() * torch.special.log_ndtr(v.double()).exp()
    least = torch.finfo(dtype).smallest_normal
    unit = 2 ** wanted.abs().clamp_min(least).log2().floor() * torch.finfo(dtype).eps
    off = (out - wanted).abs()
    assert (off <= torch.where(v > -5.5, unit / 8, 1e-7)).all()
    out = torch.empty(2, device=DEVICE)
    gelu_kernel[(1,)](torch.tensor([float("nan"), 0.0], device=DEVICE), out, 2, dtype == torch.float16)
    assert out[0].isnan()
    assert out[1] == 0


@pytest.mark.parametrize("C", [32, 48] if INTERPRETED else [96, 192])
@pytest.mark.parametrize("scaled", [False, True])
def test_norm_mlp_that_keeps_what_its_backward_needs(dense, monkeypatch, C, scaled):
    """Both kernels, and rows that end inside an image."""
    monkeypatch.setattr(dense, "_few", lambda *_: False)
    if INTERPRETED and C == 48:
        monkeypatch.setattr(dense, "_RESIDENT_BYTES", 0)
    x, *weights = problem(3 * 43, C, 4 * C, torch.bfloat16)
    x = x.view(3, 43, C)
    scale = torch.tensor([0.0, 1.25, 1.0], device=DEVICE) if scaled else None
    norm_weight, norm_bias, w1, b1, w2, b2 = weights
    out, hidden = dense.norm_mlp_kept(x, norm_weight, norm_bias, EPS, w1, b1, w2, b2, scale, torch.bfloat16)
    plain = linear(norm(x, norm_weight, norm_bias, torch.bfloat16), w1, b1)
    check(hidden, plain, linear(norm(x.double(), norm_weight, norm_bias), w1, b1), torch.bfloat16)
    factor = 1 if scale is None else scale.view(3, 1, 1)
    plain, wanted = (x.to(dtype) + factor * (mlp(x, *weights, dtype) - x) for dtype in (torch.bfloat16, torch.float64))
    check(out, plain.bfloat16(), wanted, torch.bfloat16)
    if scaled:
        assert torch.equal(out[0], x[0])
