"""The fused SS2D forward for N = 1 and short codes, without tensor cores and without any exchange between lanes.

One program is one warp: 32 channels of one segment of one route's walk, a channel a lane. All lanes read a pixel's
code, with B and C, from the same address, one instruction for eight numbers of 16 bits, and make delta by R
multiplications in fp32. What tensor cores make must change lanes first, and half of the time of `ss2d_forward_kernel`
are waits for that; for 56x56x96, where a code is six numbers, this kernel takes 0.347 ms and that one 0.413. For longer
codes the multiplications would outweigh it.

Tensors of a tile are (32, S), lanes and steps: every lane has all steps of its channel in registers. Names as in
`ss2d_tiles`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .ss2d_one_kernels import _halves
from .ss2d_tiles import LN2, LOG2E, carried, compose, softplus2


@triton.jit
def _load_words(p, WORDS: tl.constexpr, VEC: tl.constexpr):
    """All words at p (32, S), the same for every lane, VEC a load: a tuple of (32, S) or (32, S, VEC)."""
    b_words = ()
    for w in tl.static_range(0, WORDS, VEC):
        if VEC == 1:
            b_words = b_words + (tl.load(p + w),)  # noqa: RUF005  not in a kernel
        else:
            b_words = b_words + (tl.load(p[:, :, None] + (w + tl.arange(0, VEC)[None, None, :])),)  # noqa: RUF005
    return b_words


@triton.jit
def _split_words(b, VEC: tl.constexpr):
    """The VEC words of b (32, S, VEC), each (32, S)."""
    if VEC == 1:
        return (b,)
    elif VEC == 2:
        b_0, b_1 = tl.split(b)
        return b_0, b_1
    else:
        b_02, b_13 = tl.split(tl.reshape(b, (b.shape[0], b.shape[1], 2, 2)))
        b_0, b_2 = tl.split(b_02)
        b_1, b_3 = tl.split(b_13)
        return b_0, b_1, b_2, b_3


@triton.jit
def _numbers(b_words, PACK: tl.constexpr, VEC: tl.constexpr, TYPE: tl.constexpr):
    """The numbers that `_load_words` brought, two a word where PACK, in fp32, each (32, S)."""
    b_numbers = ()
    for i in tl.static_range(len(b_words)):
        b_split = _split_words(b_words[i], VEC)
        for j in tl.static_range(VEC):
            if PACK:
                b_numbers = b_numbers + _halves(b_split[j], TYPE, True)
            else:
                b_numbers = b_numbers + (b_split[j].to(tl.float32),)  # noqa: RUF005
    return b_numbers


@triton.jit
def _bits(b):
    if b.dtype == tl.int32:
        return b
    elif b.dtype == tl.float32:
        return b.to(tl.int32, bitcast=True)
    else:
        return b.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _step_bits(b, s: tl.constexpr, S: tl.constexpr):
    """Step s of b (32, S), int32, as (32, 1). All terms but one are the integer 0: no instruction is left."""
    return tl.sum(tl.where(tl.arange(0, S)[None, :] == s, b, 0), axis=1, keep_dims=True)


@triton.jit
def _dt_weight(dt_weight, o_ke, m_c, R: tl.constexpr, QP: tl.constexpr):
    """Wdt log2(e) of a lane's channel: a tuple of R (32, 1)."""
    o_q = tl.arange(0, QP)[None, :]
    b = tl.load(dt_weight + tl.max_contiguous(o_ke * R + o_q, (1, 1)), mask=m_c & (o_q < R), other=0.0)
    b = _bits(b.to(tl.float32) * LOG2E)
    b_W = ()
    for r in tl.static_range(R):
        b_W = b_W + (_step_bits(b, r, QP).to(tl.float32, bitcast=True),)  # noqa: RUF005
    return b_W


