"""The 1-D selective scan's kernels, forward and backward.

One program walks a block of C channels of one sequence, tile by tile. A tile is M * S steps, and a lane of a warp owns
S neighbouring steps of one channel: what belongs to a step is (M, C), lanes along time first, and a tile is a tuple of
S such blocks, so that the scan over S is a chain of multiply-adds within a lane, written out, without an exchange.
For each state n, one after another:

1. every lane walks its S steps from a zero state;
2. a scan across the M lanes of a channel, log2(M) exchanges, joins the ends and gives each lane its first state; the
   decay over a lane's steps is one 2^x of the sum of its steps' sizes;
3. every lane walks its steps again, from the right state.

The backward recomputes a tile's states so, from the state before it, and walks the state's gradient the same way, the
other way round. Everything inside is in powers of two (see `ss2d_tiles`): d2 = delta log2(e).

Rows of u, delta, B, C, gy start at multiples of 16 numbers and are readable to the next one, `L_rows`, beyond L.

Names: o_* offsets, b_* blocks in registers, i_* indices, m_* masks, p_* pointers; t_* tuples of a block a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .ss2d_tiles import LN2, LOG2E, compose, softplus2

# Triton reads no starred expressions, so tuples grow by addition; in a loop a name keeps its type, so that the unused
# have names of their own.
# ruff: noqa: RUF005, RUF059

GRAIN = tl.constexpr(128)  # steps between two states that are kept for backward
ROWS = tl.constexpr(16)  # states whose sums over channels are gathered in the rows of one product


@triton.jit
def _halve(t):
    """Each block (.., 2n) of a tuple in two, (.., n): first those with even, then those with odd last index."""
    even, odd = (), ()
    for i in tl.static_range(len(t)):
        b = t[i]
        b_even, b_odd = tl.split(tl.reshape(b, (b.shape[0], b.shape[1], b.shape[2] // 2, 2)))
        even = even + (b_even,)
        odd = odd + (b_odd,)
    return even + odd


@triton.jit
def _words(p, o_m, C: tl.constexpr, mask):
    """Four neighbouring 32-bit words for each lane, four blocks (M, C); p (1, C): pointers to words."""
    M: tl.constexpr = o_m.shape[0]
    # vectors last, then lanes along time: in this order a lane gets whole vectors, and nothing moves
    o = tl.broadcast_to(o_m[:, :, None] + tl.arange(0, 4)[None, None, :], (M, C, 4))
    b = tl.load(p[:, :, None] + o, mask=tl.broadcast_to(mask[:, :, None], (M, C, 4)), other=0)
    low, high = _halve((b,))
    b_0, b_2 = tl.split(low)
    b_1, b_3 = tl.split(high)
    return b_0, b_1, b_2, b_3


@triton.jit
def load_packed(p, S: tl.constexpr, C: tl.constexpr, M: tl.constexpr, i_step, L_rows):
    """The S steps of each lane in the tile that begins at step i_step, zero beyond L_rows, as they lie: in words.

    p (1, C): starts of rows.
    """
    PACKED: tl.constexpr = 32 // p.dtype.element_ty.primitive_bitwidth  # numbers in a word
    o_m = tl.arange(0, M)[:, None] * S
    mask = i_step + o_m < L_rows
    p = (p + i_step).to(tl.pointer_type(tl.int32))
    t = ()
    for i in tl.static_range(S // PACKED // 4):
        t = t + _words(p + 4 * i, o_m // PACKED, C, mask)
    return t


@triton.jit
def unpack(t_words, dtype: tl.constexpr):
    """S blocks (M, C) in fp32 from the words of `load_packed`."""
    t = ()
    for i in tl.static_range(len(t_words)):
        b = t_words[i]
        if dtype == tl.float32:
            t = t + (b.to(tl.float32, bitcast=True),)
        elif dtype == tl.bfloat16:
            t = t + ((b << 16).to(tl.float32, bitcast=True), (b & -65536).to(tl.float32, bitcast=True))
        else:
            b_first = b.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            t = t + (b_first, (b >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))
    return t


@triton.jit
def load_steps(p, S: tl.constexpr, C: tl.constexpr, M: tl.constexpr, i_step, L_rows):
    return unpack(load_packed(p, S, C, M, i_step, L_rows), p.dtype.element_ty)


@triton.jit
def join_steps(t):
    """(M, C, n) of a tuple of n blocks (M, C), n a power of two."""
    n: tl.constexpr = len(t)
    joined = t
    for i in tl.static_range(4):
        if n >> i > 1:
            t, joined = joined, ()
            for j in tl.static_range(len(t) // 2):
                # each of the first half with its like of the second: the first index of all that follow
                b = tl.join(t[j], t[j + len(t) // 2])
                joined = joined + (tl.reshape(b, (b.shape[0], b.shape[1], 2 << i)),)
    return joined[0]


@triton.jit
def store_steps(p, t, m_c, i_step, L_rows):
    """The inverse of `load_steps`: nothing is written beyond L_rows or where m_c (1, C) is false."""
    S: tl.constexpr = len(t)
    M: tl.constexpr = t[0].shape[0]
    C: tl.constexpr = t[0].shape[1]
    V: tl.constexpr = 128 // p.dtype.element_ty.primitive_bitwidth  # numbers in a vector of 16 bytes
    o_m = tl.arange(0, M)[:, None] * S
    mask = tl.broadcast_to(((i_step + o_m < L_rows) & m_c)[:, :, None], (M, C, V))
    o = tl.broadcast_to(o_m[:, :, None] + tl.arange(0, V)[None, None, :], (M, C, V))
    for i in tl.static_range(S // V):
        t_vector = ()
        for j in tl.static_range(V):
            t_vector = t_vector + (t[i * V + j],)
        tl.store((p + (i_step + i * V))[:, :, None] + o, join_steps(t_vector).to(p.dtype.element_ty), mask=mask)


@triton.jit
def step_sizes(t_delta, b_bias, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr):
    """z log2(e) and delta log2(e) of each step, from delta as given and the bias times log2(e)."""
    t_z2, t_d2 = (), ()
    for s in tl.static_range(len(t_delta)):
        b_z2 = t_delta[s] * LOG2E + b_bias
        t_z2 = t_z2 + (b_z2,)
        if SOFTPLUS:
            t_d2 = t_d2 + (softplus2(b_z2, EXACT),)
        else:
            t_d2 = t_d2 + (b_z2,)
    return t_z2, t_d2


@triton.jit
def states_at_starts(t_a, t_b, b_total, b_h):
    """(state before each lane's steps, state after them), both (M, C), from b_h, the state before the tile."""
    S: tl.constexpr = len(t_a)
    M: tl.constexpr = b_total.shape[0]
    o_m = tl.arange(0, M)[:, None]
    b_end = t_b[0]
    for s in tl.static_range(1, S):
        b_end = t_a[s] * b_end + t_b[s]
    b_end = tl.where(o_m == 0, b_total * b_h + b_end, b_end)
    b_total, b_end = tl.associative_scan((b_total, b_end), 0, compose)
    b_start = tl.gather(b_end, tl.broadcast_to(tl.maximum(o_m - 1, 0), b_end.shape), 0)
    return tl.where(o_m == 0, b_h, b_start), b_end


@triton.jit
def gradients_at_ends(t_a, t_c, b_total, b_q):
    """The same for q = a (c + q_after), walked from the last step to the first.

    Returns (q after each lane's steps, q before lane M - 1 - m's at lane m).
    """
    S: tl.constexpr = len(t_a)
    M: tl.constexpr = b_total.shape[0]
    o_m = tl.arange(0, M)[:, None]
    b_first = t_a[S - 1] * t_c[S - 1]
    for s in tl.static_range(1, S):
        b_first = t_a[S - 1 - s] * (t_c[S - 1 - s] + b_first)
    b_first = tl.where(o_m == M - 1, b_total * b_q + b_first, b_first)
    # a reversed scan of Triton's turns its lanes round by log2(M) exchanges each time, a gather by one
    o_turned = tl.broadcast_to(-o_m + (M - 1), b_first.shape)
    b_total, b_first = tl.associative_scan(
        (tl.gather(b_total, o_turned, 0), tl.gather(b_first, o_turned, 0)), 0, compose
    )
    b_after = tl.gather(b_first, tl.broadcast_to(tl.maximum(-o_m + (M - 2), 0), b_first.shape), 0)
    return tl.where(o_m == M - 1, b_q, b_after), b_first


@triton.jit
def _carried(sums, ends, b_A, o_c, i_first, i_last, step, channels, N):
    """One state number (1, C) after the segments from i_first up to i_last, each with its total decay and its end."""
    b = tl.zeros_like(b_A)
    for i in range(i_first, i_last, step):
        b_total = tl.load(sums + i * channels + o_c)
        b = b * tl.exp2(b_total * b_A) + tl.load(ends + tl.cast(i, tl.int64) * channels * N + o_c * N)
    return b


@triton.jit
def _place(C: tl.constexpr, K, E, n_segments):
    """Of a program: channels in their group (1, C), which of them are its own, group, segment and sequence.

    The grid is batch * n_segments * K * ceil(E / C) programs, channel blocks fastest, so that neighbours share B and C
    in L2. Lanes beyond a group's last channel repeat it and write nothing.
    """
    n_c = (E + C - 1) // C
    i = tl.program_id(0)
    i_c, i = i % n_c, i // n_c
    i_k, i = i % K, i // K
    i_g, i_b = i % n_segments, i // n_segments
    o_c = i_c * C + tl.arange(0, C)[None, :]
    return tl.minimum(o_c, E - 1), o_c < E, i_c, i_k, i_g, i_b


@triton.jit
def _rows(p, i_b, o_c, stride_b, stride_c):
    """Pointers (1, C) to the rows of channels o_c (1, C) of one sequence."""
    return p + (i_b.to(tl.int64) * stride_b + o_c.to(tl.int64) * stride_c)


_SIZES = ["L", "L_rows", "T", "G", "n_segments", "n_states", "K", "E", "N"]


@kernel(do_not_specialize=_SIZES)
def scan_forward_kernel(
    u, delta, A, B, C_map, D, delta_bias, y, carry, ends, sums, states,
    u_b, u_c, delta_b, delta_c, B_b, B_k, B_n, C_b, C_k, C_n, y_b, y_c,
    L, L_rows, T, G, n_segments, n_states, K, E, N,
    S: tl.constexpr, C: tl.constexpr, M: tl.constexpr, EVEN: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
    KEEP: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Walk one segment, G of a sequence's T tiles; names ending in _b, _c, _k, _n are strides.

    carry (batch, n_segments, K*E, N) holds the states between tiles, and in the end those after each segment. states
    (batch, K*E, n_states, N) are those before each GRAIN steps. With n_segments > 1 a first launch with ENDS leaves
    in carry the state that each segment would end with from zero, and in sums the sum of its d2, which is its total
    decay; the second takes both and starts each segment from the right state. EVEN: tiles fill L exactly.
    """
    o_c, m_c, i_c, i_k, i_g, i_b = _place(C, K, E, n_segments)
    o_m = tl.arange(0, M)[:, None]
    channels = K * E
    o_c += i_k * E
    b_bias = tl.load(delta_bias + o_c).to(tl.float32) * LOG2E
    b_D = tl.load(D + o_c).to(tl.float32)
    p_A = A + o_c * N
    p_u = _rows(u, i_b, o_c, u_b, u_c)
    p_delta = _rows(delta, i_b, o_c, delta_b, delta_c)
    p_y = _rows(y, i_b, o_c, y_b, y_c)
    p_B = _rows(B + i_b.to(tl.int64) * B_b + i_k.to(tl.int64) * B_k, i_b, o_c, 0, 0)
    p_C = _rows(C_map + i_b.to(tl.int64) * C_b + i_k.to(tl.int64) * C_k, i_b, o_c, 0, 0)
    segment = i_b.to(tl.int64) * n_segments
    p_carry = carry + (segment + i_g) * channels * N + o_c * N
    p_states = states + ((i_b.to(tl.int64) * channels + o_c) * n_states + o_m * S // GRAIN) * N

    i_first = i_g * G
    i_end = tl.minimum(i_first + G, T)
    i_zero = i_first  # the tile before which the state is zero
    if not ENDS:
        if i_g > 0:
            i_zero = -1
            for n in range(N):
                b_A = tl.load(p_A + n).to(tl.float32)
                b_h = _carried(
                    sums + segment * channels, ends + segment * channels * N + n, b_A, o_c, 0, i_g, 1, channels, N
                )
                tl.store(p_carry + n, b_h, mask=m_c)
            tl.debug_barrier()
    b_sum = tl.zeros((M, C), tl.float32)
    for i_t in range(i_first, i_end):
        i_step = i_t * (M * S)
        t_u = load_steps(p_u, S, C, M, i_step, L_rows)
        # of state 0; then always one state ahead of their use
        b_next_A = tl.load(p_A).to(tl.float32)
        t_B_words = load_packed(p_B, S, C, M, i_step, L_rows)
        t_C_words = load_packed(p_C, S, C, M, i_step, L_rows)
        t_z2, t_d2 = step_sizes(load_steps(p_delta, S, C, M, i_step, L_rows), b_bias, SOFTPLUS, EXACT)
        if not EVEN:
            t_whole, t_d2 = t_d2, ()
            for s in tl.static_range(S):
                # beyond the last step: no decay and no input
                t_d2 = t_d2 + (tl.where(i_step + o_m * S + s < L, t_whole[s], 0.0),)
        t_du, t_y = (), ()
        b_lane = tl.zeros((M, C), tl.float32)
        for s in tl.static_range(S):
            t_du = t_du + (t_d2[s] * (t_u[s] * LN2),)
            t_y = t_y + (t_u[s] * b_D,)
            b_lane += t_d2[s]
        b_sum += b_lane
        m_h = tl.full((1, C), i_t, tl.int32) != i_zero
        i_state = i_t * (M * S // GRAIN)
        for n in range(N):
            b_A = b_next_A
            b_h = tl.load(p_carry + n, mask=m_h, other=0.0)
            t_B, t_C = unpack(t_B_words, B.dtype.element_ty), unpack(t_C_words, C_map.dtype.element_ty)
            o_n = tl.cast(tl.minimum(n + 1, N - 1), tl.int64)
            b_next_A = tl.load(p_A + o_n).to(tl.float32)
            t_B_words = load_packed(p_B + o_n * B_n, S, C, M, i_step, L_rows)
            t_C_words = load_packed(p_C + o_n * C_n, S, C, M, i_step, L_rows)
            t_a, t_b = (), ()
            for s in tl.static_range(S):
                t_a = t_a + (tl.exp2(t_d2[s] * b_A),)
                t_b = t_b + (t_du[s] * t_B[s],)
            b_h, b_end = states_at_starts(t_a, t_b, tl.exp2(b_lane * b_A), b_h)
            tl.store(p_carry + n + tl.zeros((M, C), tl.int32), b_end, mask=m_c & (o_m == M - 1))
            if not ENDS:
                if KEEP:
                    m = m_c & (o_m * S % GRAIN == 0) & (i_state + o_m * S // GRAIN < n_states)
                    tl.store(p_states + tl.cast(i_state, tl.int64) * N + n, b_h, mask=m)
                t_before, t_y = t_y, ()
                for s in tl.static_range(S):
                    b_h = t_a[s] * b_h + t_b[s]
                    t_y = t_y + (t_before[s] + t_C[s] * b_h,)
        if not ENDS:
            store_steps(p_y, t_y, m_c, i_step, L_rows)
        tl.debug_barrier()  # a lane reads what its channel's last lane has left in carry
    if ENDS:
        tl.store(sums + (segment + i_g) * channels + o_c, tl.sum(b_sum, axis=0, keep_dims=True), mask=m_c)


@triton.jit
def _add_channels(b_sums, b_row, t, SUM: tl.constexpr):
    """Add the sums over C >= 16 channels of S blocks (M, C) to the row of b_sums (ROWS, M * S) that b_row has ones in.

    On the tensor cores: a sum across lanes and warps costs far more.
    """
    S: tl.constexpr = len(t)
    M: tl.constexpr = t[0].shape[0]
    C: tl.constexpr = t[0].shape[1]
    b = tl.reshape(tl.permute(join_steps(t).to(SUM), (1, 0, 2)), (C, M * S))
    return tl.dot(b_row, b, b_sums, input_precision="tf32x3")


@triton.jit
def _store_channels(p, t, m_c, i_step, L_rows):
    """The same for fewer channels, stored to the row that starts at p."""
    S: tl.constexpr = len(t)
    o_l = i_step + tl.arange(0, t[0].shape[0])[:, None] * S + tl.arange(0, S)[None, :]
    b = tl.sum(tl.where(m_c[:, :, None], join_steps(t), 0.0), axis=1)
    tl.store(p + o_l, b, mask=o_l < L_rows)


@kernel(do_not_specialize=_SIZES)
def scan_backward_kernel(
    gy, u, delta, A, B, C_map, D, delta_bias, states, gu, gdelta, g_maps, gA, gD, g_bias, carry, ends, sums,
    gy_b, gy_c, u_b, u_c, delta_b, delta_c, B_b, B_k, B_n, C_b, C_k, C_n, gu_b, gu_c,
    L, L_rows, T, G, n_segments, n_states, K, E, N,
    S: tl.constexpr, C: tl.constexpr, M: tl.constexpr, EVEN: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
    KEPT: tl.constexpr, ENDS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Walk one segment back, tile by tile, each from the state before it; grid, carry, ends and sums as the forward's.

    The state's gradient is g_l = C_l gy_l + a_{l+1} g_{l+1}; what is carried is q_l = a_l g_l. gu and gdelta lie alike.
    What is a sum over channels is left as one part for each channel block of a group, g_maps (2, blocks, batch, K, N,
    L_rows) for B and C; what is a sum over steps as one for each segment, gA (batch, n_segments, K*E, N), gD and g_bias
    (batch, n_segments, K*E): no atomics, so the same result every time. KEPT: there is more than one state.
    """
    o_c, m_c, i_c, i_k, i_g, i_b = _place(C, K, E, n_segments)
    o_m = tl.arange(0, M)[:, None]
    channels = K * E
    o_c += i_k * E
    b_bias = tl.load(delta_bias + o_c).to(tl.float32) * LOG2E
    b_D = tl.load(D + o_c).to(tl.float32)
    p_A = A + o_c * N
    p_gy = _rows(gy, i_b, o_c, gy_b, gy_c)
    p_u = _rows(u, i_b, o_c, u_b, u_c)
    p_delta = _rows(delta, i_b, o_c, delta_b, delta_c)
    p_gu = _rows(gu, i_b, o_c, gu_b, gu_c)
    p_gdelta = _rows(gdelta, i_b, o_c, gu_b, gu_c)
    p_B = _rows(B + i_b.to(tl.int64) * B_b + i_k.to(tl.int64) * B_k, i_b, o_c, 0, 0)
    p_C = _rows(C_map + i_b.to(tl.int64) * C_b + i_k.to(tl.int64) * C_k, i_b, o_c, 0, 0)
    segment = i_b.to(tl.int64) * n_segments
    p_carry = carry + (segment + i_g) * channels * N + o_c * N
    p_gA = gA + (segment + i_g) * channels * N + o_c * N
    p_states = states + (i_b.to(tl.int64) * channels + o_c) * n_states * N
    L_rows = tl.multiple_of(L_rows, 16)
    n_b = tl.num_programs(0) // (((E + C - 1) // C) * K * n_segments)
    half = tl.cast((E + C - 1) // C, tl.int64) * n_b * K * N * L_rows
    p_maps = g_maps + ((tl.cast(i_c, tl.int64) * n_b + i_b) * K + i_k) * N * L_rows

    o_row = tl.arange(0, ROWS)[:, None]

    i_first = i_g * G
    i_end = tl.minimum(i_first + G, T)
    i_zero = i_end - 1  # the tile after which the state's gradient is zero
    if not ENDS:
        if i_g < n_segments - 1:
            i_zero = -1
            for n in range(N):
                b_A = tl.load(p_A + n).to(tl.float32)
                b_q = _carried(
                    sums + segment * channels, ends + segment * channels * N + n, b_A, o_c, n_segments - 1, i_g, -1,
                    channels, N,
                )  # fmt: skip
                tl.store(p_carry + n, b_q, mask=m_c)
            tl.debug_barrier()
    b_sum = tl.zeros((M, C), tl.float32)
    b_gD = tl.zeros((M, C), tl.float32)
    b_g_bias = tl.zeros((M, C), tl.float32)
    for i in range(i_first, i_end):
        i_t = i_end - 1 - (i - i_first)
        i_step = i_t * (M * S)
        t_z2, t_d2 = step_sizes(load_steps(p_delta, S, C, M, i_step, L_rows), b_bias, SOFTPLUS, EXACT)
        # beyond the last step gy = 0 makes every gradient zero, the gradient of the state too
        t_gy = load_steps(p_gy, S, C, M, i_step, L_rows)
        b_lane = tl.zeros((M, C), tl.float32)
        for s in tl.static_range(S):
            b_lane += t_d2[s]
        m_q = tl.full((1, C), i_t, tl.int32) != i_zero
        if ENDS:
            b_sum += b_lane
            for n in range(N):
                b_A = tl.load(p_A + n).to(tl.float32)
                b_q = tl.load(p_carry + n, mask=m_q, other=0.0)
                t_C = load_steps(p_C + tl.cast(n, tl.int64) * C_n, S, C, M, i_step, L_rows)
                t_a, t_c = (), ()
                for s in tl.static_range(S):
                    t_a = t_a + (tl.exp2(t_d2[s] * b_A),)
                    t_c = t_c + (t_gy[s] * t_C[s],)
                b_q, b_first = gradients_at_ends(t_a, t_c, tl.exp2(b_lane * b_A), b_q)
                tl.store(p_carry + n + tl.zeros((M, C), tl.int32), b_first, mask=m_c & (o_m == M - 1))
        else:
            t_u = load_steps(p_u, S, C, M, i_step, L_rows)
            t_du, t_gdu, t_gdelta = (), (), ()
            for s in tl.static_range(S):
                t_du = t_du + (t_d2[s] * (t_u[s] * LN2),)
                t_gdu = t_gdu + (tl.zeros((M, C), tl.float32),)
                t_gdelta = t_gdelta + (tl.zeros((M, C), tl.float32),)
            i_state = tl.cast(i_t, tl.int64) * (M * S // GRAIN)
            m_gA = (tl.full((M, C), i_t, tl.int32) != i_end - 1) & (o_m == 0)
            for n_first in range(0, N, ROWS):
                b_sums_B = tl.zeros((ROWS, M * S), tl.float32)
                b_sums_C = tl.zeros((ROWS, M * S), tl.float32)
                for n in range(n_first, tl.minimum(n_first + ROWS, N)):
                    b_A = tl.load(p_A + n).to(tl.float32)
                    b_q = tl.load(p_carry + n, mask=m_q, other=0.0)
                    b_gA = tl.load(p_gA + n + tl.zeros((M, C), tl.int32), mask=m_gA, other=0.0)
                    if KEPT:
                        b_h = tl.load(p_states + i_state * N + n)
                    else:
                        b_h = tl.zeros((1, C), tl.float32)
                    t_B = load_steps(p_B + tl.cast(n, tl.int64) * B_n, S, C, M, i_step, L_rows)
                    t_C = load_steps(p_C + tl.cast(n, tl.int64) * C_n, S, C, M, i_step, L_rows)
                    t_a, t_b = (), ()
                    for s in tl.static_range(S):
                        t_a = t_a + (tl.exp2(t_d2[s] * b_A),)
                        t_b = t_b + (t_du[s] * t_B[s],)
                    b_total = tl.exp2(b_lane * b_A)
                    b_h, b_end = states_at_starts(t_a, t_b, b_total, b_h)
                    t_v, t_gC = (), ()
                    for s in tl.static_range(S):
                        b_v = t_a[s] * b_h
                        b_h = b_v + t_b[s]
                        t_v = t_v + (b_v,)
                        t_gC = t_gC + (t_gy[s] * b_h,)
                    t_c = ()
                    for s in tl.static_range(S):
                        t_c = t_c + (t_gy[s] * t_C[s],)
                    b_q, b_first = gradients_at_ends(t_a, t_c, b_total, b_q)
                    tl.store(p_carry + n + tl.zeros((M, C), tl.int32), b_first, mask=m_c & (o_m == M - 1))
                    b_gAn = tl.zeros((M, C), tl.float32)
                    t_gB, t_gdu_before, t_gdu, t_gdelta_before, t_gdelta = (), t_gdu, (), t_gdelta, ()
                    for s in tl.static_range(S):
                        b_g = t_c[S - 1 - s] + b_q
                        b_q = t_a[S - 1 - s] * b_g
                        b_gv = b_g * t_v[S - 1 - s]
                        b_gAn += b_gv * t_d2[S - 1 - s]
                        t_gB = (b_g * t_du[S - 1 - s],) + t_gB
                        t_gdu = (t_gdu_before[S - 1 - s] + b_g * t_B[S - 1 - s],) + t_gdu
                        t_gdelta = (t_gdelta_before[S - 1 - s] + b_gv * b_A,) + t_gdelta
                    b_gA += tl.sum(b_gAn, axis=0, keep_dims=True) * LN2
                    tl.store(p_gA + n + tl.zeros((M, C), tl.int32), b_gA, mask=m_c & (o_m == 0))
                    if C >= 16:
                        b_row = tl.where((o_row == n - n_first) & m_c, 1.0, 0.0).to(SUM)
                        b_sums_C = _add_channels(b_sums_C, b_row, t_gC, SUM)
                        b_sums_B = _add_channels(b_sums_B, b_row, t_gB, SUM)
                    else:
                        p_row = p_maps + tl.cast(n, tl.int64) * L_rows
                        _store_channels(p_row, t_gB, m_c, i_step, L_rows)
                        _store_channels(p_row + half, t_gC, m_c, i_step, L_rows)
                if C >= 16:
                    o_l = i_step + tl.arange(0, M * S)[None, :]
                    m_row = (n_first + o_row < N) & (o_l < L_rows)
                    p_sums = p_maps + (n_first + o_row).to(tl.int64) * L_rows + o_l
                    tl.store(p_sums, b_sums_B, mask=m_row)
                    tl.store(p_sums + half, b_sums_C, mask=m_row)
            t_gu, t_gz = (), ()
            for s in tl.static_range(S):
                t_gu = t_gu + (t_gdu[s] * (t_d2[s] * LN2) + t_gy[s] * b_D,)
                b_gz = t_gdelta[s] + t_gdu[s] * t_u[s]
                if SOFTPLUS:
                    b_gz *= tl.exp2(t_z2[s] - t_d2[s])  # the derivative of softplus is 2^(z2 - d2)
                t_gz = t_gz + (b_gz,)
                b_g_bias += b_gz
                b_gD += t_gy[s] * t_u[s]
            store_steps(p_gu, t_gu, m_c, i_step, L_rows)
            store_steps(p_gdelta, t_gz, m_c, i_step, L_rows)
        tl.debug_barrier()  # a lane reads what another of its channel has left in carry and gA
    o_part = (segment + i_g) * channels + o_c
    if ENDS:
        tl.store(sums + o_part, tl.sum(b_sum, axis=0, keep_dims=True), mask=m_c)
    else:
        tl.store(gD + o_part, tl.sum(b_gD, axis=0, keep_dims=True), mask=m_c)
        tl.store(g_bias + o_part, tl.sum(b_g_bias, axis=0, keep_dims=True), mask=m_c)
