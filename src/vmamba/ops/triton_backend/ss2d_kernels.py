"""The kernels of the fused SS2D: one program walks one route of one image for one block of channels.

A walk of L pixels is cut into T tiles of S steps. A tile lies in registers as (S, C): every lane of the one warp owns
whole columns, so a scan over S is a chain of fused multiply-adds within a lane and needs no exchange between lanes.
Between tiles only the state h (N, C) lives on. delta is made in the kernel: the R numbers of a pixel times Wdt on the
tensor cores.

Everything inside is in powers of two: with z2 = z log2(e), d2 = log2(1 + 2^z2) is softplus(z) log2(e), and the decay
exp(delta A) is 2^(d2 A), one instruction.

Names: o_* offsets, b_* blocks in registers, i_* indices. Letters as in ops/README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus2(z2, EXACT: tl.constexpr):
    """log2(1 + 2^z2), relative error 9e-6, or 2e-7 where EXACT.

    max(z2, 0) + log2(1 + e) with e = 2^-|z2| in (0, 1], and log2(1 + e) = e P(e), P by minimax: accurate relative to
    itself however small delta is, and one special-function instruction where lg2 would make two.
    """
    e = tl.exp2(-tl.abs(z2))
    if EXACT:
        b = e * -0.00468013643 + 0.0286395946
        b = b * e - 0.0821752156
        b = b * e + 0.152978381
        b = b * e - 0.220813012
        b = b * e + 0.283863795
        b = b * e - 0.360012048
        b = b * e + 0.480849715
        b = b * e - 0.721346113
        b = b * e + 1.44269503
    else:
        b = e * -0.0344358895 + 0.146032845
        b = b * e - 0.303036165
        b = b * e + 0.469174051
        b = b * e - 0.720426163
        b = b * e + 1.44268292
    return b * e + tl.maximum(z2, 0.0)


@triton.jit
def _compose(a1, b1, a2, b2):
    """h -> a2 (a1 h + b1) + b2: one step after another of h_l = a_l h_{l-1} + b_l."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _second(first, second):
    return second  # of two elements of a scan the newer


@triton.jit
def _by_columns(b):
    """b itself, (S, C), in the layout of the scans: one lane owns whole columns.

    A scan that keeps the newer of two elements does nothing and costs nothing. The compiler does not carry the layout
    of the tensor cores past a scan, so the arithmetic that follows stays in the scans' layout, and only b is
    exchanged between lanes rather than everything that the scans read: a quarter of all instructions less.
    """
    return tl.associative_scan(b, 0, _second)


