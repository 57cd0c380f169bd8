"""Depthwise 3x3 convolution with SiLU of channels-last images, forward and backward.

A program makes pairs of rows for 32 channels and walks along them, column after column. A column of a pair is four
numbers a channel: each is read once, turned to fp32 once and given from registers to the up to six results that it
takes part in. Two columns are in flight while one is worked on. Rows are paired within an image, and a program's pairs
may be of several images.

Counted at (128, 56, 56, 96) in bf16: 77 MB a tensor at 4.3 TB/s, and instructions of the inner loops in sm_90 machine
code at 28.7e12 lanes a second (H200: 132 multiprocessors, 128 lanes, 1.7 GHz), every slot taken:

    forward       x -> y                             154 MB, 0.036 ms    23 instructions an element, 0.031 ms
    backward 1    gy, x -> gpre, gweight, gbias      231 MB, 0.054 ms    39                          0.052 ms
    backward 2    gpre -> gx, a forward              154 MB, 0.036 ms    17                          0.023 ms

Names: o_* offsets, b_* blocks in registers, i_* indices, m_* masks. Letters as in ops/README.md.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BACKWARD", "FORWARD", "Tile", "conv_backward", "conv_forward"]

LOG2E = tl.constexpr(1.4426950408889634)
_CHANNELS = 32  # of a program: 64 bytes of a pixel in bf16


class Tile(NamedTuple):
    """How a kernel cuts its work: pairs of rows a program, and as few columns that there are so many programs."""

    pairs: int
    programs: int


FORWARD = Tile(pairs=4, programs=2048)
BACKWARD = Tile(pairs=4, programs=2048)


@triton.jit
def _sigmoid(b):
    """1 / (1 + exp(-b)) with the square of 1 / sqrt(.): two instructions where a quotient takes five."""
    root = tl.rsqrt(1.0 + tl.exp2(b * -LOG2E))
    return root * root


@triton.jit
def _channels(E: tl.constexpr, BLOCK_E: tl.constexpr):
    """(the channels of this program, its place among those of the same channels, how many those are)."""
    N_BLOCKS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    o_e = tl.program_id(0) % N_BLOCKS * BLOCK_E + tl.arange(0, BLOCK_E)
    return o_e, tl.program_id(0) // N_BLOCKS, tl.num_programs(0) // N_BLOCKS


@triton.jit
def _pairs(i_tile, o_e, H, n_pairs, E: tl.constexpr, PAIRS: tl.constexpr):
    """Rows of the pairs of a tile, counted from the first of them, and that row of all rows; masks (pairs, channels) of
    the row above a pair, of its two, of the row below."""
    n_each = (H + 1) // 2  # pairs of an image
    first = i_tile * PAIRS
    i_pair = first + tl.arange(0, PAIRS)
    i_h = i_pair % n_each * 2
    i_row = (i_pair // n_each - first // n_each) * H + i_h - first % n_each * 2
    first_row = tl.full((), H, tl.int64) * (first // n_each) + first % n_each * 2
    m = (i_pair < n_pairs)[:, None] & (o_e < E)[None, :]
    return i_row, first_row, m & (i_h > 0)[:, None], m, m & (i_h + 1 < H)[:, None], m & (i_h + 2 < H)[:, None]


@triton.jit
def _columns(W, n_columns):
    """The columns that a program walks, by its second number."""
    first = tl.program_id(1) * n_columns
    return first, tl.minimum(first + n_columns, W)


@triton.jit
def _both(m, condition):
    """m where the scalar condition holds, else nothing. (For m & condition, Triton's interpreter makes an integer.)"""
    return tl.where(condition, m, False)


@triton.jit
def _load_column(x, o_x, row, m0, m1, m2, m3, inside):
    """A column of a pair of rows and of those around it, zeros outside the image."""
    return (
        tl.load(x - row + o_x, mask=_both(m0, inside), other=0.0),
        tl.load(x + o_x, mask=_both(m1, inside), other=0.0),
        tl.load(x + row + o_x, mask=_both(m2, inside), other=0.0),
        tl.load(x + 2 * row + o_x, mask=_both(m3, inside), other=0.0),
    )


@triton.jit
def _load_vector(vector, o_e, E: tl.constexpr, SUM: tl.constexpr):
    return tl.load(vector, mask=o_e < E, other=0.0).to(SUM)[None, :]


@triton.jit(do_not_specialize=["H", "W", "n_pairs", "n_columns"])
def conv_forward_kernel(
    x, weight, bias, y, H, W, n_pairs, n_columns,
    E: tl.constexpr, PITCH: tl.constexpr, FLIP: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr, PAIRS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y = act(conv(x) + bias) for one tile of pairs of rows, one block of channels and n_columns columns.

    x (B, H, W, E), PITCH numbers from pixel to pixel; weight (E, 9), the last tap first where FLIP; bias (E,); y
    (B, H, W, E), contiguous. Grid: (tiles of pairs * blocks of channels, shares of the columns).
    """
    o_e, i_tile, _ = _channels(E, BLOCK_E)
    LAST: tl.constexpr = 8 if FLIP else 0
    SIGN: tl.constexpr = -1 if FLIP else 1
    o_w = weight + o_e * 9 + LAST
    w00 = _load_vector(o_w, o_e, E, SUM)
    w01 = _load_vector(o_w + SIGN, o_e, E, SUM)
    w02 = _load_vector(o_w + SIGN * 2, o_e, E, SUM)
    w10 = _load_vector(o_w + SIGN * 3, o_e, E, SUM)
    w11 = _load_vector(o_w + SIGN * 4, o_e, E, SUM)
    w12 = _load_vector(o_w + SIGN * 5, o_e, E, SUM)
    w20 = _load_vector(o_w + SIGN * 6, o_e, E, SUM)
    w21 = _load_vector(o_w + SIGN * 7, o_e, E, SUM)
    w22 = _load_vector(o_w + SIGN * 8, o_e, E, SUM)
    b_bias = tl.zeros((PAIRS, BLOCK_E), SUM)
    if HAS_BIAS:
        b_bias += _load_vector(bias + o_e, o_e, E, SUM)

    i_row, first_row, m0, m1, m2, m3 = _pairs(i_tile, o_e, H, n_pairs, E, PAIRS)
    first, last = _columns(W, n_columns)
    x_row, y_row = W * PITCH, W * E
    x += (first_row * W + first) * PITCH
    y += (first_row * W + first) * E
    o_x, o_y = i_row[:, None] * x_row + o_e[None, :], i_row[:, None] * y_row + o_e[None, :]
    x0, x1, x2, x3 = _load_column(x - PITCH, o_x, x_row, m0, m1, m2, m3, first > 0)
    next0, next1, next2, next3 = _load_column(x, o_x, x_row, m0, m1, m2, m3, True)
    # sums, as far as they are known, of the column left of the one that comes and of its own, for each row of a pair
    left0, left1, here0, here1 = b_bias, b_bias, b_bias, b_bias
    for i in tl.range(first - 1, last + 1, loop_unroll_factor=2):
        x += PITCH
        b0, b1, b2, b3 = x0.to(SUM), x1.to(SUM), x2.to(SUM), x3.to(SUM)
        x0, x1, x2, x3 = next0, next1, next2, next3
        next0, next1, next2, next3 = _load_column(x, o_x, x_row, m0, m1, m2, m3, (i + 2 < W) & (i + 2 <= last))
        y0 = left0 + w02 * b0 + w12 * b1 + w22 * b2
        y1 = left1 + w02 * b1 + w12 * b2 + w22 * b3
        left0 = here0 + w01 * b0 + w11 * b1 + w21 * b2
        left1 = here1 + w01 * b1 + w11 * b2 + w21 * b3
        here0 = b_bias + w00 * b0 + w10 * b1 + w20 * b2
        here1 = b_bias + w00 * b1 + w10 * b2 + w20 * b3
        if SILU:
            y0 *= _sigmoid(y0)
            y1 *= _sigmoid(y1)
        o_column = y + (i - 1 - first) * E
        tl.store(o_column + o_y, y0.to(y.dtype.element_ty), mask=_both(m1, i > first))
        tl.store(o_column + y_row + o_y, y1.to(y.dtype.element_ty), mask=_both(m2, i > first))


@triton.jit(do_not_specialize=["H", "W", "n_pairs", "n_columns", "n_tiles"])
def conv_backward_kernel(
    gy, x, weight, bias, gpre, partials, H, W, n_pairs, n_columns, n_tiles,
    E: tl.constexpr, PITCH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr, PAIRS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """gpre = gy * act'(conv(x) + bias), and this program's share of the gradients of weight and bias.

    gy, gpre (B, H, W, E), contiguous, gpre written only where SILU (else it is gy); partials (shares of the columns,
    programs of the same channels, 10, E): nine sums of gpre * x, one a tap, and the sum of gpre. Grid: (shares of the
    tiles of pairs * blocks of channels, shares of the columns).
    """
    o_e, i_share, n_shares = _channels(E, BLOCK_E)
    if SILU:
        o_w = weight + o_e * 9
        w00 = _load_vector(o_w, o_e, E, SUM)
        w01 = _load_vector(o_w + 1, o_e, E, SUM)
        w02 = _load_vector(o_w + 2, o_e, E, SUM)
        w10 = _load_vector(o_w + 3, o_e, E, SUM)
        w11 = _load_vector(o_w + 4, o_e, E, SUM)
        w12 = _load_vector(o_w + 5, o_e, E, SUM)
        w20 = _load_vector(o_w + 6, o_e, E, SUM)
        w21 = _load_vector(o_w + 7, o_e, E, SUM)
        w22 = _load_vector(o_w + 8, o_e, E, SUM)
        b_bias = tl.zeros((PAIRS, BLOCK_E), SUM)
        if HAS_BIAS:
            b_bias += _load_vector(bias + o_e, o_e, E, SUM)

    first, last = _columns(W, n_columns)
    x_row, y_row = W * PITCH, W * E
    s00 = tl.zeros((PAIRS, BLOCK_E), SUM)
    s01, s02, s10, s11, s12, s20, s21, s22, s_bias = s00, s00, s00, s00, s00, s00, s00, s00, s00
    for i_tile in tl.range(i_share, n_tiles, n_shares):
        i_row, first_row, m0, m1, m2, m3 = _pairs(i_tile, o_e, H, n_pairs, E, PAIRS)
        o_x, o_y = i_row[:, None] * x_row + o_e[None, :], i_row[:, None] * y_row + o_e[None, :]
        x_tile, o_tile = x + (first_row * W + first) * PITCH, (first_row * W + first) * E
        # three columns of x, of them the last one on its way
        x00, x10, x20, x30 = _load_column(x_tile - PITCH, o_x, x_row, m0, m1, m2, m3, first > 0)
        x01, x11, x21, x31 = _load_column(x_tile, o_x, x_row, m0, m1, m2, m3, True)
        next0, next1, next2, next3 = _load_column(x_tile + PITCH, o_x, x_row, m0, m1, m2, m3, first + 1 < W)
        g0 = tl.load(gy + o_tile + o_y, mask=m1, other=0.0)
        g1 = tl.load(gy + o_tile + y_row + o_y, mask=m2, other=0.0)
        x00, x10, x20, x30 = x00.to(SUM), x10.to(SUM), x20.to(SUM), x30.to(SUM)
        x01, x11, x21, x31 = x01.to(SUM), x11.to(SUM), x21.to(SUM), x31.to(SUM)
        for i in tl.range(first, last, loop_unroll_factor=3):
            x02, x12, x22, x32 = next0.to(SUM), next1.to(SUM), next2.to(SUM), next3.to(SUM)
            x_column, o_column = x_tile + (i - first + 2) * PITCH, o_tile + (i - first) * E
            next0, next1, next2, next3 = _load_column(
                x_column, o_x, x_row, m0, m1, m2, m3, (i + 2 < W) & (i + 1 < last)
            )
            b_g0, b_g1 = g0.to(SUM), g1.to(SUM)
            g0 = tl.load(gy + o_column + E + o_y, mask=_both(m1, i + 1 < last), other=0.0)
            g1 = tl.load(gy + o_column + E + y_row + o_y, mask=_both(m2, i + 1 < last), other=0.0)
            if SILU:
                pre0 = b_bias + w00 * x00 + w01 * x01 + w02 * x02
                pre1 = b_bias + w00 * x10 + w01 * x11 + w02 * x12
                pre0 = pre0 + w10 * x10 + w11 * x11 + w12 * x12
                pre1 = pre1 + w10 * x20 + w11 * x21 + w12 * x22
                pre0 = pre0 + w20 * x20 + w21 * x21 + w22 * x22
                pre1 = pre1 + w20 * x30 + w21 * x31 + w22 * x32
                sigmoid0, sigmoid1 = _sigmoid(pre0), _sigmoid(pre1)
                b_g0 *= sigmoid0 + sigmoid0 * (pre0 - pre0 * sigmoid0)
                b_g1 *= sigmoid1 + sigmoid1 * (pre1 - pre1 * sigmoid1)
                tl.store(gpre + o_column + o_y, b_g0.to(gpre.dtype.element_ty), mask=m1)
                tl.store(gpre + o_column + y_row + o_y, b_g1.to(gpre.dtype.element_ty), mask=m2)
            # one product after another: a sum of two products would be a multiplication and an addition more
            s00 = s00 + b_g0 * x00 + b_g1 * x10
            s01 = s01 + b_g0 * x01 + b_g1 * x11
            s02 = s02 + b_g0 * x02 + b_g1 * x12
            s10 = s10 + b_g0 * x10 + b_g1 * x20
            s11 = s11 + b_g0 * x11 + b_g1 * x21
            s12 = s12 + b_g0 * x12 + b_g1 * x22
            s20 = s20 + b_g0 * x20 + b_g1 * x30
            s21 = s21 + b_g0 * x21 + b_g1 * x31
            s22 = s22 + b_g0 * x22 + b_g1 * x32
            s_bias += b_g0 + b_g1
            x00, x10, x20, x30 = x01, x11, x21, x31
            x01, x11, x21, x31 = x02, x12, x22, x32

    i_share += tl.program_id(1) * n_shares
    partials += tl.full((), 10 * E, tl.int64) * i_share + o_e
    m = o_e < E
    tl.store(partials, tl.sum(s00, 0), mask=m)
    tl.store(partials + E, tl.sum(s01, 0), mask=m)
    tl.store(partials + 2 * E, tl.sum(s02, 0), mask=m)
    tl.store(partials + 3 * E, tl.sum(s10, 0), mask=m)
    tl.store(partials + 4 * E, tl.sum(s11, 0), mask=m)
    tl.store(partials + 5 * E, tl.sum(s12, 0), mask=m)
    tl.store(partials + 6 * E, tl.sum(s20, 0), mask=m)
    tl.store(partials + 7 * E, tl.sum(s21, 0), mask=m)
    tl.store(partials + 8 * E, tl.sum(s22, 0), mask=m)
    tl.store(partials + 9 * E, tl.sum(s_bias, 0), mask=m)


@triton.jit(do_not_specialize=["n_shares"])
def sum_kernel(
    partials, g_weight, g_bias, n_shares, E: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """g_weight (E, 9) and g_bias (E,) in their dtype from partials (n_shares, 10, E). Grid: blocks of the 10 E."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_share = tl.arange(0, SHARES)
    b = tl.zeros((SHARES, BLOCK), partials.dtype.element_ty)
    for first in tl.range(0, n_shares, SHARES):
        m = (first + i_share < n_shares)[:, None] & (o < 10 * E)[None, :]
        row = (first + i_share).to(tl.int64) * (10 * E)
        b += tl.load(partials + row[:, None] + o[None, :], mask=m, other=0.0)
    b_sum = tl.sum(b, 0)
    i_tap, o_e = o // E, o % E
    tl.store(g_weight + o_e * 9 + i_tap, b_sum.to(g_weight.dtype.element_ty), mask=i_tap < 9)
    tl.store(g_bias + o_e, b_sum.to(g_bias.dtype.element_ty), mask=i_tap == 9)


class _Plan:
    """How one call is cut up, and the constants that its kernels are compiled for."""

    def __init__(self, x: Tensor, pitch: int, tile: Tile):
        B, H, W, E = x.shape
        n_pairs = B * ((H + 1) // 2)
        block = min(_CHANNELS, triton.next_power_of_2(E))
        self.n_tiles, n_blocks = triton.cdiv(n_pairs, tile.pairs), triton.cdiv(E, block)
        n_columns = triton.cdiv(W, min(W, triton.cdiv(tile.programs, self.n_tiles * n_blocks)))
        column_shares = triton.cdiv(W, n_columns)
        self.grid = (self.n_tiles * n_blocks, column_shares)
        # of a kernel whose programs take several tiles: as many programs as asked for, and all with as many tiles
        n_each = triton.cdiv(self.n_tiles, max(1, tile.programs // n_blocks))
        tile_shares = triton.cdiv(self.n_tiles, n_each)
        self.grid_of_shares = (tile_shares * n_blocks, column_shares)
        self.n_shares = tile_shares * column_shares
        self.sizes = (H, W, n_pairs, n_columns)
        self.sum_dtype = torch.promote_types(x.dtype, torch.float32)
        self.constants = {
            "E": E,
            "PITCH": pitch,
            "SUM": tl.float64 if self.sum_dtype == torch.float64 else tl.float32,
            "PAIRS": tile.pairs,
            "BLOCK_E": block,
            "num_warps": 1,
            "enable_fp_fusion": True,  # Triton means to change its default, and half of the arithmetic is a * b + c
        }


def _pitched(x: Tensor) -> tuple[Tensor, int]:
    """x and the distance from pixel to pixel, the same everywhere; a copy of x where there is none."""
    _, H, W, _ = x.shape
    pitch = x.stride(2)
    if pitch < x.shape[3] or x.stride() != (H * W * pitch, W * pitch, pitch, 1):
        return x.contiguous(), x.shape[3]
    return x, pitch


def _on_its_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, flip: bool, tile: Tile) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x, pitch = _pitched(x)
    plan = _Plan(x, pitch, tile)
    with _on_its_device(x):
        conv_forward_kernel[plan.grid](
            x, weight, weight if bias is None else bias, y, *plan.sizes,
            FLIP=flip, SILU=silu, HAS_BIAS=bias is not None, **plan.constants,
        )  # fmt: skip
    return y


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, tile: Tile = FORWARD) -> Tensor:
    """act(conv(x) + bias) (see `dispatch.Backend`), contiguous; weight and bias may have a dtype of their own."""
    return _convolve(x, weight.contiguous(), bias, activation == "silu", False, tile)


def conv_backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    tile: Tile = BACKWARD,
    tile_gx: Tile = FORWARD,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (see `dispatch.Backend`), from x itself: the sums before SiLU are made again.

    Weight and bias may have a dtype of their own, in which their gradients are.
    """
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight[:, 0, 0, 0])
    silu, weight = activation == "silu", weight.contiguous()
    gy, (x, pitch) = gy.contiguous(), _pitched(x)
    gpre = torch.empty_like(gy) if silu else gy
    plan = _Plan(x, pitch, tile)
    E = x.shape[3]
    partials = torch.empty((plan.n_shares, 10, E), dtype=plan.sum_dtype, device=x.device)
    g_weight, g_bias = torch.empty_like(weight), weight.new_empty(E)
    with _on_its_device(x):
        conv_backward_kernel[plan.grid_of_shares](
            gy, x, weight, weight if bias is None else bias, gpre, partials, *plan.sizes, plan.n_tiles,
            SILU=silu, HAS_BIAS=bias is not None, **plan.constants,
        )  # fmt: skip
        sum_kernel[(triton.cdiv(10 * E, 16),)](partials, g_weight, g_bias, plan.n_shares, E=E, SHARES=128, BLOCK=16)
    return _convolve(gpre, weight, None, False, True, tile_gx), g_weight, g_bias
