"""The fused SS2D backward, and the sum of what its programs leave of the code's gradient.

How tiles, lanes and names work: `ss2d_tiles`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ss2d_tiles import (
    LN2,
    LOG2E,
    carried,
    code_to_z2,
    load_dt_weight,
    pixels,
    softplus2,
    step_of,
    steps_back,
    steps_forward,
)


@triton.jit
def _sum_channels(b, i_q, b_gp, SUM: tl.constexpr, PRECISION: tl.constexpr):
    """Add the sums of b (S, C) over C to column i_q of b_gp (S, Q), on the tensor cores: five shuffles a row otherwise.

    With i_q = -1 to every column.
    """
    b_ones = tl.full((b.shape[1], b_gp.shape[1]), 1.0, tl.float32)
    if i_q >= 0:
        b_ones = tl.where((tl.arange(0, b_gp.shape[1]) == i_q)[None, :], b_ones, 0.0)
    return tl.dot(b.to(SUM), b_ones.to(SUM), b_gp, input_precision=PRECISION)


@triton.jit
def _walk_back(
    gy, x, p, dt_weight, dt_bias, A, D, table, states, gx, gp, g_weight, g_bias, gA, gD, carry, ends, sums,
    i_b, i_k, i_c, i_g, B, L, T, G, n_segments,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr, C: tl.constexpr, LANE: tl.constexpr, QP: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    DIRECT: tl.constexpr, REVERSE: tl.constexpr, ENDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    o_s, o_q = tl.arange(0, S), tl.arange(0, QP)
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
    # (C, Q), for the gradient of the code
    b_weight = tl.load(
        dt_weight + i_k * E * R + tl.trans(o_c) * R + o_q[None, :], mask=tl.trans(m_c) & (o_q < R)[None, :], other=0.0
    ).to(SUM)

    image, walk = i_b.to(tl.int64), (i_b * K + i_k).to(tl.int64)
    part = (image * n_segments + i_g) * K + i_k
    gA += (part * E + o_c) * N
    table += i_k * T * S
    p_x = x + image * L * E + o_c
    p_gy = gy + image * L * E + o_c
    p += image * L * P + i_k * Q
    p_p = p + o_q[None, :]
    m_q = (o_q < WIDTH)[None, :]
    p_gx = gx + o_s[:, None] * E + o_c
    p_gp = gp + i_c.to(tl.int64) * B * K * T * S * Q + o_s[:, None] * Q
    # the first of 16 equal columns
    p_sum = p_gp + R + tl.zeros((1, 16), tl.int32)
    m_sum = (tl.arange(0, 16) == 0)[None, :]
    p_gp += o_q[None, :]
    segment = walk * n_segments
    ends += segment * N * E
    sums += segment * E
    carry += (segment + i_g) * N * E + o_c

    b_q = tl.zeros((1, C), tl.float32)  # 2^(d2 A) times the gradient of the state, of the step after
    if ENDS:
        b_sum = tl.zeros((1, C), tl.float32)
    else:
        if N == 1:
            b_q = carried(sums, ends, b_A, o_c, m_c, n_segments - 1, i_g, -1, N, E)
        else:
            for n in range(N):
                b_An = tl.load(A + n, mask=m_c, other=0.0).to(tl.float32)
                b_qn = carried(sums, ends + n * E, b_An, o_c, m_c, n_segments - 1, i_g, -1, N, E)
                tl.store(carry + n * E, b_qn, mask=m_c)
                tl.store(gA + n, tl.zeros((1, C), tl.float32), mask=m_c)
        b_gA = tl.zeros((1, C), tl.float32)
        b_g_bias = tl.zeros((1, C), tl.float32)
        b_gD = tl.zeros((1, C), tl.float32)
        b_g_weight = tl.zeros((C, QP), tl.float32)

    i_first = i_g * G
    i_end = tl.minimum(i_first + G, T)
    # Loads ahead of their use as in the forward, but for x and gy: a second tile of them would not fit into registers.
    i_p, o_p = pixels(table, i_end - 1, S, DIRECT, REVERSE, L)
    b_p = tl.load(p_p + (i_p * P + o_p[:, None].to(tl.int64) * P), mask=m_q, other=0.0).to(DOT)
    b_z2 = code_to_z2(b_p, b_high, b_low, b_bias)
    for i in range(i_first, i_end):
        i_t = i_end - 1 - (i - i_first)
        b_x = tl.load(p_x + (i_p * E + o_p[:, None].to(tl.int64) * E), mask=m_c, other=0.0).to(tl.float32)
        # beyond the last step gy = 0 makes every gradient zero, the gradient of the state too
        m_gy = m_c & (i_t * S + o_s < L)[:, None]
        b_gy = tl.load(p_gy + (i_p * E + o_p[:, None].to(tl.int64) * E), mask=m_gy, other=0.0).to(tl.float32)
        p_BC = p + (i_p * P + R) + o_p.to(tl.int64) * P
        tile = walk * T + i_t
        p_state = states + tile * N * E + o_c
        last = (i_t == i_end - 1) & ((i_g == n_segments - 1) | ENDS)
        if not ENDS:
            if N == 1:
                b_h = tl.load(p_state, mask=m_c, other=0.0)
        if N == 1:
            b_B = tl.load(p_BC).to(tl.float32)
            b_C = tl.load(p_BC + 1).to(tl.float32)
        i_p, o_p = pixels(table, tl.maximum(i_t - 1, i_first), S, DIRECT, REVERSE, L)
        b_p1 = tl.load(p_p + (i_p * P + o_p[:, None].to(tl.int64) * P), mask=m_q, other=0.0).to(DOT)
        b_d2 = softplus2(b_z2, EXACT)
        if ENDS:
            b_sum += tl.sum(b_d2, axis=0, keep_dims=True)
            if N == 1:
                b_c = b_gy * b_C[:, None]
                _, b_q = steps_back(tl.exp2(b_d2 * b_A), b_c, b_q, S)
            else:
                for n in range(N):
                    b_An = tl.load(A + n, mask=m_c, other=0.0).to(tl.float32)
                    b_c = b_gy * tl.load(p_BC + N + n).to(tl.float32)[:, None]
                    b_qn = tl.load(carry + n * E, mask=m_c & (not last), other=0.0)
                    _, b_qn = steps_back(tl.exp2(b_d2 * b_An), b_c, b_qn, S)
                    tl.store(carry + n * E, b_qn, mask=m_c)
        else:
            b_delta = b_d2 * LN2
            b_du = b_delta * b_x
            b_gp = tl.zeros((S, QP), tl.float32)
            if N == 1:
                b_a = tl.exp2(b_d2 * b_A)
                b_b = b_du * b_B[:, None]
                b_v, _ = steps_forward(b_a, b_b, b_h, S)
                b_gp = _sum_channels(b_gy * (b_v + b_b), R + 1, b_gp, SUM, PRECISION)
                b_g, b_q = steps_back(b_a, b_gy * b_C[:, None], b_q, S)
                b_gp = _sum_channels(b_g * b_du, R, b_gp, SUM, PRECISION)
                b_gdu = b_g * b_B[:, None]
                b_gv = b_g * b_v
                b_gdelta = b_gv * b_A
                b_gA += tl.sum(b_gv * b_delta, axis=0, keep_dims=True)
            else:
                b_gdu = tl.zeros((S, C), tl.float32)
                b_gdelta = tl.zeros((S, C), tl.float32)
                for n in range(N):
                    b_An = tl.load(A + n, mask=m_c, other=0.0).to(tl.float32)
                    b_B = tl.load(p_BC + n).to(tl.float32)
                    b_C = tl.load(p_BC + N + n).to(tl.float32)
                    b_h = tl.load(p_state + n * E, mask=m_c, other=0.0)
                    b_qn = tl.load(carry + n * E, mask=m_c & (not last), other=0.0)
                    b_a = tl.exp2(b_d2 * b_An)
                    b_b = b_du * b_B[:, None]
                    b_v, _ = steps_forward(b_a, b_b, b_h, S)
                    b_gC = _sum_channels(b_gy * (b_v + b_b), -1, tl.zeros((S, 16), tl.float32), SUM, PRECISION)
                    tl.store(p_sum + (tile * (S * Q) + N + n), b_gC, mask=m_sum)
                    b_g, b_qn = steps_back(b_a, b_gy * b_C[:, None], b_qn, S)
                    tl.store(carry + n * E, b_qn, mask=m_c)
                    b_gB = _sum_channels(b_g * b_du, -1, tl.zeros((S, 16), tl.float32), SUM, PRECISION)
                    tl.store(p_sum + (tile * (S * Q) + n), b_gB, mask=m_sum)
                    b_gdu += b_g * b_B[:, None]
                    b_gv = b_g * b_v
                    b_gdelta += b_gv * b_An
                    b_gAn = tl.load(gA + n, mask=m_c, other=0.0)
                    tl.store(gA + n, b_gAn + tl.sum(b_gv * b_delta, axis=0, keep_dims=True), mask=m_c)
            b_gx = b_gdu * b_delta + b_gy * b_D
            tl.store(p_gx + tile * (S * E), b_gx.to(gx.dtype.element_ty), mask=m_c)
            b_gD += tl.sum(b_gy * b_x, axis=0, keep_dims=True)
            b_gz = (b_gdelta + b_gdu * b_x) * tl.exp2(b_z2 - b_d2)  # the derivative of softplus is 2^(z2 - d2)
            b_g_bias += tl.sum(b_gz, axis=0, keep_dims=True)
            b_gz = b_gz.to(SUM)
            b_gp = tl.dot(b_gz, b_weight, b_gp, input_precision=PRECISION)
            tl.store(p_gp + tile * (S * Q), b_gp, mask=m_q)
            b_g_weight = tl.dot(tl.trans(b_gz), b_p.to(SUM), b_g_weight, input_precision=PRECISION)
        b_p = b_p1
        b_z2 = code_to_z2(b_p, b_high, b_low, b_bias)

    if ENDS:
        if N == 1:
            tl.store(carry, b_q, mask=m_c)
        tl.store(sums + i_g * E + o_c, b_sum, mask=m_c)
    else:
        tl.store(g_bias + part * E + o_c, b_g_bias, mask=m_c)
        tl.store(gD + part * E + o_c, b_gD, mask=m_c)
        if N == 1:
            tl.store(gA, b_gA, mask=m_c)
        m_cr = tl.trans(m_c) & (o_q < R)[None, :]
        tl.store(g_weight + (part * E + tl.trans(o_c)) * R + o_q[None, :], b_g_weight, mask=m_cr)


@triton.jit(do_not_specialize=["B", "L", "T", "G", "n_segments"])
def ss2d_backward_kernel(
    gy, x, p, dt_weight, dt_bias, A, D, table, states, gx, gp, g_weight, g_bias, gA, gD, carry, ends, sums,
    B, L, T, G, n_segments,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr, C: tl.constexpr, LANE: tl.constexpr, QP: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    KINDS: tl.constexpr, BODIES: tl.constexpr, ENDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Walk one segment of one route back, tile by tile from the states that the forward kept; grid as the forward's.

    The state's gradient is g_l = C_l gy_l + 2^(d2_{l+1} A) g_{l+1}. What is a sum over channels (gp) is left as one
    part a channel block, (ceil(E / C), B, K, T*S, R + 2N), what is a sum over pixels (the weights) as one part for
    each program of a route's channels, (.., K, E, ..): no atomics, so the same result every time. ENDS: as in the
    forward, for g.
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
                _walk_back(
                    gy, x, p, dt_weight, dt_bias, A, D, table, states, gx, gp, g_weight, g_bias, gA, gD, carry, ends,
                    sums, i_b, i_k, i_c, i_g, B, L, T, G, n_segments, K, E, R, N, S, C, LANE, QP, DOT, SUM, PRECISION,
                    c > 0, c == 2, ENDS, EXACT,
                )  # fmt: skip


@triton.jit(do_not_specialize=["B", "H", "W", "L", "steps"])
def merge_code_kernel(
    parts, gp, B, H, W, L, steps, K: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, n_parts: tl.constexpr,
    ROUTES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """gp (B, L, K*Q) = the sum over channel blocks of parts (n_parts, B, K, steps, Q), each route at its pixels."""
    n_l = (L + PIXELS - 1) // PIXELS
    i_b = (tl.program_id(0) // n_l).to(tl.int64)
    o_l = tl.program_id(0) % n_l * PIXELS + tl.arange(0, PIXELS)
    o_q = tl.arange(0, QP)
    m = (o_l < L)[:, None] & (o_q < Q)[None, :]
    for k in tl.static_range(K):
        o_t = step_of(o_l, L, H, W, ((ROUTES >> (2 * k)) & 1) == 1, ((ROUTES >> (2 * k)) & 2) == 2)
        b_gp = tl.zeros((PIXELS, QP), tl.float32)
        for i in range(n_parts):
            o = (((tl.cast(i, tl.int64) * B + i_b) * K + k) * steps + o_t)[:, None] * Q + o_q[None, :]
            b_gp += tl.load(parts + o, mask=m, other=0.0)
        o = (i_b * L + o_l)[:, None] * (K * Q) + k * Q + o_q[None, :]
        tl.store(gp + o, b_gp.to(gp.dtype.element_ty), mask=m)