@triton.jit
def _row(b, o_rows, i_row):
    """Row i_row of b (rows, C) in fp32, (1, C). All terms but one are the integer 0: no instruction is left."""
    bits = tl.where(o_rows[:, None] == i_row, b.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _steps(b_a, b_b, b_h, S: tl.constexpr):
    """S steps of h = v + b with v = a h_before: v (S, C) and the last h (1, C), from a, b (S, C) and h (1, C)."""
    o_s = tl.arange(0, S)
    b_v = tl.zeros_like(b_a)
    for s in tl.static_range(S):
        b_now = _row(b_a, o_s, s) * b_h
        b_v = tl.where((o_s == s)[:, None], b_now, b_v)
        b_h = b_now + _row(b_b, o_s, s)
    return b_v, b_h


@triton.jit
def _steps_back(b_a, b_c, b_q, S: tl.constexpr):
    """S steps of g = c + q_after with q = a g, from the last to the first: g (S, C) and the last q (1, C).

    Written out, since a reversed scan of Triton's exchanges its numbers between lanes.
    """
    o_s = tl.arange(0, S)
    b_g = tl.zeros_like(b_a)
    for s in tl.static_range(S):
        b_now = _row(b_c, o_s, S - 1 - s) + b_q
        b_g = tl.where((o_s == S - 1 - s)[:, None], b_now, b_g)
        b_q = _row(b_a, o_s, S - 1 - s) * b_now
    return b_g, b_q


@triton.jit
def _pixels(table, i_t, S: tl.constexpr, DIRECT: tl.constexpr, REVERSE: tl.constexpr, L):
    """The pixels of tile i_t: one number to start from, and a number for each step.

    DIRECT walks rows of a grid that the tiles fill exactly: the steps are constants and cost no instruction.
    Elsewhere a table of the walk says where each step is, and names the last pixel again for steps beyond the last.
    """
    o_s = tl.arange(0, S)
    if DIRECT:
        if REVERSE:
            return tl.cast(L - 1 - i_t * S, tl.int64), -o_s
        else:
            return tl.cast(i_t * S, tl.int64), o_s
    else:
        return tl.cast(0, tl.int64), tl.load(table + i_t * S + o_s)


@triton.jit
def _load_dt_weight(dt_weight, o_c, o_q, m_c, R: tl.constexpr, DOT: tl.constexpr):
    """Wdt log2(e) of a channel block, (Q, C), as a sum of two numbers of the type that the tensor cores take.

    The rows of B and C are zero, so that a tile of p goes to the tensor cores as it is.
    """
    b = tl.load(dt_weight + o_c[None, :] * R + o_q[:, None], mask=m_c[None, :] & (o_q < R)[:, None], other=0.0)
    b = b.to(tl.float32) * LOG2E
    high = b.to(DOT)
    return high, (b - high.to(tl.float32)).to(DOT)


@triton.jit
def _z2(b_p, b_high, b_low, b_bias):
    """z log2(e) = Wdt code + bias, (S, C), in fp32: the weight keeps 16 bits where p is bf16."""
    if b_p.dtype == tl.float32:
        b = tl.dot(b_p, b_high, input_precision="tf32x3")
    else:
        b = tl.dot(b_p, b_high, tl.dot(b_p, b_low))
    return _by_columns(b) + b_bias


@triton.jit
def _carried(sums, ends, b_A, o_c, m_c, i_first, i_last, step, N: tl.constexpr, E: tl.constexpr):
    """One state number (1, C) after the segments from i_first up to i_last, each with its total decay and its end."""
    b = tl.zeros_like(b_A)
    for i in range(i_first, i_last, step):
        b_total = tl.load(sums + i * E + o_c, mask=m_c, other=0.0)
        b = b * tl.exp2(b_total * b_A) + tl.load(ends + i * N * E + o_c, mask=m_c, other=0.0)
    return b


@triton.jit
def _walk(
    x, p, dt_weight, dt_bias, A, D, table, y, states, carry, ends, sums,
    i_b, i_k, i_c, i_g, B, L, T, G, n_segments,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr, C: tl.constexpr, LANE: tl.constexpr, QP: tl.constexpr, DOT: tl.constexpr,
    DIRECT: tl.constexpr, REVERSE: tl.constexpr, KEEP: tl.constexpr, ENDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    o_s, o_q = tl.arange(0, S), tl.arange(0, QP)
    # a hint, weaker than the truth: a lane takes LANE neighbouring channels and no more, and so all S rows of them
    o_c = i_c * C + tl.max_contiguous(tl.multiple_of(tl.arange(0, C), LANE), 2)
    m_c = o_c < E
    Q: tl.constexpr = R + 2 * N
    P: tl.constexpr = K * Q
    WIDTH: tl.constexpr = Q if N == 1 else R  # columns of a tile of p: all, or delta's code

    b_high, b_low = _load_dt_weight(dt_weight + i_k * E * R, o_c, o_q, m_c, R, DOT)
    o_c, m_c = o_c[None, :], m_c[None, :]  # what belongs to a channel is (1, C) from here
    b_bias = tl.load(dt_bias + i_k * E + o_c, mask=m_c, other=0.0).to(tl.float32) * LOG2E
    b_D = tl.load(D + i_k * E + o_c, mask=m_c, other=0.0).to(tl.float32)
    A += (i_k * E + o_c) * N
    b_A = tl.load(A, mask=m_c, other=0.0).to(tl.float32)  # of state 0

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
        b_h = _carried(sums, ends, b_A, o_c, m_c, 0, i_g, 1, N, E)
    else:
        for n in range(N):
            b_An = tl.load(A + n, mask=m_c, other=0.0).to(tl.float32)
            tl.store(carry + n * E, _carried(sums, ends + n * E, b_An, o_c, m_c, 0, i_g, 1, N, E), mask=m_c)

    i_first = i_g * G
    i_end = tl.minimum(i_first + G, T)
    # Loads are issued ahead of their use: x of the next tile, p of the one after it (whose way through shared memory
    # to the tensor cores would else wait for it), and the table one tile before the loads that it tells where to
    # read.
    i_p, o_p = _pixels(table, i_first, S, DIRECT, REVERSE, L)
    b_p = tl.load(p_p + (i_p * P + o_p[:, None].to(tl.int64) * P), mask=m_q, other=0.0).to(DOT)
    b_x = tl.load(p_x + (i_p * E + o_p[:, None].to(tl.int64) * E), mask=m_c, other=0.0)
    i_p1, o_p1 = _pixels(table, tl.minimum(i_first + 1, i_end - 1), S, DIRECT, REVERSE, L)
    b_z2 = _z2(b_p, b_high, b_low, b_bias)
    b_p1 = tl.load(p_p + (i_p1 * P + o_p1[:, None].to(tl.int64) * P), mask=m_q, other=0.0).to(DOT)
    for i_t in range(i_first, i_end):
        p_BC = p + (i_p * P + R) + o_p.to(tl.int64) * P
        p_state = states + (walk * T + i_t) * N * E + o_c
        p_tile = p_y + (walk * T + i_t) * (S * E)
        first = (i_t == i_first) & ((i_g == 0) | ENDS)
        b_x1 = tl.load(p_x + (i_p1 * E + o_p1[:, None].to(tl.int64) * E), mask=m_c, other=0.0)
        tl.debug_barrier()  # of one warp, so next to free: it keeps the assembler from putting these loads off
        i_p2, o_p2 = _pixels(table, tl.minimum(i_t + 2, i_end - 1), S, DIRECT, REVERSE, L)
        b_d2 = _softplus2(b_z2, EXACT)
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
            _, b_hs = tl.associative_scan((b_a, b_b), 0, _compose)
            b_h = _row(b_hs, o_s, S - 1)
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
                _, b_hs = tl.associative_scan((b_a, b_b), 0, _compose)
                tl.store(carry + n * E, _row(b_hs, o_s, S - 1), mask=m_c)
                if not ENDS:
                    b_C = tl.load(p_BC + N + n).to(tl.float32)
                    b_y += b_hs * b_C[:, None]
        if ENDS:
            b_sum += tl.sum(b_d2, axis=0, keep_dims=True)
        else:
            tl.store(p_tile, b_y.to(y.dtype.element_ty), mask=m_c)
        b_z2 = _z2(b_p1, b_high, b_low, b_bias)
        b_p1 = tl.load(p_p + (i_p2 * P + o_p2[:, None].to(tl.int64) * P), mask=m_q, other=0.0).to(DOT)
        b_x = b_x1
        i_p, o_p = i_p1, o_p1
        i_p1, o_p1 = i_p2, o_p2
    if ENDS:
        if N == 1:
            tl.store(carry, b_h, mask=m_c)
        tl.store(sums + i_g * E + o_c, b_sum, mask=m_c)


@triton.jit(do_not_specialize=["B", "L", "T", "G", "n_segments"])
def ss2d_forward_kernel(
    x, p, dt_weight, dt_bias, A, D, table, y, states, carry, ends, sums, B, L, T, G, n_segments,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr, C: tl.constexpr, LANE: tl.constexpr, QP: tl.constexpr, DOT: tl.constexpr,
    KINDS: tl.constexpr, BODIES: tl.constexpr, KEEP: tl.constexpr, ENDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Walk one segment of one route: y (B, K, T*S, E) in the order of the walk.

    The grid is B * n_segments * K * ceil(E / C) programs, channel blocks fastest, so that neighbours share x and p in
    L2. A segment is G tiles. With n_segments > 1 a first launch with ENDS leaves, for each segment, in carry the
    state that it would end with from zero, and the sum of d2, which is its total decay; the second takes both and
    starts each segment from the right state. For N > 1 the states between tiles live in carry (B, K, n_segments, N,
    E). KINDS holds two bits a route: 0 by the table, 1 rows forward, 2 rows reversed; BODIES says which kinds occur.
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
                    K, E, R, N, S, C, LANE, QP, DOT, c > 0, c == 2, KEEP, ENDS, EXACT,
                )  # fmt: skip


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

    b_high, b_low = _load_dt_weight(dt_weight + i_k * E * R, o_c, o_q, m_c, R, DOT)
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
            b_q = _carried(sums, ends, b_A, o_c, m_c, n_segments - 1, i_g, -1, N, E)
        else:
            for n in range(N):
                b_An = tl.load(A + n, mask=m_c, other=0.0).to(tl.float32)
                b_qn = _carried(sums, ends + n * E, b_An, o_c, m_c, n_segments - 1, i_g, -1, N, E)
                tl.store(carry + n * E, b_qn, mask=m_c)
                tl.store(gA + n, tl.zeros((1, C), tl.float32), mask=m_c)
        b_gA = tl.zeros((1, C), tl.float32)
        b_g_bias = tl.zeros((1, C), tl.float32)
        b_gD = tl.zeros((1, C), tl.float32)
        b_g_weight = tl.zeros((C, QP), tl.float32)

    i_first = i_g * G
    i_end = tl.minimum(i_first + G, T)
    # Loads ahead of their use as in the forward, but for x and gy: a second tile of them would not fit into registers.
    i_p, o_p = _pixels(table, i_end - 1, S, DIRECT, REVERSE, L)
    b_p = tl.load(p_p + (i_p * P + o_p[:, None].to(tl.int64) * P), mask=m_q, other=0.0).to(DOT)
    b_z2 = _z2(b_p, b_high, b_low, b_bias)
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
        i_p, o_p = _pixels(table, tl.maximum(i_t - 1, i_first), S, DIRECT, REVERSE, L)
        b_p1 = tl.load(p_p + (i_p * P + o_p[:, None].to(tl.int64) * P), mask=m_q, other=0.0).to(DOT)
        b_d2 = _softplus2(b_z2, EXACT)
        if ENDS:
            b_sum += tl.sum(b_d2, axis=0, keep_dims=True)
            if N == 1:
                b_c = b_gy * b_C[:, None]
                _, b_q = _steps_back(tl.exp2(b_d2 * b_A), b_c, b_q, S)
            else:
                for n in range(N):
                    b_An = tl.load(A + n, mask=m_c, other=0.0).to(tl.float32)
                    b_c = b_gy * tl.load(p_BC + N + n).to(tl.float32)[:, None]
                    b_qn = tl.load(carry + n * E, mask=m_c & (not last), other=0.0)
                    _, b_qn = _steps_back(tl.exp2(b_d2 * b_An), b_c, b_qn, S)
                    tl.store(carry + n * E, b_qn, mask=m_c)
        else:
            b_delta = b_d2 * LN2
            b_du = b_delta * b_x
            b_gp = tl.zeros((S, QP), tl.float32)
            if N == 1:
                b_a = tl.exp2(b_d2 * b_A)
                b_b = b_du * b_B[:, None]
                b_v, _ = _steps(b_a, b_b, b_h, S)
                b_gp = _sum_channels(b_gy * (b_v + b_b), R + 1, b_gp, SUM, PRECISION)
                b_g, b_q = _steps_back(b_a, b_gy * b_C[:, None], b_q, S)
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
                    b_v, _ = _steps(b_a, b_b, b_h, S)
                    b_gC = _sum_channels(b_gy * (b_v + b_b), -1, tl.zeros((S, 16), tl.float32), SUM, PRECISION)
                    tl.store(p_sum + (tile * (S * Q) + N + n), b_gC, mask=m_sum)
                    b_g, b_qn = _steps_back(b_a, b_gy * b_C[:, None], b_qn, S)
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
        b_z2 = _z2(b_p, b_high, b_low, b_bias)

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


@triton.jit
def _step(o_l, L, H, W, COLUMN: tl.constexpr, REVERSE: tl.constexpr):
    """The step at which a walk visits pixels o_l (row-major)."""
    if COLUMN:
        o_l = (o_l % W) * H + o_l // W
    if REVERSE:
        o_l = L - 1 - o_l
    return o_l


@triton.jit(do_not_specialize=["H", "W", "L", "steps"])
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


@triton.jit(do_not_specialize=["H", "W", "L", "steps"])
def merge_kernel(
    parts, y, H, W, L, steps, K: tl.constexpr, E: tl.constexpr, ROUTES: tl.constexpr,
    PIXELS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y (B, L, E) = the sum over routes of parts (B, K, steps, E), each put back at its pixels, summed in fp32."""
    n_l = (L + PIXELS - 1) // PIXELS
    i_b = (tl.program_id(0) // n_l).to(tl.int64)
    o_l = tl.program_id(0) % n_l * PIXELS + tl.arange(0, PIXELS)
    o_c = tl.program_id(1) * C + tl.arange(0, C)
    m = (o_l < L)[:, None] & (o_c < E)[None, :]
    b_y = tl.zeros((PIXELS, C), tl.float32)
    for k in tl.static_range(K):
        o_t = _step(o_l, L, H, W, ((ROUTES >> (2 * k)) & 1) == 1, ((ROUTES >> (2 * k)) & 2) == 2)
        o = ((i_b * K + k) * steps + o_t)[:, None] * E + o_c
        b_y += tl.load(parts + o, mask=m, other=0.0).to(tl.float32)
    tl.store(y + (i_b * L + o_l)[:, None] * E + o_c, b_y.to(y.dtype.element_ty), mask=m)


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
        o_t = _step(o_l, L, H, W, ((ROUTES >> (2 * k)) & 1) == 1, ((ROUTES >> (2 * k)) & 2) == 2)
        b_gp = tl.zeros((PIXELS, QP), tl.float32)
        for i in range(n_parts):
            o = (((tl.cast(i, tl.int64) * B + i_b) * K + k) * steps + o_t)[:, None] * Q + o_q[None, :]
            b_gp += tl.load(parts + o, mask=m, other=0.0)
        o = (i_b * L + o_l)[:, None] * (K * Q) + k * Q + o_q[None, :]
        tl.store(gp + o, b_gp.to(gp.dtype.element_ty), mask=m)
