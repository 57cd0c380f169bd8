"""3x3 convolutions of stride 2, each with its LayerNorm (and GELU) in one kernel: the stem's two, and downsampling.

A program makes a tile of output pixels with all their channels, so the convolution is a matrix product over the tile's
neighbourhoods, and the LayerNorm's sums stay in registers. Tiles in registers have a power of two of columns; channels
are mostly 3 * 2^k, so they are cut in two: 48 = 32 + 16, 96 = 64 + 32.

Batch 128 at 224 px in bf16, C = 96; the floor is bytes at 4.3 TB/s, the time that of an H200 (torch 2.11, triton 3.6):

    conv_norm_gelu    77 MB of fp32 image, 154 MB out    0.054 ms    0.117 ms; 21 instructions and 2 special functions
                                                                     for each of 77 million results, 0.055 and 0.044 ms
    conv_norm         154 MB in, 77 MB out               0.054 ms    0.131 ms; 33 GFLOP, 0.05 ms; 347 MB of inputs and
                                                                     260 MB of weights from L2

Names: o_* offsets, b_* blocks in registers, i_* indices, m_* masks. Letters as in ops/README.md; P pixels of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import kernel

__all__ = ["conv_norm", "conv_norm_gelu", "conv_norm_kept"]

_PIXELS = 128  # of a tile of the first convolution
_PROGRAMS = 2112  # that share its tiles
_FEW = 7  # input channels up to which a pixel's whole neighbourhood is one tile


@triton.jit
def gelu(z, EXACT: tl.constexpr):
    """z Phi(z), Phi the normal distribution; relative error 1.1e-3 down to z = -5 and 1.5e-4 in the mean, or EXACT.

    Phi(z) = 1 / (1 + 2^-s), where s, its log-odds in powers of two, is odd and smooth: z times a cubic in z^2, by
    minimax over |z| <= 5. The negative tail keeps its relative precision, which 1 + erf(z) does not. The reciprocal is
    the square of 1 / sqrt(.): two instructions where a quotient takes five.
    """
    if EXACT:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    z2 = z * z
    b = z2 * -1.32764194e-05 + 0.00143440747
    b = b * z2 - 0.109536399
    b = b * z2 - 2.29716604
    root = tl.rsqrt(1.0 + tl.exp2(b * z))
    return z * root * root


@triton.jit
def _pixels(i_tile, n_pixels, HO, WO, BLOCK: tl.constexpr):
    """(row and column of a tile's output pixels, their image, the first pixel, which of them there are)."""
    first = tl.full((), BLOCK, tl.int64) * i_tile
    o_p = tl.arange(0, BLOCK)
    i_p = tl.minimum(first + o_p, n_pixels - 1).to(tl.int32)
    return i_p // WO % HO, i_p % WO, i_p // WO // HO, first, o_p < n_pixels - first


@triton.jit
def _load_vector(vector, o_c, C: tl.constexpr):
    return tl.load(vector + o_c, mask=o_c < C, other=0.0).to(tl.float32)


@triton.jit
def _stem_weight(weight, bias, o_k, o_c, K: tl.constexpr, C: tl.constexpr):
    """(K', C') of the convolution's weight in fp32; its bias as row K, zeros beyond."""
    m_c = (o_c < C)[None, :]
    b = tl.load(weight + o_c[None, :] * K + o_k[:, None], mask=m_c & (o_k < K)[:, None], other=0.0).to(tl.float32)
    return tl.where((o_k == K)[:, None], _load_vector(bias, o_c, C)[None, :], b)


@triton.jit
def _store_act(
    y, normed, o_y, o_c, b, b_weight, b_bias, m, C: tl.constexpr, GELU: tl.constexpr, EXACT: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Channels o_c of y = act(b weight + bias) for pixels from o_y (BLOCK, 1); b itself to normed where KEEP."""
    m_y = m[:, None] & (o_c < C)[None, :]
    if KEEP:
        tl.store(normed + o_y + o_c[None, :], b.to(normed.dtype.element_ty), mask=m_y)
    b = b * b_weight[None, :] + b_bias[None, :]
    if GELU:
        b = gelu(b, EXACT)
    tl.store(y + o_y + o_c[None, :], b.to(y.dtype.element_ty), mask=m_y)


@kernel(do_not_specialize=["n_pixels", "n_tiles", "H", "W", "HO", "WO", "s_b", "s_c", "s_h"])
def conv_norm_gelu_kernel(
    image, weight, bias, norm_weight, norm_bias, y, normed, rstd, n_pixels, n_tiles, H, W, HO, WO,
    s_b, s_c, s_h, s_w, eps,
    K: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, TYPE: tl.constexpr, DOT: tl.constexpr,
    EXACT: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = GELU(LayerNorm(conv(image) + bias)). image of any strides, K = 9 values a neighbourhood and input channel;
    weight (C, K), bias (C,); y (pixels, C). Channels 0 .. HEAD - 1 and the others are two tiles. Grid: any. KEEP: what
    the norm's weight and bias are applied to is left in normed (pixels, C), 1 / deviation in rstd (pixels,).

    The mean over channels is taken off the weight and the bias beforehand, so that it is never there to be subtracted:
    the mean of the C results is the result of the mean weight. The bias is a weight whose input is 1.
    """
    o_k, o_head, o_tail = tl.arange(0, BLOCK_K), tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else 16)
    w_head = _stem_weight(weight, bias, o_k, o_head, K, C)
    mean = tl.sum(w_head, 1)
    g_head, h_head = _load_vector(norm_weight, o_head, C), _load_vector(norm_bias, o_head, C)
    if TAIL:
        w_tail = _stem_weight(weight, bias, o_k, o_tail, K, C)
        mean += tl.sum(w_tail, 1)
        w_tail = tl.where((o_tail < C)[None, :], w_tail - (mean * (1.0 / C))[:, None], 0.0).to(TYPE).to(DOT)
        g_tail, h_tail = _load_vector(norm_weight, o_tail, C), _load_vector(norm_bias, o_tail, C)
    w_head = tl.where((o_head < C)[None, :], w_head - (mean * (1.0 / C))[:, None], 0.0).to(TYPE).to(DOT)

    i_dh, i_dw = o_k // 3 % 3, o_k % 3
    o_tap = o_k // 9 * s_c + i_dh * s_h + i_dw * s_w
    one = tl.where(o_k == K, 1.0, 0.0)
    for i_tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=1):
        i_h, i_w, i_b, first, m = _pixels(i_tile, n_pixels, HO, WO, BLOCK)
        i_h, i_w = 2 * i_h - 1, 2 * i_w - 1
        o_x = i_b.to(tl.int64) * s_b + i_h.to(tl.int64) * s_h + i_w.to(tl.int64) * s_w
        b_h, b_w = i_h[:, None] + i_dh[None, :], i_w[:, None] + i_dw[None, :]
        m_x = (b_h >= 0) & (b_h < H) & (b_w >= 0) & (b_w < W) & (o_k < K)[None, :]
        b_x = tl.load((image + o_x)[:, None] + o_tap[None, :], mask=m_x, other=one[None, :]).to(TYPE).to(DOT)
        b_head = tl.dot(b_x, w_head, input_precision="ieee")
        squares = tl.sum(b_head * b_head, 1)
        if TAIL:
            b_tail = tl.dot(b_x, w_tail, input_precision="ieee")
            squares += tl.sum(b_tail * b_tail, 1)
        scale = tl.rsqrt(squares * (1.0 / C) + eps)[:, None]
        if KEEP:
            tl.store(rstd + first + tl.arange(0, BLOCK)[:, None], scale, mask=m[:, None])
        o_y = first * C + tl.arange(0, BLOCK)[:, None] * C
        b_head *= scale
        _store_act(y, normed, o_y, o_head, b_head, g_head, h_head, m, C, True, EXACT, KEEP)
        if TAIL:
            b_tail *= scale
            _store_act(y, normed, o_y, o_tail, b_tail, g_tail, h_tail, m, C, True, EXACT, KEEP)


