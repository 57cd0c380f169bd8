"""The fused SS2D forward, and the sum of its routes. How tiles, lanes and names work: `ss2d_tiles`."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .ss2d_tiles import LN2, LOG2E, carried, code_to_z2, compose, load_dt_weight, pixels, row, softplus2, step_of


@triton.jit
def _walk(
    x, p, dt_weight, dt_bias, A, D, table, y, states, carry, ends, sums,
    i_b, i_k, i_c, i_g, B, L, T, G, n_segments,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr, C: tl.constexpr, LANE: tl.constexpr, QP: tl.constexpr, DOT: tl.constexpr,
    DIRECT: tl.constexpr, REVERSE: tl.constexpr, KEEP: tl.constexpr, ENDS: tl.constexpr, EXACT: tl.constexpr,
    LOG: tl.constexpr,
):  # fmt: skip
    o_s, o_q = tl.arange(0, S), tl.arange(0, QP)
    # a hint, weaker than the truth: a lane takes LANE neighbouring channels and no more, and so all S rows of them
    o_c = i_c * C + tl.max_contiguous(tl.multiple_of(tl.arange(0, C), LANE), 2)
    m_c = o_c < E
    Q: tl.constexpr = R + 2 * N
    P: tl.constexpr = K * Q
    WIDTH: tl.constexpr = Q if N == 1 else R  # columns of a tile of p: all, or delta's code

    b_high, b_low = load_dt_weight(dt_weight + i_k * E * R, o_c, o_q, m_c, R, DOT)
    o_c, m_c = o_c[None, :], m_c[None, :]  # what belongs to a channel is (1, C) from here
    b_bias = tl.load(dt_bias + i_k * E + o_c, mask=m_c, other=0.0).to(tl.float32) * LOG2E
    b_D = tl.load(D + i_k * E + o_c, mask=m_c, other=0.0).to(tl.float32)
    A += (i_k * E + o_c) * N
    b_A = tl.load(A, mask=m_c, other=0.0).to(tl.float32)  # of state 0
    if LOG:
        b_A = -tl.exp(b_A)

    table += i_k * T * S
    image, walk = i_b.to(tl.int64), (i_b * K + i_k).to(tl.int64)
    p_x = x + image * L * E + o_c
    p += image * L * P + i_k * Q
    p_p = p + o_q[None, :]
    m_q = (o_q < WIDTH)[None, :]
    p_y = y + o_s[:, None] * E + o_c
    segment = walk * n_segments
    ends += segment * N * E
    sums += segment * E
    carry += (segment + i_g) * N * E + o_c

    b_h = tl.zeros((1, C), tl.float32)
    if ENDS:
        b_sum = tl.zeros((1, C), tl.float32)
    elif N == 1:
        b_h = carried(sums, ends, b_A, o_c, m_c, 0, i_g, 1, N, E)
    else:
        for n in range(N):
            b_An = tl.load(A + n, mask=m_c, other=0.0).to(tl.float32)
            tl.store(carry + n * E, carried(sums, ends + n * E, b_An, o_c, m_c, 0, i_g, 1, N, E), mask=m_c)

    i_first = i_g * G
    i_end = tl.minimum(i_first + G, T)
    # Loads are issued ahead of their use: x of the next tile, p of the one after it (whose way through shared memory
    # to the tensor cores would else wait for it), and the table one tile before the loads that it tells where to
    # read.
    i_p, o_p = pixels(table, i_first, S, DIRECT, REVERSE, L)
    b_p = tl.load(p_p + (i_p * P + o_p[:, None].to(tl.int64) * P), mask=m_q, other=0.0).to(DOT)
    b_x = tl.load(p_x + (i_p * E + o_p[:, None].to(tl.int64) * E), mask=m_c, other=0.0)
    i_p1, o_p1 = pixels(table, tl.minimum(i_first + 1, i_end - 1), S, DIRECT, REVERSE, L)
    b_z2 = code_to_z2(b_p, b_high, b_low, b_bias)
    b_p1 = tl.load(p_p + (i_p1 * P + o_p1[:, None].to(tl.int64) * P), mask=m_q, other=0.0).to(DOT)
    for i_t in range(i_first, i_end):
        p_BC = p + (i_p * P + R) + o_p.to(tl.int64) * P
        p_state = states + (walk * T + i_t) * N * E + o_c
        p_tile = p_y + (walk * T + i_t) * (S * E)
        first = (i_t == i_first) & ((i_g == 0) | ENDS)
        b_x1 = tl.load(p_x + (i_p1 * E + o_p1[:, None].to(tl.int64) * E), mask=m_c, other=0.0)
        tl.debug_barrier()  # of one warp, so next to free: it keeps the assembler from putting these loads off
        i_p2, o_p2 = pixels(table, tl.minimum(i_t + 2, i_end - 1), S, DIRECT, REVERSE, L)
        b_d2 = softplus2(b_z2, EXACT)
        b_x = b_x.to(tl.float32)
        b_du = b_d2 * b_x
        b_y = b_x * b_D
        if N == 1:
            if KEEP:
                tl.store(p_state, b_h, mask=m_c)
            b_B = tl.load(p_BC).to(tl.float32) * LN2
            b_a = tl.exp2(b_d2 * b_A)
            b_b = b_du * b_B[:, None]
            b_b = tl.where((o_s == 0)[:, None], b_a * b_h + b_b, b_b)
            _, b_hs = tl.associative_scan((b_a, b_b), 0, compose)
            b_h = row(b_hs, o_s, S - 1)
            if not ENDS:
                b_C = tl.load(p_BC + 1).to(tl.float32)
                b_y += b_hs * b_C[:, None]
        else:
            for n in range(N):
                b_An = tl.load(A + n, mask=m_c, other=0.0).to(tl.float32)
                b_B = tl.load(p_BC + n).to(tl.float32) * LN2
                b_hn = tl.load(carry + n * E, mask=m_c & (not first), other=0.0)
                if KEEP:
                    tl.store(p_state + n * E, b_hn, mask=m_c)
                b_a = tl.exp2(b_d2 * b_An)
                b_b = b_du * b_B[:, None]
                b_b = tl.where((o_s == 0)[:, None], b_a * b_hn + b_b, b_b)
                _, b_hs = tl.associative_scan((b_a, b_b), 0, compose)
                tl.store(carry + n * E, row(b_hs, o_s, S - 1), mask=m_c)
                if not ENDS:
                    b_C = tl.load(p_BC + N + n).to(tl.float32)
                    b_y += b_hs * b_C[:, None]
        if ENDS:
            b_sum += tl.sum(b_d2, axis=0, keep_dims=True)
        else:
            tl.store(p_tile, b_y.to(y.dtype.element_ty), mask=m_c)
        b_z2 = code_to_z2(b_p1, b_high, b_low, b_bias)
        b_p1 = tl.load(p_p + (i_p2 * P + o_p2[:, None].to(tl.int64) * P), mask=m_q, other=0.0).to(DOT)
        b_x = b_x1
        i_p, o_p = i_p1, o_p1
        i_p1, o_p1 = i_p2, o_p2
    if ENDS:
        if N == 1:
            tl.store(carry, b_h, mask=m_c)
        tl.store(sums + i_g * E + o_c, b_sum, mask=m_c)


@kernel(do_not_specialize=["B", "L", "T", "G", "n_segments"])
def ss2d_forward_kernel(
    x, p, dt_weight, dt_bias, A, D, table, y, states, carry, ends, sums, B, L, T, G, n_segments,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr, C: tl.constexpr, LANE: tl.constexpr, QP: tl.constexpr, DOT: tl.constexpr,
    KINDS: tl.constexpr, BODIES: tl.constexpr, KEEP: tl.constexpr, ENDS: tl.constexpr, EXACT: tl.constexpr,
    LOG: tl.constexpr,
):  # fmt: skip
    """Walk one segment of one route: y (B, K, T*S, E) in the order of the walk.

    The grid is B * n_segments * K * ceil(E / C) programs, channel blocks fastest, so that neighbours share x and p in
    L2. A segment is G tiles. With n_segments > 1 a first launch with ENDS leaves, for each segment, in carry the
    state that it would end with from zero, and the sum of d2, which is its total decay; the second takes both and
    starts each segment from the right state. For N > 1 the states between tiles live in carry (B, K, n_segments, N,
    E). KINDS holds two bits a route: 0 by the table, 1 rows forward, 2 rows reversed; BODIES says which kinds occur.
    LOG, for N = 1: A is log(-A).
    """
    n_c: tl.constexpr = (E + C - 1) // C
    i = tl.program_id(0)
    i_c, i = i % n_c, i // n_c
    i_k, i = i % K, i // K
    i_g, i_b = i % n_segments, i // n_segments
    kind = (KINDS >> (2 * i_k)) & 3
    for c in tl.static_range(3):
        if (BODIES >> c) & 1:
            if kind == c:
                _walk(
                    x, p, dt_weight, dt_bias, A, D, table, y, states, carry, ends, sums,
                    i_b, i_k, i_c, i_g, B, L, T, G, n_segments,
                    K, E, R, N, S, C, LANE, QP, DOT, c > 0, c == 2, KEEP, ENDS, EXACT, LOG,
                )  # fmt: skip


@kernel(do_not_specialize=["H", "W", "L", "steps"])
def table_kernel(table, H, W, L, steps, K: tl.constexpr, ROUTES: tl.constexpr, BLOCK: tl.constexpr):
    """table (K, steps): the pixel at each step of each route, the last pixel again beyond the last step.

    ROUTES holds two bits a route: 1 by columns, 2 reversed.
    """
    o_l = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_l = tl.minimum(o_l, L - 1)
    for k in tl.static_range(K):
        b_p = b_l
        if (ROUTES >> (2 * k)) & 2:
            b_p = L - 1 - b_p
        if (ROUTES >> (2 * k)) & 1:
            b_p = (b_p % H) * W + b_p // H
        tl.store(table + k * steps + o_l, b_p, mask=o_l < steps)


@kernel(do_not_specialize=["H", "W", "L", "steps"])
def merge_kernel(
    parts, y, norm_weight, norm_bias, H, W, L, steps, eps, K: tl.constexpr, E: tl.constexpr, ROUTES: tl.constexpr,
    NORM: tl.constexpr, PIXELS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y (B, L, E) = the sum over routes of parts (B, K, steps, E), each put back at its pixels, summed in fp32.

    Where NORM the layer norm over E of that sum; C >= E then.
    """
    n_l = (L + PIXELS - 1) // PIXELS
    i_b = (tl.program_id(0) // n_l).to(tl.int64)
    o_l = tl.program_id(0) % n_l * PIXELS + tl.arange(0, PIXELS)
    o_c = tl.program_id(1) * C + tl.arange(0, C)
    m = (o_l < L)[:, None] & (o_c < E)[None, :]
    b_y = tl.zeros((PIXELS, C), tl.float32)
    for k in tl.static_range(K):
        o_t = step_of(o_l, L, H, W, ((ROUTES >> (2 * k)) & 1) == 1, ((ROUTES >> (2 * k)) & 2) == 2)
        o = ((i_b * K + k) * steps + o_t)[:, None] * E + o_c
        b_y += tl.load(parts + o, mask=m, other=0.0).to(tl.float32)
    if NORM:
        b_y = tl.where((o_c < E)[None, :], b_y - tl.sum(b_y, axis=1, keep_dims=True) / E, 0.0)
        b_y *= tl.rsqrt(tl.sum(b_y * b_y, axis=1, keep_dims=True) / E + eps)
        b_weight = tl.load(norm_weight + o_c, mask=o_c < E, other=0.0).to(tl.float32)
        b_bias = tl.load(norm_bias + o_c, mask=o_c < E, other=0.0).to(tl.float32)
        b_y = b_y * b_weight[None, :] + b_bias[None, :]
    tl.store(y + (i_b * L + o_l)[:, None] * E + o_c, b_y.to(y.dtype.element_ty), mask=m)
