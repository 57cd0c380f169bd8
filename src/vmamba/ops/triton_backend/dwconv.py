"""Depthwise 3x3 convolution with SiLU of channels-last images, forward and backward.

A row of an image is W * E contiguous numbers, and a step to the next column is a step of E: so a row is cut into
blocks of neighbouring numbers whatever E is, and a program walks down one block, row after row. A row is loaded three
times (itself, one column to the left, one to the right; the second and third time from L1) and, from registers, given
to the three outputs that it takes part in. The images are walked as one tall image with a row of zeros between each
two, so that one program may walk several, with the weights loaded once; the row of zeros is never in memory.

Counted at (128, 56, 56, 96) in bf16: 77 MB a tensor at 4.3 TB/s, and instructions of the inner loops in sm_90 machine
code at 28.7e12 lanes a second (H200: 132 multiprocessors, 128 lanes, 1.7 GHz), every slot taken:

    forward       x -> y                             154 MB, 0.036 ms    25 instructions an element, 0.034 ms
    backward 1    gy, x -> gpre, gweight, gbias      231 MB, 0.054 ms    47                          0.063 ms
    backward 2    gpre -> gx, a forward              154 MB, 0.036 ms    19                          0.025 ms

One fused backward would save 154 MB, 0.036 ms. But the stencil over gpre needs it in three columns, and neighbouring
columns are in other lanes: each lane would make all three, twice more the 9 products and the 8 instructions of SiLU's
derivative, and the loads: at least 34 instructions an element, 0.046 ms, and registers for a second column on either
side.

Names: o_* offsets, b_* blocks in registers, i_* indices, m_* masks. Letters as in ops/README.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import kernel

__all__ = ["BACKWARD", "FORWARD", "Tile", "conv_backward", "conv_forward"]

LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """How a kernel cuts its work: numbers of a row a program, its warps, and rows in flight (1: only in registers)."""

    block: int
    warps: int
    stages: int
    programs: int = 4096  # walks are made this many or fewer, to load the weights seldom


# On an H200, 128 images at 224 px, the best or within 3% of it in every stage: 0.072, 0.039, 0.017 and 0.011 ms, a
# half of the bytes' speed (4096 programs: 0.074, 0.041, 0.020, 0.013; torch's convolution and SiLU: 0.215, 0.110,
# 0.054, 0.030)
FORWARD = Tile(block=256, warps=1, stages=1, programs=2048)
# likewise 0.206, 0.122 and 0.076 ms in the three large stages (2048 programs: 0.222, 0.128, 0.094; torch: 0.355,
# 0.258, 0.112)
BACKWARD = Tile(block=128, warps=1, stages=1, programs=4096)
# up to so many numbers of x, a few images of the network's sizes, nothing is walked
_FEW = 2**20
_FEW_CHANNELS = 32  # of a program, one for each lane of a warp


@triton.jit
def _sigmoid(b):
    """1 / (1 + exp(-b)) with the square of 1 / sqrt(.): two instructions where a quotient takes five."""
    root = tl.rsqrt(1.0 + tl.exp2(b * -LOG2E))
    return root * root


@triton.jit
def _columns(i_n, W, E: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """(offsets in a row of y, offsets in a row of x, channels, masks of left neighbour, itself, right neighbour)."""
    o_y = i_n * BLOCK + tl.arange(0, BLOCK)
    o_e = tl.max_contiguous(tl.multiple_of(o_y % E, VECTOR), VECTOR)
    o_x = tl.max_contiguous(tl.multiple_of(o_y // E * PITCH + o_e, VECTOR), VECTOR)
    m = o_y < W * E
    return o_y, o_x, o_e, m & (o_y >= E), m, o_y < (W - 1) * E


@triton.jit
def _both(m, condition):
    """m where the scalar condition holds, else nothing. (For m & condition, Triton's interpreter makes an integer.)"""
    return tl.where(condition, m, False)


@triton.jit
def _load_row(x, o_x, m_left, m, m_right, inside, PITCH: tl.constexpr):
    """A row of x with its left and right neighbours, zeros outside the image."""
    return (
        tl.load(x + o_x - PITCH, mask=_both(m_left, inside), other=0.0),
        tl.load(x + o_x, mask=_both(m, inside), other=0.0),
        tl.load(x + o_x + PITCH, mask=_both(m_right, inside), other=0.0),
    )


@triton.jit
def _load_weight(weight, o_e, E: tl.constexpr, TAP: tl.constexpr, SUM: tl.constexpr):
    return tl.load(weight + TAP * E + o_e).to(SUM)


@triton.jit
def _row_number(v, H):
    """(row of the tall image without zero rows at or after v, place in the image or H for a row of zeros); v >= -1."""
    i_b = (v + H + 1) // (H + 1) - 1
    return v - i_b, v - i_b * (H + 1)


@triton.jit
def _advance(row, h, H, step):
    """Pointer and place of the row after the one at place h; a row of zeros has no memory."""
    return row + tl.where(h < H, step, 0), tl.where(h < H, h + 1, 0)


@kernel(do_not_specialize=["H", "W", "n_rows", "n_each"])
def conv_forward_kernel(
    x, weight, bias, y, H, W, n_rows, n_each,
    E: tl.constexpr, PITCH: tl.constexpr, FLIP: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = act(conv(x) + bias) for n_each rows of the tall image of n_rows, and one block of a row.

    x (B, H, W, E), PITCH numbers from pixel to pixel; weight (9, E), last tap first where FLIP; bias (E,); y
    (B, H, W, E), contiguous. Grid: (blocks of a row, shares of the rows).
    """
    o_y, o_x, o_e, m_left, m, m_right = _columns(tl.program_id(0), W, E, PITCH, BLOCK, VECTOR)
    LAST: tl.constexpr = 8 if FLIP else 0
    SIGN: tl.constexpr = -1 if FLIP else 1
    w00 = _load_weight(weight, o_e, E, LAST, SUM)
    w01 = _load_weight(weight, o_e, E, LAST + SIGN, SUM)
    w02 = _load_weight(weight, o_e, E, LAST + SIGN * 2, SUM)
    w10 = _load_weight(weight, o_e, E, LAST + SIGN * 3, SUM)
    w11 = _load_weight(weight, o_e, E, 4, SUM)
    w12 = _load_weight(weight, o_e, E, LAST + SIGN * 5, SUM)
    w20 = _load_weight(weight, o_e, E, LAST + SIGN * 6, SUM)
    w21 = _load_weight(weight, o_e, E, LAST + SIGN * 7, SUM)
    w22 = _load_weight(weight, o_e, E, LAST + SIGN * 8, SUM)
    if HAS_BIAS:
        b_bias = tl.load(bias + o_e).to(SUM)
    else:
        b_bias = tl.zeros((BLOCK,), SUM)

    first = tl.program_id(1) * n_each
    last = tl.minimum(first + n_each, n_rows)
    x_step, y_step = (W * PITCH).to(tl.int64), (W * E).to(tl.int64)
    i_row, _ = _row_number(first, H)
    y += i_row * y_step
    i_row, h = _row_number(first - 1, H)
    x += i_row * x_step
    left, centre, right = _load_row(x, o_x, m_left, m, m_right, h < H, PITCH)
    left, centre, right = left.to(SUM), centre.to(SUM), right.to(SUM)
    b_above = b_bias  # sums of the row above v, and of v, as far as they are known
    b_here = b_bias
    for v in tl.range(first - 1, last + 1, num_stages=STAGES):
        # the row above v is a row of zeros where v is the first of an image
        m_store = (v > first) & (h > 0)
        x, h = _advance(x, h, H, x_step)
        next_left, next_centre, next_right = _load_row(x, o_x, m_left, m, m_right, (h < H) & (v < last), PITCH)
        b_y = b_above + w20 * left + w21 * centre + w22 * right
        b_above = b_here + w10 * left + w11 * centre + w12 * right
        b_here = b_bias + w00 * left + w01 * centre + w02 * right
        if SILU:
            b_y *= _sigmoid(b_y)
        tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=_both(m, m_store))
        y += tl.where(m_store, y_step, 0)
        left, centre, right = next_left.to(SUM), next_centre.to(SUM), next_right.to(SUM)


@kernel(do_not_specialize=["H", "W"])
def conv_few_kernel(
    x, weight, bias, y, H, W,
    E: tl.constexpr, PITCH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, SUM: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = act(conv(x) + bias) for a part of a row and of the channels, where there is too little to walk.

    All loads are under way at once, and the weight (E, 9) is read as it lies, so no launch before this one lays it
    out. Shapes as in `conv_forward_kernel`. Grid: B * H * parts of a row * parts of the channels, the last fastest.
    """
    N_E: tl.constexpr = (E + CHANNELS - 1) // CHANNELS
    i = tl.program_id(0)
    i_e, i = i % N_E, i // N_E
    n_w = (W + PIXELS - 1) // PIXELS
    i_w, i_row = i % n_w, i // n_w
    i_h = i_row % H
    o_e = i_e * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    o_w = i_w * PIXELS + tl.arange(0, PIXELS)[:, None]
    m_e = o_e < E
    x += i_row.to(tl.int64) * W * PITCH + o_w * PITCH + o_e
    if HAS_BIAS:
        b_y = tl.load(bias + o_e, mask=m_e, other=0.0).to(SUM)
    else:
        b_y = tl.zeros((1, CHANNELS), SUM)
    for tap in tl.static_range(9):
        b_w = tl.load(weight + o_e * 9 + tap, mask=m_e, other=0.0).to(SUM)
        i_x, o_x = i_h + (tap // 3 - 1), o_w + (tap % 3 - 1)
        m = m_e & (o_x >= 0) & (o_x < W) & (i_x >= 0) & (i_x < H)
        b_x = tl.load(x + ((tap // 3 - 1) * W + (tap % 3 - 1)) * PITCH, mask=m, other=0.0)
        b_y = b_y + b_w * b_x.to(SUM)
    if SILU:
        b_y *= _sigmoid(b_y)
    y += (i_row.to(tl.int64) * W + o_w) * E + o_e
    tl.store(y, b_y.to(y.dtype.element_ty), mask=m_e & (o_w < W))


@kernel(do_not_specialize=["H", "W", "n_rows", "n_each"])
def conv_backward_kernel(
    gy, x, weight, bias, gpre, partials, H, W, n_rows, n_each,
    E: tl.constexpr, PITCH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """gpre = gy * act'(conv(x) + bias), and this program's share of the gradients of weight and bias.

    gy, gpre (B, H, W, E), contiguous, gpre written only where SILU (else it is gy); partials (shares of the rows, 10,
    W * E), for each column: nine sums of gpre * x, one a tap, and the sum of gpre. Grid: (blocks of a row, shares of
    the rows).
    """
    o_y, o_x, o_e, m_left, m, m_right = _columns(tl.program_id(0), W, E, PITCH, BLOCK, VECTOR)
    if SILU:
        w00 = _load_weight(weight, o_e, E, 0, SUM)
        w01 = _load_weight(weight, o_e, E, 1, SUM)
        w02 = _load_weight(weight, o_e, E, 2, SUM)
        w10 = _load_weight(weight, o_e, E, 3, SUM)
        w11 = _load_weight(weight, o_e, E, 4, SUM)
        w12 = _load_weight(weight, o_e, E, 5, SUM)
        w20 = _load_weight(weight, o_e, E, 6, SUM)
        w21 = _load_weight(weight, o_e, E, 7, SUM)
        w22 = _load_weight(weight, o_e, E, 8, SUM)
        if HAS_BIAS:
            b_bias = tl.load(bias + o_e).to(SUM)
        else:
            b_bias = tl.zeros((BLOCK,), SUM)

    first = tl.program_id(1) * n_each
    last = tl.minimum(first + n_each, n_rows)
    x_step, y_step = (W * PITCH).to(tl.int64), (W * E).to(tl.int64)
    i_row, h_here = _row_number(first, H)
    gy += i_row * y_step
    gpre += i_row * y_step
    b_g = tl.load(gy + o_y, mask=_both(m, h_here < H), other=0.0).to(SUM)
    # the rows above v, v itself and below v, each with its neighbours
    i_row, h = _row_number(first - 1, H)
    x += i_row * x_step
    x00, x01, x02 = _load_row(x, o_x, m_left, m, m_right, h < H, PITCH)
    x, h = _advance(x, h, H, x_step)
    x10, x11, x12 = _load_row(x, o_x, m_left, m, m_right, h < H, PITCH)
    x, h = _advance(x, h, H, x_step)
    x20, x21, x22 = _load_row(x, o_x, m_left, m, m_right, h < H, PITCH)
    x00, x01, x02 = x00.to(SUM), x01.to(SUM), x02.to(SUM)
    x10, x11, x12 = x10.to(SUM), x11.to(SUM), x12.to(SUM)
    x20, x21, x22 = x20.to(SUM), x21.to(SUM), x22.to(SUM)
    s00 = tl.zeros((BLOCK,), SUM)
    s01, s02, s10, s11, s12, s20, s21, s22, s_bias = s00, s00, s00, s00, s00, s00, s00, s00, s00
    for v in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=3):
        x, h = _advance(x, h, H, x_step)
        next_left, next_centre, next_right = _load_row(x, o_x, m_left, m, m_right, (h < H) & (v + 1 < last), PITCH)
        gy, h_next = _advance(gy, h_here, H, y_step)
        b_next = tl.load(gy + o_y, mask=_both(m, (h_next < H) & (v + 1 < last)), other=0.0)
        if SILU:
            b_pre = b_bias + w00 * x00 + w01 * x01 + w02 * x02
            b_pre = b_pre + w10 * x10 + w11 * x11 + w12 * x12
            b_pre = b_pre + w20 * x20 + w21 * x21 + w22 * x22
            b_sigmoid = _sigmoid(b_pre)
            b_g *= b_sigmoid + b_pre * b_sigmoid * (1.0 - b_sigmoid)
            tl.store(gpre + o_y, b_g.to(gpre.dtype.element_ty), mask=_both(m, h_here < H))
            gpre, _ = _advance(gpre, h_here, H, y_step)
        s00 += b_g * x00
        s01 += b_g * x01
        s02 += b_g * x02
        s10 += b_g * x10
        s11 += b_g * x11
        s12 += b_g * x12
        s20 += b_g * x20
        s21 += b_g * x21
        s22 += b_g * x22
        s_bias += b_g
        x00, x01, x02 = x10, x11, x12
        x10, x11, x12 = x20, x21, x22
        x20, x21, x22 = next_left.to(SUM), next_centre.to(SUM), next_right.to(SUM)
        b_g = b_next.to(SUM)
        h_here = h_next

    partials += tl.program_id(1) * 10 * y_step + o_y
    tl.store(partials, s00, mask=m)
    tl.store(partials + y_step, s01, mask=m)
    tl.store(partials + 2 * y_step, s02, mask=m)
    tl.store(partials + 3 * y_step, s10, mask=m)
    tl.store(partials + 4 * y_step, s11, mask=m)
    tl.store(partials + 5 * y_step, s12, mask=m)
    tl.store(partials + 6 * y_step, s20, mask=m)
    tl.store(partials + 7 * y_step, s21, mask=m)
    tl.store(partials + 8 * y_step, s22, mask=m)
    tl.store(partials + 9 * y_step, s_bias, mask=m)


class _Plan:
    """How one call is cut up, and the constants that its kernels are compiled for."""

    def __init__(self, x: Tensor, pitch: int, tile: Tile):
        self.B, self.H, self.W, self.E = x.shape
        blocks = triton.cdiv(self.W * self.E, tile.block)
        self.n_rows = self.B * (self.H + 1) - 1  # with a row of zeros between images
        self.n_each = triton.cdiv(self.n_rows, max(1, min(self.n_rows, tile.programs // blocks)))
        self.shares = triton.cdiv(self.n_rows, self.n_each)
        self.grid = (blocks, self.shares)
        self.sizes = (self.H, self.W, self.n_rows, self.n_each)
        self.sum_dtype = torch.promote_types(x.dtype, torch.float32)
        self.constants = {
            "E": self.E,
            "PITCH": pitch,
            "SUM": tl.float64 if self.sum_dtype == torch.float64 else tl.float32,
            "BLOCK": tile.block,
            "VECTOR": math.gcd(self.E, pitch, 16),
            "STAGES": tile.stages,
            "num_warps": tile.warps,
            "enable_fp_fusion": True,  # Triton means to change its default, and half of the arithmetic is a * b + c
        }


def _pitched(x: Tensor) -> tuple[Tensor, int]:
    """x and the distance from pixel to pixel, the same everywhere; a copy of x where there is none."""
    _, H, W, _ = x.shape
    pitch = x.stride(2)
    if pitch < x.shape[3] or x.stride() != (H * W * pitch, W * pitch, pitch, 1):
        return x.contiguous(), x.shape[3]
    return x, pitch


def _taps(weight: Tensor) -> Tensor:
    """(9, E), so that the weights of neighbouring channels are neighbours."""
    return weight.flatten(1).t().contiguous()


def _convolve(x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool, flip: bool, tile: Tile) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x, pitch = _pitched(x)
    plan = _Plan(x, pitch, tile)
    conv_forward_kernel[plan.grid](
        x, taps, taps if bias is None else bias, y, *plan.sizes,
        FLIP=flip, SILU=silu, HAS_BIAS=bias is not None, **plan.constants,
    )  # fmt: skip
    return y


def _convolve_few(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    B, H, W, E = x.shape
    x, pitch = _pitched(x)
    weight = weight.contiguous()
    pixels = min(32, max(8, triton.next_power_of_2(W)))
    conv_few_kernel[(B * H * triton.cdiv(W, pixels) * triton.cdiv(E, _FEW_CHANNELS),)](
        x, weight, weight if bias is None else bias, y, H, W,
        E=E, PITCH=pitch, SILU=silu, HAS_BIAS=bias is not None,
        SUM=tl.float64 if x.dtype == torch.float64 else tl.float32,
        PIXELS=pixels, CHANNELS=_FEW_CHANNELS, num_warps=pixels // 8, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, tile: Tile | None = None
) -> Tensor:  # fmt: skip
    """act(conv(x) + bias) (see `dispatch.Backend`), contiguous. weight and bias may be of another dtype than x.

    tile: walk down columns in such tiles; otherwise done only where x is not small.
    """
    if tile is None and 0 < x.numel() <= _FEW:
        return _convolve_few(x, weight, bias, activation == "silu")
    tile = tile or FORWARD
    return _convolve(x, _taps(weight), bias, activation == "silu", False, tile)


def conv_backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    tile: Tile = BACKWARD,
    tile_gx: Tile = FORWARD,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (see `dispatch.Backend`), from x itself: the sums before SiLU are made again."""
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight[:, 0, 0, 0])
    silu, taps = activation == "silu", _taps(weight)
    gy, (x, pitch) = gy.contiguous(), _pitched(x)
    gpre = torch.empty_like(gy) if silu else gy
    plan = _Plan(x, pitch, tile)
    partials = torch.empty((plan.shares, 10, plan.W, plan.E), dtype=plan.sum_dtype, device=x.device)
    conv_backward_kernel[plan.grid](
        gy, x, taps, taps if bias is None else bias, gpre, partials, *plan.sizes,
        SILU=silu, HAS_BIAS=bias is not None, **plan.constants,
    )  # fmt: skip
    gx = _convolve(gpre, taps, None, False, True, tile_gx)
    sums = partials.sum((0, 2))  # (10, E)
    return gx, sums[:9].t().reshape(weight.shape).to(weight.dtype), sums[9].to(weight.dtype)