@kernel
def pack_kernel(
    weight, packed, n, s_o, s_i, s_h, s_w, CI: tl.constexpr, CO: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """packed (9 CI, CO) in its dtype, output channels as neighbours; weight (CO, CI, 3, 3) of any strides."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_c, i_tap, i_c = o % CO, o // (CI * CO), o // CO % CI
    o_w = o_c * s_o + i_c * s_i + i_tap // 3 * s_h + i_tap % 3 * s_w
    tl.store(packed + o, tl.load(weight + o_w, mask=o < n, other=0.0).to(packed.dtype.element_ty), mask=o < n)


@kernel(do_not_specialize=["n_pixels", "H", "W", "HO", "WO"])
def conv_norm_kernel(
    x, packed, bias, norm_weight, norm_bias, y, normed, rstd, n_pixels, H, W, HO, WO, eps,
    CI: tl.constexpr, CO: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, GELU: tl.constexpr,
    EXACT: tl.constexpr, KEEP: tl.constexpr, DOT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = LayerNorm(conv(x) + bias), and GELU of it where GELU.

    x (B, H, W, CI), packed (9 CI, CO), y (B, HO, WO, CO), all contiguous; bias and the norm's (CO,). Channels
    0 .. HEAD - 1 and the others are two tiles. KEEP: as in conv_norm_gelu_kernel. Grid: tiles of BLOCK output pixels.
    """
    i_h, i_w, i_b, first, m = _pixels(tl.program_id(0), n_pixels, HO, WO, BLOCK)
    i_h, i_w = 2 * i_h - 1, 2 * i_w - 1
    o_x = ((i_b.to(tl.int64) * H + i_h) * W + i_w) * CI
    o_head, o_tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else 16)
    b_head = tl.zeros((BLOCK, HEAD), tl.float32)
    if TAIL:
        b_tail = tl.zeros((BLOCK, TAIL), tl.float32)
    for k in tl.range(0, 9 * CI, BLOCK_K, num_stages=STAGES):
        # three neighbours in a row are 3 CI contiguous numbers
        o_k = k + tl.arange(0, BLOCK_K)
        i_dh = o_k // (3 * CI)
        i_dw = o_k // CI - 3 * i_dh
        b_h, b_w = i_h[:, None] + i_dh[None, :], i_w[:, None] + i_dw[None, :]
        m_k = o_k < 9 * CI
        m_x = (b_h >= 0) & (b_h < H) & (b_w >= 0) & (b_w < W) & m_k[None, :]
        b_x = tl.load((x + o_x)[:, None] + (i_dh * (W * CI - 3 * CI) + o_k)[None, :], mask=m_x, other=0.0)
        o_w = packed + o_k[:, None] * CO
        w_head = tl.load(o_w + o_head[None, :], mask=m_k[:, None] & (o_head < CO)[None, :], other=0.0)
        b_head = tl.dot(b_x.to(DOT), w_head.to(DOT), b_head, input_precision="ieee")
        if TAIL:
            w_tail = tl.load(o_w + o_tail[None, :], mask=m_k[:, None] & (o_tail < CO)[None, :], other=0.0)
            b_tail = tl.dot(b_x.to(DOT), w_tail.to(DOT), b_tail, input_precision="ieee")

    b_head += _load_vector(bias, o_head, CO)[None, :]
    mean = tl.sum(b_head, 1)
    if TAIL:
        b_tail += _load_vector(bias, o_tail, CO)[None, :]
        mean += tl.sum(b_tail, 1)
    mean = (mean * (1.0 / CO))[:, None]
    b_head = tl.where((o_head < CO)[None, :], b_head - mean, 0.0)
    squares = tl.sum(b_head * b_head, 1)
    if TAIL:
        b_tail = tl.where((o_tail < CO)[None, :], b_tail - mean, 0.0)
        squares += tl.sum(b_tail * b_tail, 1)
    scale = tl.rsqrt(squares * (1.0 / CO) + eps)[:, None]
    if KEEP:
        tl.store(rstd + first + tl.arange(0, BLOCK)[:, None], scale, mask=m[:, None])
    o_y = first * CO + tl.arange(0, BLOCK)[:, None] * CO
    b_head *= scale
    g_head, h_head = _load_vector(norm_weight, o_head, CO), _load_vector(norm_bias, o_head, CO)
    _store_act(y, normed, o_y, o_head, b_head, g_head, h_head, m, CO, GELU, EXACT, KEEP)
    if TAIL:
        b_tail *= scale
        g_tail, h_tail = _load_vector(norm_weight, o_tail, CO), _load_vector(norm_bias, o_tail, CO)
        _store_act(y, normed, o_y, o_tail, b_tail, g_tail, h_tail, m, CO, GELU, EXACT, KEEP)


