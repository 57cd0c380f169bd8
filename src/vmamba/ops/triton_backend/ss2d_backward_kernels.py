"""The fused SS2D backward: the walks, then what is products and sums of what they leave.

How tiles, lanes and names work: `ss2d_tiles`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .ss2d_tiles import (
    LN2,
    LOG2E,
    carried,
    code_to_z2,
    load_dt_weight,
    softplus2,
    step_of,
    steps_back,
    steps_forward,
)


@triton.jit
def _sum_channels(b, b_sums, COLUMN: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr):
    """Add the sums of b (S, C) over C to a column of b_sums (S, 8), on the tensor cores: else five shuffles a row."""
    o = tl.arange(0, b_sums.shape[1])
    b_one = tl.where((o == COLUMN)[None, :], tl.full((b.shape[1], b_sums.shape[1]), 1.0, tl.float32), 0.0)
    return tl.dot(b.to(SUM), b_one.to(SUM), b_sums, input_precision=PRECISION)


@triton.jit
def _in_turns(b, S: tl.constexpr):
    """B log(2) and C, (S,) each, from (2S,) of them in turns."""
    b = b.to(tl.float32) * tl.where(tl.arange(0, 2 * S) % 2 == 0, LN2, 1.0)
    return tl.split(tl.reshape(b, (S, 2)))


@triton.jit
def _state_back(b_d2, b_x, b_gy, b_A, b_B, b_C, b_h, b_q, S: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr):
    """One state of one tile, all (S, C) but A, h, q (1, C) and B, C (S,); B is B log(2), A is A.

    Returns the gradients of B and C, in columns 0 and 1 of (S, 8), the former over log(2), of x, of delta times
    log(2), of A (1, C) over log(2), and q for the tile before.
    """
    b_a = tl.exp2(b_d2 * b_A)
    b_Bx = b_x * b_B[:, None]
    b_b = b_d2 * b_Bx
    b_v, _ = steps_forward(b_a, b_b, b_h, S)
    b_sums = tl.zeros((S, 8), tl.float32)
    b_sums = _sum_channels(b_gy * (b_v + b_b), b_sums, 1, SUM, PRECISION)
    # a sum with a zero that the compiler does not know: a plain product it would make part of each step's sum, and
    # keep gy and C to the end rather than c
    b_c = tl.fma(b_gy, b_C[:, None] + tl.zeros_like(b_gy), b_A * 0.0 + tl.zeros_like(b_gy))
    b_g, b_q = steps_back(b_a, b_c, b_q, S)
    b_t = b_g * b_d2
    b_sums = _sum_channels(b_t * b_x, b_sums, 0, SUM, PRECISION)
    b_gA = tl.sum(b_t * b_v, axis=0, keep_dims=True)
    return b_sums, b_t * b_B[:, None], b_g * (b_v * (b_A * LN2) + b_Bx), b_gA, b_q


@kernel(do_not_specialize=["B", "L", "T", "G", "n_segments"])
def ss2d_backward_kernel(
    gy, x, p, dt_weight, dt_bias, A, table, states, gx, gz, gBC, g_channels, carry, ends, sums,
    B, L, T, G, n_segments,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr, C: tl.constexpr, LANE: tl.constexpr, QP: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    ENDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Walk one segment of one route back, tile by tile from the states that the forward kept; grid as the forward's.

    The state's gradient is g_l = C_l gy_l + 2^(d2_{l+1} A) g_{l+1}. Left are, in the order of the walk, gx (B, K,
    T*S, E) without D's share, which is the same for each route, and gz (B, K, T*S, E), the gradient of z times log(2);
    as parts of sums, with no atomics and so the same every time, gBC (ceil(E / C), B, K, T*S, 2N) and g_channels
    (B * n_segments, (N + 2) * K*E), the gradients of A, dt_bias and D. ENDS: as in the forward, for g.
    """
    n_c: tl.constexpr = (E + C - 1) // C
    i = tl.program_id(0)
    i_c, i = i % n_c, i // n_c
    i_k, i = i % K, i // K
    i_g, i_b = i % n_segments, i // n_segments

    o_s, o_q = tl.arange(0, S), tl.arange(0, QP)
    o_c = i_c * C + tl.max_contiguous(tl.multiple_of(tl.arange(0, C), LANE), 2)
    m_c = o_c < E
    Q: tl.constexpr = R + 2 * N
    P: tl.constexpr = K * Q

    b_high, b_low = load_dt_weight(dt_weight + i_k * E * R, o_c, o_q, m_c, R, DOT)
    o_c, m_c = o_c[None, :], m_c[None, :]  # what belongs to a channel is (1, C) from here
    b_bias = tl.load(dt_bias + i_k * E + o_c, mask=m_c, other=0.0).to(tl.float32) * LOG2E
    A += (i_k * E + o_c) * N
    b_A = tl.load(A, mask=m_c, other=0.0).to(tl.float32)  # of state 0

    image, walk = i_b.to(tl.int64), (i_b * K + i_k).to(tl.int64)
    g_channels += (image * n_segments + i_g) * ((N + 2) * K * E)
    g_A = g_channels + (i_k * E + o_c) * N
    g_channels += (N * K + i_k) * E + o_c
    table += i_k * T * S
    p_x = x + image * L * E + o_c
    p_gy = gy + image * L * E + o_c
    # B and C of a tile in turns, a number a lane: from there by shared memory to all lanes, a tenth of all instructions
    # less than 2 S loads with their addresses
    o_pair = tl.arange(0, 2 * S)
    p_BC = p + (image * L * P + i_k * Q + R) + o_pair % 2 * N
    p_pair = table + o_pair // 2
    p_p = p + (image * L * P + i_k * Q) + o_q[:, None]  # (Q, S): of the shape of x it would get x's layout
    m_q = (o_q < R)[:, None]
    o_tile = walk * T * S * E + o_s[:, None] * E + o_c
    gx += o_tile
    gz += o_tile
    o_BC = tl.arange(0, 8)[None, :]  # columns of sums: B, C and nothing
    gBC += ((i_c.to(tl.int64) * B * K + walk) * T * S + o_s[:, None]) * (2 * N) + o_BC * N
    segment = walk * n_segments
    ends += segment * N * E
    sums += segment * E
    carry += (segment + i_g) * N * E + o_c
    states += walk * T * N * E + o_c

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
                tl.store(g_A + n, tl.zeros((1, C), tl.float32), mask=m_c)
        b_gA = tl.zeros((1, C), tl.float32)
        b_g_bias = tl.zeros((1, C), tl.float32)
        b_gD = tl.zeros((1, C), tl.float32)

    i_first = i_g * G
    i_end = tl.minimum(i_first + G, T)
    o_p = tl.load(table + (i_end - 1) * S + o_s).to(tl.int64)
    p_BC1 = p_BC + tl.load(p_pair + (i_end - 1) * S).to(tl.int64) * P
    b_BC1 = tl.load(p_BC1)
    b_p = tl.trans(tl.load(p_p + o_p[None, :] * P, mask=m_q, other=0.0)).to(DOT)
    b_x1 = tl.load(p_x + o_p[:, None] * E, mask=m_c, other=0.0)
    # Beyond the last step, in the first tile of a walk back, gy = 0 makes every gradient zero, the state's too.
    m_gy = m_c & ((i_end - 1) * S + o_s < L)[:, None]
    b_gy1 = tl.load(p_gy + o_p[:, None] * E, mask=m_gy, other=0.0)
    b_z2 = code_to_z2(b_p, b_high, b_low, b_bias)
    for i in range(i_first, i_end):
        i_t = i_end - 1 - (i - i_first)
        b_x, b_gy = b_x1.to(tl.float32), b_gy1.to(tl.float32)
        p_BCs = p_BC1
        if N == 1:
            b_B, b_C = _in_turns(b_BC1, S)
            if not ENDS:
                b_h = tl.load(states + i_t * E, mask=m_c, other=0.0)
        i_t1 = tl.maximum(i_t - 1, i_first)
        o_p = tl.load(table + i_t1 * S + o_s).to(tl.int64)
        p_BC1 = p_BC + tl.load(p_pair + i_t1 * S).to(tl.int64) * P
        b_BC1 = tl.load(p_BC1)
        b_p = tl.trans(tl.load(p_p + o_p[None, :] * P, mask=m_q, other=0.0)).to(DOT)
        b_d2 = softplus2(b_z2, EXACT)
        last = (i_t == i_end - 1) & ((i_g == n_segments - 1) | ENDS)
        if ENDS:
            b_sum += tl.sum(b_d2, axis=0, keep_dims=True)
            if N == 1:
                _, b_q = steps_back(tl.exp2(b_d2 * b_A), b_gy * b_C[:, None], b_q, S)
            else:
                for n in range(N):
                    b_An = tl.load(A + n, mask=m_c, other=0.0).to(tl.float32)
                    _, b_C = _in_turns(tl.load(p_BCs + n), S)
                    b_qn = tl.load(carry + n * E, mask=m_c & (not last), other=0.0)
                    _, b_qn = steps_back(tl.exp2(b_d2 * b_An), b_gy * b_C[:, None], b_qn, S)
                    tl.store(carry + n * E, b_qn, mask=m_c)
        else:
            o_t = i_t.to(tl.int64) * S
            b_gD += tl.sum(b_gy * b_x, axis=0, keep_dims=True)
            if N == 1:
                b_gBC, b_gx, b_gz, b_gAn, b_q = _state_back(b_d2, b_x, b_gy, b_A, b_B, b_C, b_h, b_q, S, SUM, PRECISION)
                b_gA += b_gAn
                tl.store(gBC + o_t * 2, b_gBC, mask=o_BC < 2)
            else:
                b_gx = tl.zeros((S, C), tl.float32)
                b_gz = tl.zeros((S, C), tl.float32)
                for n in range(N):
                    b_An = tl.load(A + n, mask=m_c, other=0.0).to(tl.float32)
                    b_B, b_C = _in_turns(tl.load(p_BCs + n), S)
                    b_h = tl.load(states + (i_t * N + n) * E, mask=m_c, other=0.0)
                    b_qn = tl.load(carry + n * E, mask=m_c & (not last), other=0.0)
                    b_gBC, b_gxn, b_gzn, b_gAn, b_qn = _state_back(
                        b_d2, b_x, b_gy, b_An, b_B, b_C, b_h, b_qn, S, SUM, PRECISION
                    )
                    tl.store(carry + n * E, b_qn, mask=m_c)
                    tl.store(gBC + (o_t * (2 * N) + n), b_gBC, mask=o_BC < 2)
                    b_gx += b_gxn
                    b_gz += b_gzn
                    tl.store(g_A + n, tl.load(g_A + n, mask=m_c, other=0.0) + b_gAn * LN2, mask=m_c)
            # the derivative of softplus; for bf16 from d2 alone, right to 1e-7 / delta, which frees z2's registers
            if SUM == tl.bfloat16:  # noqa: SIM300
                b_gz *= 1.0 - tl.exp2(-b_d2)
            else:
                b_gz *= tl.exp2(b_z2 - b_d2)
            b_g_bias += tl.sum(b_gz, axis=0, keep_dims=True)
            tl.store(gx + o_t * E, b_gx.to(gx.dtype.element_ty), mask=m_c)
            tl.store(gz + o_t * E, b_gz.to(gz.dtype.element_ty), mask=m_c)
        b_x1 = tl.load(p_x + o_p[:, None] * E, mask=m_c, other=0.0)
        b_gy1 = tl.load(p_gy + o_p[:, None] * E, mask=m_c, other=0.0)
        b_z2 = code_to_z2(b_p, b_high, b_low, b_bias)

    if ENDS:
        if N == 1:
            tl.store(carry, b_q, mask=m_c)
        tl.store(sums + i_g * E + o_c, b_sum, mask=m_c)
    else:
        if N == 1:
            tl.store(g_A, b_gA * LN2, mask=m_c)
        tl.store(g_channels, b_g_bias * LOG2E, mask=m_c)
        tl.store(g_channels + K * E, b_gD, mask=m_c)


