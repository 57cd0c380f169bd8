"""The fused SS2D for many states. How routes, tiles of p and names work: `ss2d_tiles`.

Here a lane owns one or two channels with all their states: h and A lie in registers as (N, C), a lane's rows are its
states, and a walk goes step by step. What a step needs is made a tile of S steps at a time, delta on the tensor cores,
B and C as fp32, and laid into a scratch of the program, a few KB that stay in L1: from there a step reads the numbers
of its channels, and B and C as vectors that all lanes share. So an element costs five instructions a state, one of
them a special function, which bounds the kernel: its unit takes a warp every eight cycles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .ss2d_tiles import LN2, LOG2E, by_columns, softplus2


@kernel
def weights_kernel(
    dt_weight, A, split, A_out,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr, QP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights as the other kernels read them. split (2, K, QP / 16, E, 16): Wdt (K, E, R) log2(e) as a sum of two
    numbers of the tensor cores' type, zero beyond R; A_out (K, N, E) fp32: A (K * E, N).
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_c, o_r = o // 16 % E, o // (16 * E) % (QP // 16) * 16 + o % 16
    m = o < K * QP * E
    b = tl.load(dt_weight + (o // (QP * E) * E + o_c) * R + o_r, mask=m & (o_r < R), other=0.0).to(tl.float32) * LOG2E
    high = b.to(split.dtype.element_ty)
    tl.store(split + o, high, mask=m)
    tl.store(split + K * QP * E + o, (b - high.to(tl.float32)).to(split.dtype.element_ty), mask=m)
    o_c, o_n = o % E, o // E % N
    m = o < K * N * E
    b = tl.load(A + (o // (N * E) * E + o_c) * N + o_n, mask=m, other=0.0).to(tl.float32)
    tl.store(A_out + o, b, mask=m)


@triton.jit
def tile_of_z2(p_p, p_weight, o_w, m_w, b_bias, n_weight, R: tl.constexpr, E: tl.constexpr, QP: tl.constexpr,
               C: tl.constexpr, S: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """z log2(e) (S, C) of a tile, from the code of its steps at p_p (S, 1) and the split weight of its channels o_w."""
    o_q = tl.arange(0, 16)
    b = tl.zeros((S, C), tl.float32)
    for i_q in tl.static_range(0, QP, 16):
        p_w = p_weight + (i_q * E + o_w * 16 + o_q[None, :])
        b_p = tl.load(p_p + (i_q + o_q)[None, :], mask=(i_q + o_q < R)[None, :], other=0.0).to(DOT)
        b_high = tl.trans(tl.load(p_w, mask=m_w, other=0.0))
        if b_p.dtype == tl.float32:
            b = tl.dot(b_p, b_high, b, input_precision="tf32x3")
        else:
            b_low = tl.trans(tl.load(p_w + n_weight, mask=m_w, other=0.0))
            b = tl.dot(b_p, b_high, tl.dot(b_p, b_low, b))
    return by_columns(b) + b_bias


@kernel(do_not_specialize=["B", "L", "T", "G", "n_segments", "total"])
def states_forward_kernel(
    x, p, weight, dt_bias, A, D, table, y, states, ends, sums, scratch,
    B, L, T, G, n_segments, total,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, S: tl.constexpr,
    C: tl.constexpr, LANE: tl.constexpr, QP: tl.constexpr, DOT: tl.constexpr,
    KEEP: tl.constexpr, ENDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Walk segments of routes: y (B, K, n_n, T*S, E) in the order of the walk, one part for each NB states.

    There are `total` pairs of a segment and a block of channels and states; a program takes every so manyth. A segment
    is G tiles. KEEP stores the states before each tile, (B, K, T, N, E). With n_segments > 1 a first launch with ENDS
    leaves for each segment the state that it would end with from zero, ends (B, K, n_segments, N, E), and the sum of
    d2, which is its total decay; the second takes both and starts each segment from the right state.
    """
    n_c: tl.constexpr = (E + C - 1) // C
    n_n: tl.constexpr = (N + NB - 1) // NB
    Q: tl.constexpr = R + 2 * N
    P: tl.constexpr = K * Q
    o_s = tl.arange(0, S)
    o_n = tl.arange(0, NB)
    # a hint, weaker than the truth: a lane takes LANE neighbouring channels and no more, and so all rows of them
    o_i = tl.max_contiguous(tl.multiple_of(tl.arange(0, C), LANE), 2)[None, :]
    # a row of scratch is a step: d2 and x of the channels, B and C of the states
    ROW: tl.constexpr = 2 * C + 2 * NB
    scratch += tl.program_id(0) * (S * ROW)
    p_rows = scratch + o_s[:, None] * ROW

    for i_work in range(tl.program_id(0), total, tl.num_programs(0)):
        i = i_work
        i_c, i = i % n_c, i // n_c
        i_n, i = i % n_n, i // n_n
        i_k, i = i % K, i // K
        i_g, i_b = i % n_segments, i // n_segments
        o_c = i_c * C + o_i
        m_c = o_c < E
        o_w = i_c * C + tl.arange(0, C)[:, None]
        m_w = o_w < E
        m_n = i_n * NB + o_n < N
        m = m_n[:, None] & m_c
        image, walk = i_b.to(tl.int64), (i_b * K + i_k).to(tl.int64)
        segment = walk * n_segments

        b_bias = tl.load(dt_bias + i_k * E + o_c, mask=m_c, other=0.0).to(tl.float32) * LOG2E
        b_D = tl.load(D + i_k * E + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_D = tl.where(i_n == 0, b_D, 0.0)
        o_nc = (i_n * NB + o_n[:, None]) * E + o_c  # of the state, in what holds (.., N, E)
        b_A = tl.load(A + i_k * (N * E) + o_nc, mask=m, other=0.0)

        b_h = tl.zeros((NB, C), tl.float32)
        b_sum = tl.zeros((1, C), tl.float32)
        if not ENDS:
            for i in range(i_g):
                b_total = tl.load(sums + (segment + i) * E + o_c, mask=m_c, other=0.0)
                b_end = tl.load(ends + (segment + i) * (N * E) + o_nc, mask=m, other=0.0)
                b_h = b_h * tl.exp2(b_total * b_A) + b_end

        i_first = i_g * G
        i_end = tl.minimum(i_first + G, T)
        p_y = y + ((walk * n_n + i_n) * T + i_first) * (S * E)
        p_state = states + (walk * T + i_first) * (N * E) + o_nc
        for i_t in range(i_first, i_end):
            o_pixel = tl.load(table + i_k * (T * S) + i_t * S + o_s).to(tl.int64)[:, None]
            b_x = tl.load(x + (image * L * E + o_c) + o_pixel * E, mask=m_c, other=0.0)
            p_p = p + (image * L * P + i_k * Q) + o_pixel * P
            p_B = p_p + (R + i_n * NB) + o_n[None, :]
            b_B = tl.load(p_B, mask=m_n[None, :], other=0.0).to(tl.float32) * LN2
            b_C = tl.load(p_B + N, mask=m_n[None, :], other=0.0).to(tl.float32)
            if KEEP:
                tl.store(p_state, b_h, mask=m)
                p_state += N * E
            b_z2 = tile_of_z2(p_p, weight + i_k * (QP * E), o_w, m_w, b_bias, K * QP * E, R, E, QP, C, S, DOT)
            b_d2 = softplus2(b_z2, EXACT)
            tl.debug_barrier()
            tl.store(p_rows + o_i, b_d2)
            tl.store(p_rows + C + o_i, b_x.to(tl.float32))
            tl.store(p_rows + 2 * C + o_n[None, :], b_B)
            tl.store(p_rows + (2 * C + NB) + o_n[None, :], b_C)
            tl.debug_barrier()
            p_row = scratch
            for _ in range(tl.minimum(S, L - i_t * S)):
                b_d = tl.load(p_row + o_i)
                b_xs = tl.load(p_row + C + o_i)
                b_Bs = tl.load(p_row + 2 * C + o_n)[:, None]
                b_h = tl.exp2(b_d * b_A) * b_h + (b_d * b_xs) * b_Bs
                if ENDS:
                    b_sum += b_d
                else:
                    b_Cs = tl.load(p_row + (2 * C + NB) + o_n)[:, None]
                    b_y = tl.sum(b_h * b_Cs, axis=0, keep_dims=True) + b_xs * b_D
                    tl.store(p_y + o_c, b_y.to(y.dtype.element_ty), mask=m_c)
                    p_y += E
                p_row += ROW
        if ENDS:
            tl.store(ends + (segment + i_g) * (N * E) + o_nc, b_h, mask=m)
            tl.store(sums + (segment + i_g) * E + o_c, b_sum, mask=m_c)