def _columns(C: int) -> tuple[int, int]:
    """C channels as the widths of two tiles, 16 at least, the second 0 if the first holds them all."""
    head = max(16, triton.next_power_of_2(C + 1) // 2)
    return head, 0 if head >= C else max(16, triton.next_power_of_2(C - head))


def _tile(head: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(pixels, warps, inputs a step, steps in flight) of a program of `conv_norm_kernel`, as measured on an H200."""
    if dtype == torch.float32:  # without tensor cores, for correctness only
        return 32, 4, 16, 1
    if head <= 64:
        return 128, 4, 32, 3
    return (64, 4, 64, 3) if head <= 128 else (128, 8, 32, 4)


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _dot_type(dtype: torch.dtype, device: torch.device) -> tl.dtype:
    # on the CPU runs Triton's interpreter, which cannot multiply bf16 matrices
    return tl.float32 if device.type == "cpu" else _TYPES[dtype]


def conv_norm_gelu(
    image: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """GELU(LayerNorm(conv(image))), the convolution 3x3 of stride 2, zero-padded by 1. No gradients.

    Args:
        image: (B, CI, H, W) of any strides, floating point.
        conv_weight: (C, CI, 3, 3), conv_bias: (C,), norm_weight: (C,), norm_bias: (C,), of any floating dtype.
        eps: of the LayerNorm.
        dtype: in which image and weights are multiplied, and of the result: bf16, fp16 or fp32; sums are fp32.

    Returns:
        (B, ceil(H / 2), ceil(W / 2), C), contiguous.
    """
    return _conv_norm(image, conv_weight, conv_bias, norm_weight, norm_bias, eps, dtype, dtype, gelu=True)[0]


def conv_norm(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """LayerNorm(conv(x)), the convolution 3x3 of stride 2, zero-padded by 1. No gradients.

    Args:
        x: (B, H, W, CI), floating point; copied unless contiguous and in `dtype`.
        conv_weight: (C, CI, 3, 3), conv_bias: (C,), norm_weight: (C,), norm_bias: (C,), of any floating dtype.
        eps: of the LayerNorm.
        dtype: in which x and the weights are multiplied: bf16, fp16 or fp32; sums are fp32.
        out_dtype: of the result.

    Returns:
        (B, ceil(H / 2), ceil(W / 2), C), contiguous.
    """
    image = x.permute(0, 3, 1, 2)
    return _conv_norm(image, conv_weight, conv_bias, norm_weight, norm_bias, eps, dtype, out_dtype, gelu=False)[0]


def conv_norm_kept(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    gelu: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(conv(x)), GELU of it where `gelu`, and what their backward needs (see `ops.training`).

    x is (B, CI, H, W) of any strides; the other arguments, and the result's layout, as above.
    """
    return _conv_norm(x, conv_weight, conv_bias, norm_weight, norm_bias, eps, dtype, out_dtype, gelu, keep=True)


def _conv_norm(
    image, conv_weight, conv_bias, norm_weight, norm_bias, eps, dtype, out_dtype, gelu: bool, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, normed, rstd) of an image (B, CI, H, W); the last two empty unless `keep`."""
    B, CI, H, W = image.shape
    C, HO, WO = conv_weight.shape[0], (H + 1) // 2, (W + 1) // 2
    y = torch.empty((B, HO, WO, C), dtype=out_dtype, device=image.device)
    normed = torch.empty(y.shape if keep else 0, dtype=dtype, device=image.device)
    rstd = torch.empty(y.shape[:3] if keep else 0, dtype=torch.float32, device=image.device)
    if y.numel() == 0:
        return y, normed, rstd
    n_pixels = B * HO * WO
    head, tail = _columns(C)
    kept = (y, normed, rstd) if keep else (y, y, y)
    constants = {
        "HEAD": head, "TAIL": tail, "EXACT": dtype == torch.float32, "KEEP": keep,
        "DOT": _dot_type(dtype, image.device), "enable_fp_fusion": True,
    }  # fmt: skip
    if gelu and CI <= _FEW:
        n_tiles = triton.cdiv(n_pixels, _PIXELS)
        conv_norm_gelu_kernel[(min(n_tiles, _PROGRAMS),)](
            image, conv_weight.contiguous(), conv_bias, norm_weight, norm_bias, *kept,
            n_pixels, n_tiles, H, W, HO, WO, *image.stride(), eps,
            K=9 * CI, C=C, TYPE=_TYPES[dtype], BLOCK=_PIXELS, BLOCK_K=triton.next_power_of_2(9 * CI + 1), num_warps=4,
            maxnreg=128,  # four programs a multiprocessor instead of three: 0.117 ms instead of 0.126
            **constants,
        )  # fmt: skip
        return y, normed, rstd
    x = image.permute(0, 2, 3, 1).to(dtype).contiguous()
    packed = torch.empty((9 * CI, C), dtype=dtype, device=x.device)
    block, warps, block_k, stages = _tile(head, dtype)
    pack_kernel[(triton.cdiv(packed.numel(), 1024),)](
        conv_weight, packed, packed.numel(), *conv_weight.stride(), CI=CI, CO=C, BLOCK=1024
    )
    conv_norm_kernel[(triton.cdiv(n_pixels, block),)](
        x, packed, conv_bias, norm_weight, norm_bias, *kept, n_pixels, H, W, HO, WO, eps,
        CI=CI, CO=C, GELU=gelu, BLOCK=block, BLOCK_K=block_k, STAGES=stages, num_warps=warps, **constants,
    )  # fmt: skip
    return y, normed, rstd
