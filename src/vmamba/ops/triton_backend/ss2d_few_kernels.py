"""The fused SS2D forward for N = 1 and few walks: a whole walk, or a long piece of one, by several warps at once.

One program walks one route for 16 channels. A tile is (8, Y, S, 2): groups of two channels, Y = 4 times the warps runs
of S steps each, the steps of a run, channels of a group. The first two axes are the lanes and warps, the others are in
a lane's registers. A lane walks its run from zero, the runs are composed over lanes and warps, and a lane walks its run
once more from the right state. With 8 warps and 8 steps a tile is 256 steps, all of a 14 x 14 map: no table of pixels,
no segments, one launch, and what it takes is the latency of its loads and of one exchange.

The product that makes delta has its columns numbered as the tensor cores hand them out (two neighbours to a lane, 8 to
a warp), so that a lane receives the steps of its own run. Names as in `ss2d_tiles`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .ss2d_one_kernels import _product, _row, _steps
from .ss2d_tiles import LN2, LOG2E, softplus2


@triton.jit
def _pixel(o_l, L, H, W, COLUMN, REVERSE):
    """The pixel at steps o_l of a walk, that of the last step beyond it. L < 2^20, so that the quotient is exact."""
    o_l = tl.minimum(o_l, L - 1)
    if REVERSE:
        o_l = L - 1 - o_l
    if COLUMN:
        i_w = ((o_l.to(tl.float32) + 0.5) * (1.0 / H)).to(tl.int32)
        o_l = (o_l - i_w * H) * W + i_w
    return o_l


@triton.jit
def _append(a1, h1, before_a1, before_h1, a2, h2, before_a2, before_h2):
    """Two stretches of runs as one. A stretch is its decay and its end, and both of all of it but its last run."""
    return a1 * a2, a2 * h1 + h2, a1 * before_a2, before_a2 * h1 + before_h2


@triton.jit
def _as_rows(b, Y: tl.constexpr):
    """(8, Y, 1, 2) as (Y, 16)."""
    return tl.reshape(tl.permute(b, (1, 0, 2, 3)), (Y, 16))


@kernel(do_not_specialize=["B", "H", "W", "G", "n_segments"])
def ss2d_few_kernel(
    x, p, dt_weight, dt_bias, A, D, y, ends, sums, B, H, W, G, n_segments,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, QP: tl.constexpr, S: tl.constexpr, WARPS: tl.constexpr,
    ROUTES: tl.constexpr, DOT: tl.constexpr, LOG: tl.constexpr, SPLIT: tl.constexpr, ENDS: tl.constexpr,
    LOOP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Walk one segment, G tiles, of one route for 16 channels: y (K, B, L, E) by pixels.

    Grid: B * n_segments * K * ceil(E / 16), channel blocks fastest. ROUTES holds two bits a route: 1 by columns, 2
    reversed. LOG: A is log(-A). SPLIT: there are several segments, and a first launch with ENDS leaves for each the
    state that it would end with from zero in ends (B, K, n_segments, E) and the sum of d2, its total decay, in sums.
    LOOP: G > 1.
    """
    C: tl.constexpr = 16
    Y: tl.constexpr = 4 * WARPS
    T: tl.constexpr = Y * S
    Q: tl.constexpr = R + 2
    P: tl.constexpr = K * Q
    n_c: tl.constexpr = (E + C - 1) // C
    i = tl.program_id(0)
    i_c, i = i % n_c, i // n_c
    i_k, i = i % K, i // K
    i_g, i_b = i % n_segments, i // n_segments
    L = H * W
    route = (ROUTES >> (2 * i_k)) & 3
    column, reverse = (route & 1) != 0, (route & 2) != 0

    # step of each column of the product, and channel of each of its rows
    o_n = tl.arange(0, T)
    o_n = (o_n // 8 % WARPS * 4 + o_n % 8 // 2) * S + o_n // (8 * WARPS) * 2 + o_n % 2
    o_r = i_c * C + tl.arange(0, C) % 8 * 2 + tl.arange(0, C) // 8
    o_q = tl.arange(0, QP)
    m_q = (o_q < R)[None, :]
    b_W = tl.load(dt_weight + (i_k * E + o_r)[:, None] * R + o_q[None, :], mask=(o_r < E)[:, None] & m_q, other=0.0).to(
        tl.float32
    )
    b_W *= LOG2E
    b_high = b_W.to(DOT)
    b_low = (b_W - b_high.to(tl.float32)).to(DOT)

    o_y, o_s = tl.arange(0, Y)[None, :, None, None], tl.arange(0, S)[None, None, :, None]
    o_c = i_c * C + tl.arange(0, 8)[:, None, None, None] * 2 + tl.arange(0, 2)[None, None, None, :]
    m_c = o_c < E
    b_bias = tl.load(dt_bias + i_k * E + o_c, mask=m_c, other=0.0).to(tl.float32) * LOG2E
    b_D = tl.load(D + i_k * E + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_A = tl.load(A + i_k * E + o_c, mask=m_c, other=0.0).to(tl.float32)
    if LOG:
        b_A = -tl.exp(b_A)

    x += i_b * L * E
    p += i_b * L * P + i_k * Q
    y += (i_k * B + i_b) * L * E
    o_segment = (i_b * K + i_k) * n_segments * E + o_c
    b_h = tl.zeros((8, 1, 1, 2), tl.float32)
    b_sum = tl.zeros((8, 1, 1, 2), tl.float32)
    if SPLIT and not ENDS:
        for j in range(i_g):
            b_total = tl.load(sums + o_segment + j * E, mask=m_c, other=0.0)
            b_h = b_h * tl.exp2(b_total * b_A) + tl.load(ends + o_segment + j * E, mask=m_c, other=0.0)

    for i_t in range(i_g * G, (i_g + 1) * G):
        o_pixel = _pixel(i_t * T + o_n, L, H, W, column, reverse)
        b_code = tl.load(p + o_pixel[:, None] * P + o_q[None, :], mask=m_q, other=0.0)
        o_l = i_t * T + o_y * S + o_s
        o_pixel = _pixel(o_l, L, H, W, column, reverse)
        b_x = tl.load(x + o_pixel * E + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_B = tl.load(p + o_pixel * P + R).to(tl.float32) * LN2
        b_C = tl.load(p + o_pixel * P + (R + 1)).to(tl.float32)

        b_z2 = _product(b_high, b_low, tl.trans(b_code.to(DOT)), tl.zeros((C, T), tl.float32), DOT)
        b_z2 = tl.reshape(b_z2, (2, 8, S // 2, WARPS, 4, 2))
        b_z2 = tl.reshape(tl.permute(b_z2, (1, 3, 4, 2, 5, 0)), (8, Y, S, 2)) + b_bias
        b_d2 = softplus2(b_z2, EXACT)
        b_a = tl.exp2(b_d2 * b_A)
        b_b = b_d2 * b_x * b_B

        # runs from zero, but the first one from the state before the tile
        b_run = tl.sum(b_d2, axis=2, keep_dims=True)
        b_before = tl.where(o_y == 0, b_h, 0.0)
        b_end = b_before
        for s in tl.static_range(S):
            b_end = _row(b_a, s, S) * b_end + _row(b_b, s, S)
        b_decay = tl.exp2(b_run * b_A)
        # as (Y, 16), a shape for which the compiler spreads the scan over all threads
        b_decay, b_end, b_before = _as_rows(b_decay, Y), _as_rows(b_end, Y), _as_rows(b_before, Y)
        _, b_end, _, b_before = tl.associative_scan((b_decay, b_end, b_decay * 0.0 + 1.0, b_before), 0, _append)
        b_before = tl.permute(tl.reshape(b_before, (Y, 8, 1, 2)), (1, 0, 2, 3))
        if LOOP or ENDS:
            b_h = tl.sum(tl.where(tl.arange(0, Y)[:, None] == Y - 1, b_end, 0.0), axis=0)
            b_h = tl.reshape(b_h, (8, 1, 1, 2))
        if ENDS:
            b_sum += tl.sum(b_run, axis=1, keep_dims=True)
        else:
            b_hs, _ = _steps(b_a, b_b, b_before, S)
            b_y = b_hs * b_C + b_x * b_D
            tl.store(y + o_pixel * E + o_c, b_y.to(y.dtype.element_ty), mask=m_c & (o_l < L))
    if ENDS:
        tl.store(ends + o_segment + i_g * E, b_h, mask=m_c)
        tl.store(sums + o_segment + i_g * E, b_sum, mask=m_c)