@triton.jit
def _pixels(p_table, i_t, S: tl.constexpr, KIND: tl.constexpr):
    """The pixels of tile i_t less `_start`: (1, S) constants, or (32, S) that each lane reads from the table itself."""
    o_s = tl.arange(0, S)[None, :]
    if KIND == 1:
        return o_s
    elif KIND == 2:
        return -o_s
    else:
        return tl.load(p_table + tl.max_contiguous(i_t * S + o_s, (1, 1)))


@triton.jit
def _start(i_t, S: tl.constexpr, KIND: tl.constexpr, L):
    if KIND == 1:
        return tl.cast(i_t * S, tl.int64)
    elif KIND == 2:
        return tl.cast(L - 1 - i_t * S, tl.int64)
    else:
        return tl.cast(0, tl.int64)


@triton.jit
def _load_tile(
    p_x, p_p, i_p, o_p, m_c, E: tl.constexpr, P: tl.constexpr, WORDS: tl.constexpr, VEC: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """x (32, S), and the code with B and C, at pixels i_p + o_p."""
    o_p = o_p.to(tl.int64)
    if MASK:
        b_x = tl.load(p_x + i_p * E + o_p * E, mask=m_c, other=0.0)
    else:
        b_x = tl.load(p_x + i_p * E + o_p * E)
    return b_x, _load_words(p_p + i_p * P + o_p * P, WORDS, VEC)


@triton.jit
def _walk(
    x, p, dt_weight, dt_bias, A, D, table, y, states, ends, sums, i_b, i_k, i_c, i_g, L, T, G, n_segments,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, S: tl.constexpr, QP: tl.constexpr, PACK: tl.constexpr,
    VEC: tl.constexpr, KIND: tl.constexpr, KEEP: tl.constexpr, ENDS: tl.constexpr, EXACT: tl.constexpr,
    LOG: tl.constexpr,
):  # fmt: skip
    MASK: tl.constexpr = E % 32 != 0
    WORDS: tl.constexpr = (R + 2) // 2 if PACK else R + 2
    P: tl.constexpr = K * WORDS
    TYPE: tl.constexpr = p.dtype.element_ty
    o_lane = tl.arange(0, 32)[:, None]
    o_s = tl.arange(0, S)[None, :]
    # a hint, weaker than the truth: a lane takes one channel of all steps
    o_c = i_c * 32 + tl.max_contiguous(tl.multiple_of(tl.arange(0, 32), 1), 2)[:, None]
    m_c = o_c < E
    o_ke = i_k * E + o_c
    b_W = _dt_weight(dt_weight, o_ke, m_c, R, QP)
    b_bias = tl.load(dt_bias + o_ke, mask=m_c, other=0.0).to(tl.float32) * LOG2E
    b_D = tl.load(D + o_ke, mask=m_c, other=0.0).to(tl.float32)
    b_A = tl.load(A + o_ke, mask=m_c, other=0.0).to(tl.float32)
    if LOG:
        b_A = -tl.exp2(b_A * LOG2E)

    image, walk = i_b.to(tl.int64), (i_b * K + i_k).to(tl.int64)
    p_x = x + image * L * E + o_c
    p_y = y + walk * (T * S) * E + o_s * E + o_c
    if PACK:
        p = p.to(tl.pointer_type(tl.int32))
    p_p = p + (image * L * P + i_k * WORDS)
    p_table = table + i_k * T * S + o_lane * 0  # every lane loads for itself, and nothing changes lanes
    p_states = states + walk * T * E + o_c
    segment = walk * n_segments * E
    b_h = tl.zeros((32, 1), tl.float32)
    b_sum = tl.zeros((32, 1), tl.float32)
    if not ENDS:
        b_h = carried(sums + segment, ends + segment, b_A, o_c, m_c, 0, i_g, 1, 1, E)

    zero = T >> 30  # which the compiler does not know
    i_first = i_g * G
    i_end = tl.minimum(i_first + G, T)
    o_p = _pixels(p_table, i_first, S, KIND)
    b_x, b_words = _load_tile(p_x, p_p, _start(i_first, S, KIND, L), o_p + o_lane * 0, m_c, E, P, WORDS, VEC, MASK)
    o_p = _pixels(p_table, tl.minimum(i_first + 1, i_end - 1), S, KIND)
    for i_t in range(i_first, i_end):
        # The next tile's loads must not be put before the wait for the present tile, which would then be one for them
        # too: their addresses take a zero from it.
        i_p = _start(tl.minimum(i_t + 1, i_end - 1), S, KIND, L)
        i_p += (_step_bits(_bits(_split_words(b_words[0], VEC)[0]), S - 1, S) & zero).to(tl.int64)
        b_x1, b_words1 = _load_tile(p_x, p_p, i_p, o_p, m_c, E, P, WORDS, VEC, MASK)
        o_p = _pixels(p_table, tl.minimum(i_t + 2, i_end - 1), S, KIND)
        if KEEP:
            tl.store(p_states + i_t * E, b_h, mask=m_c)
        b_code = _numbers(b_words, PACK, VEC, TYPE)
        b_z2 = b_bias
        for r in tl.static_range(R):
            b_z2 = b_code[r] * b_W[r] + b_z2
        b_d2 = softplus2(b_z2, EXACT)
        b_u = b_x.to(tl.float32)
        b_a = tl.exp2(b_d2 * b_A)
        b_b = b_d2 * b_u * (b_code[R] * LN2)
        b_b = tl.where(o_s == 0, b_a * b_h + b_b, b_b)
        _, b_hs = tl.associative_scan((b_a, b_b), 1, compose)
        b_h = _step_bits(_bits(b_hs), S - 1, S).to(tl.float32, bitcast=True)
        if ENDS:
            b_sum += tl.sum(b_d2, axis=1, keep_dims=True)
        else:
            b_y = (b_hs * b_code[R + 1] + b_u * b_D).to(y.dtype.element_ty)
            p_tile = p_y + tl.cast(i_t, tl.int64) * (S * E)
            if MASK:
                tl.store(p_tile, b_y, mask=m_c)
            else:
                tl.store(p_tile, b_y)
        b_x, b_words = b_x1, b_words1
    if ENDS:
        tl.store(ends + segment + i_g * E + o_c, b_h, mask=m_c)
        tl.store(sums + segment + i_g * E + o_c, b_sum, mask=m_c)


@kernel(do_not_specialize=["L", "T", "G", "n_segments"])
def ss2d_forward_narrow_kernel(
    x, p, dt_weight, dt_bias, A, D, table, y, states, ends, sums, L, T, G, n_segments,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, S: tl.constexpr, QP: tl.constexpr, PACK: tl.constexpr,
    VEC: tl.constexpr, KINDS: tl.constexpr, BODIES: tl.constexpr, KEEP: tl.constexpr, ENDS: tl.constexpr,
    EXACT: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """Walk one segment of one route: y (B, K, T*S, E) in the order of the walk, states (B, K, T, 1, E) where KEEP.

    The grid is B * n_segments * K * ceil(E / 32) programs. Segments, ENDS, KINDS, BODIES and LOG as in
    `ss2d_forward_kernel`. The code is read in words of 32 bits where PACK, VEC words a load; QP >= R is a power of two.
    """
    n_c: tl.constexpr = (E + 31) // 32
    i = tl.program_id(0)
    i_c, i = i % n_c, i // n_c
    i_k, i = i % K, i // K
    i_g, i_b = i % n_segments, i // n_segments
    kind = (KINDS >> (2 * i_k)) & 3
    for c in tl.static_range(3):
        if (BODIES >> c) & 1:
            if kind == c:
                _walk(
                    x, p, dt_weight, dt_bias, A, D, table, y, states, ends, sums, i_b, i_k, i_c, i_g, L, T, G,
                    n_segments, K, E, R, S, QP, PACK, VEC, c, KEEP, ENDS, EXACT, LOG,
                )  # fmt: skip