@triton.jit
def _code_rows(
    i, table, i_k, B, L, steps, K: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    IMAGES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Block i of one route, IMAGES * STEPS steps: which are any, where they are in a walk's order, and where in p."""
    n = (steps + STEPS - 1) // STEPS
    o = tl.arange(0, IMAGES * STEPS)
    i_b = i // n * IMAGES
    o_b, o_s = i_b + o // STEPS, i % n * STEPS + o % STEPS
    m_r = (o_b < B) & (o_s < L)
    o_p = tl.load(table + i_k * steps + o_s, mask=o_s < L, other=0)
    o_walk = (i_b.to(tl.int64) * K + i_k) * steps + (o // STEPS * (K * steps) + o_s)
    return m_r, o_walk, (o_b.to(tl.int64) * L + o_p) * P + i_k * Q


@triton.jit
def _sum_BC(gBC, m_r, o_walk, n_walks, N: tl.constexpr, n_parts: tl.constexpr, NP: tl.constexpr):
    """The sums of the parts of gBC (n_parts, n_walks, 2N), (ROWS, NP)."""
    o_n = tl.arange(0, NP)
    m = m_r[:, None] & (o_n < 2 * N)[None, :]
    o = o_walk[:, None] * (2 * N) + o_n[None, :]
    b = tl.load(gBC + o, mask=m, other=0.0)
    for _ in tl.static_range(1, n_parts):
        o += n_walks * (2 * N)
        b += tl.load(gBC + o, mask=m, other=0.0)
    return b * tl.where(o_n < N, LN2, 1.0)[None, :]


@triton.jit
def _store_code(b_gp, b_gBC, gp, m_r, o_p, R: tl.constexpr, N: tl.constexpr):
    """Put the gradients of the code (ROWS, QP) and of B and C (ROWS, NP) at their pixels."""
    o_q, o_n = tl.arange(0, b_gp.shape[1]), tl.arange(0, b_gBC.shape[1])
    tl.store(gp + o_p[:, None] + o_q[None, :], b_gp * LOG2E, mask=m_r[:, None] & (o_q < R)[None, :])
    tl.store(gp + o_p[:, None] + R + o_n[None, :], b_gBC, mask=m_r[:, None] & (o_n < 2 * N)[None, :])


@kernel(do_not_specialize=["B", "L", "steps", "G"])
def code_gradient_kernel(
    gz, gBC, p, dt_weight, table, gp, g_weight, B, L, steps, G,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr, n_parts: tl.constexpr,
    IMAGES: tl.constexpr, STEPS: tl.constexpr, C: tl.constexpr, QP: tl.constexpr, NP: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What is products with gz: the gradient of the code, gz Wdt, and that of dt_weight, gz^T code.

    A program takes G blocks of IMAGES * STEPS steps of one route, and all channels of them. It leaves gp (B, L, K*Q)
    at the pixels of the steps, with the gradients of B and C, the sums of gBC (n_parts, B, K, steps, 2N), and one part
    of g_weight (programs of a route, K, E, R). gz is (B, K, steps, E). E > C needs G = 1.
    """
    Q: tl.constexpr = R + 2 * N
    P: tl.constexpr = K * Q
    i_m, i_k = tl.program_id(0), tl.program_id(1)
    n_walks = steps.to(tl.int64) * B * K
    o_q, o_c = tl.arange(0, QP), tl.arange(0, C)
    dt_weight += i_k * E * R
    g_weight += (i_m.to(tl.int64) * K + i_k) * E * R
    m_q = (o_q < R)[None, :]
    o_w = o_c[:, None] * R + o_q[None, :]
    if E <= C:
        b_gw = tl.zeros((C, QP), tl.float32)
        m_w = (o_c < E)[:, None] & m_q
        b_w = tl.load(dt_weight + o_w, mask=m_w, other=0.0).to(SUM)
        for g in range(G):
            m_r, o_walk, o_p = _code_rows(i_m * G + g, table, i_k, B, L, steps, K, P, Q, IMAGES, STEPS)
            m_gz = m_r[:, None] & (o_c < E)[None, :]
            b_gz = tl.load(gz + o_walk[:, None] * E + o_c[None, :], mask=m_gz, other=0.0).to(SUM)
            b_p = tl.load(p + o_p[:, None] + o_q[None, :], mask=m_r[:, None] & m_q, other=0.0).to(SUM)
            b_gBC = _sum_BC(gBC, m_r, o_walk, n_walks, N, n_parts, NP)
            b_gp = tl.dot(b_gz, b_w, input_precision=PRECISION)
            b_gw = tl.dot(tl.trans(b_gz), b_p, b_gw, input_precision=PRECISION)
            _store_code(b_gp, b_gBC, gp, m_r, o_p, R, N)
        tl.store(g_weight + o_w, b_gw * LOG2E, mask=m_w)
    else:
        m_r, o_walk, o_p = _code_rows(i_m, table, i_k, B, L, steps, K, P, Q, IMAGES, STEPS)
        b_p = tl.load(p + o_p[:, None] + o_q[None, :], mask=m_r[:, None] & m_q, other=0.0).to(SUM)
        b_gBC = _sum_BC(gBC, m_r, o_walk, n_walks, N, n_parts, NP)
        b_gp = tl.zeros((IMAGES * STEPS, QP), tl.float32)
        for c in range(0, E, C):
            m_c = c + o_c < E
            m_w = m_c[:, None] & m_q
            m_gz = m_r[:, None] & m_c[None, :]
            b_gz = tl.load(gz + o_walk[:, None] * E + (c + o_c)[None, :], mask=m_gz, other=0.0).to(SUM)
            b_w = tl.load(dt_weight + c * R + o_w, mask=m_w, other=0.0).to(SUM)
            b_gp = tl.dot(b_gz, b_w, b_gp, input_precision=PRECISION)
            b_gw = tl.dot(tl.trans(b_gz), b_p, input_precision=PRECISION)
            tl.store(g_weight + c * R + o_w, b_gw * LOG2E, mask=m_w)
        _store_code(b_gp, b_gBC, gp, m_r, o_p, R, N)


@kernel(do_not_specialize=["H", "W", "L", "steps"])
def merge_gradient_kernel(
    parts, gy, D, gx, H, W, L, steps, K: tl.constexpr, E: tl.constexpr, ROUTES: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gx (B, L, E) = gy times the sum of D (K, E) + the sum over routes of parts (B, K, steps, E) at their pixels.

    A program takes BLOCK runs of VECTOR channels, one a lane, so that no lane is left over where E is no power of two.
    """
    n = (L * (E // VECTOR) + BLOCK - 1) // BLOCK
    i_b = (tl.program_id(0) // n).to(tl.int64)
    o = tl.program_id(0) % n * BLOCK + tl.arange(0, BLOCK)
    o_l = o // (E // VECTOR)
    m = (o_l < L)[:, None]
    o_c = (o % (E // VECTOR) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    o_x = i_b * L * E + o_l[:, None] * E + o_c
    b_gx = tl.load(gy + o_x, mask=m, other=0.0).to(tl.float32)
    b_D = tl.zeros((BLOCK, VECTOR), tl.float32)
    for k in tl.static_range(K):
        b_D += tl.load(D + k * E + o_c).to(tl.float32)
    b_gx *= b_D
    for k in tl.static_range(K):
        o_t = step_of(o_l, L, H, W, ((ROUTES >> (2 * k)) & 1) == 1, ((ROUTES >> (2 * k)) & 2) == 2)
        o_part = (i_b * K + k) * steps * E + o_t[:, None] * E + o_c
        b_gx += tl.load(parts + o_part, mask=m, other=0.0).to(tl.float32)
    tl.store(gx + o_x, b_gx.to(gx.dtype.element_ty), mask=m)


@triton.jit
def _sum_parts(parts, out, i, n_parts, stride, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Block i of out (SIZE,) = the sum of n_parts parts, `stride` numbers apart."""
    o = i * BLOCK + tl.arange(0, BLOCK)
    o_r = tl.arange(0, ROWS)
    b = tl.zeros((ROWS, BLOCK), tl.float32)
    for r in range(0, n_parts, ROWS):
        m = (r + o_r < n_parts)[:, None] & (o < SIZE)[None, :]
        b += tl.load(parts + (r + o_r).to(tl.int64)[:, None] * stride + o[None, :], mask=m, other=0.0)
    tl.store(out + o, tl.sum(b, axis=0).to(out.dtype.element_ty), mask=o < SIZE)


@kernel(do_not_specialize=["n_weight", "n_channels"])
def sum_parts_kernel(
    g_weight, g_channels, out_weight, out_bias, out_A, out_D, n_weight, n_channels,
    KE: tl.constexpr, R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of the weights from g_weight (n_weight, KE * R) and g_channels (n_channels, (N + 2) * KE)."""
    n_R: tl.constexpr = (KE * R + BLOCK - 1) // BLOCK
    n_A: tl.constexpr = (KE * N + BLOCK - 1) // BLOCK
    n_1: tl.constexpr = (KE + BLOCK - 1) // BLOCK
    stride: tl.constexpr = (N + 2) * KE
    i = tl.program_id(0)
    if i < n_R:
        _sum_parts(g_weight, out_weight, i, n_weight, KE * R, KE * R, ROWS, BLOCK)
    elif i < n_R + n_A:
        _sum_parts(g_channels, out_A, i - n_R, n_channels, stride, KE * N, ROWS, BLOCK)
    elif i < n_R + n_A + n_1:
        _sum_parts(g_channels + N * KE, out_bias, i - n_R - n_A, n_channels, stride, KE, ROWS, BLOCK)
    else:
        _sum_parts(g_channels + (N + 1) * KE, out_D, i - n_R - n_A - n_1, n_channels, stride, KE, ROWS, BLOCK)
