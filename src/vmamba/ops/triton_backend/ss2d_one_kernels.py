"""The fused SS2D forward for N = 1, the released models, laid out so that nothing is exchanged between lanes.

One program is one warp, and walks one route of four walkers (images, or segments of walks where images are few) for
16 J channels. The tensor cores make delta as weight (channels) times code (steps of walkers), and leave it where the
scan wants it: a lane has 2 J neighbouring channels of one walker, and in its registers all steps of a tile. A tile is
(4, 8, S, 2 J): walkers and groups of 2 J channels, which are the lanes, steps, and channels of a group. For that, rows
and columns of the product are numbered as the tensor cores hand them out: row 16 j + 8 half + g is channel 2 j + half
of group g, and column 8 i + 2 walker + b is step 2 i + b of a walker. Loads and stores take the same lanes by
themselves, if the axes of tensors come in this order and no other axis looks contiguous to the compiler.

Names as in `ss2d_tiles`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .ss2d_tiles import LN2, LOG2E, softplus2


@triton.jit
def _halves(b, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """The low and the high half of each int32 of b, two numbers of a 16-bit TYPE, as fp32 if WIDE, else as TYPE."""
    if WIDE and TYPE == tl.bfloat16:  # noqa: SIM300
        return (b << 16).to(tl.float32, bitcast=True), (b & -65536).to(tl.float32, bitcast=True)
    else:
        low = (b & 0xFFFF).to(tl.int16).to(TYPE, bitcast=True)
        high = (b >> 16).to(tl.int16).to(TYPE, bitcast=True)
        if WIDE:
            return low.to(tl.float32), high.to(tl.float32)
        else:
            return low, high


@triton.jit
def _load_code(p, q: tl.constexpr, Q: tl.constexpr, TYPE: tl.constexpr, PACK: tl.constexpr):
    """16 numbers of rows p (4, 8, S/2) of Q, from q: twice (4, 8, S/2) pairs, or (4, 8, S/2, 4). The rest is ones."""
    if PACK:
        ONES: tl.constexpr = 0x3F803F80 if TYPE == tl.bfloat16 else 0x3C003C00  # noqa: SIM300
        o_j = (q // 2 + tl.arange(0, 4))[:, None, None]
        b_0 = tl.load(p + tl.minimum(o_j, Q // 2 - 1))
        if q + 8 > Q:
            b_0 = tl.where(o_j < Q // 2, b_0, ONES)
        if q + 8 < Q:
            b_1 = tl.load(p + tl.minimum(o_j + 4, Q // 2 - 1))
            if q + 16 > Q:
                b_1 = tl.where(o_j + 4 < Q // 2, b_1, ONES)
        else:
            b_1 = tl.full(b_0.shape, ONES, tl.int32)
    else:
        o_q = _code_columns(q)[:, None, None, :]
        b_0 = tl.where(o_q < Q, tl.load(p[:, :, :, None] + tl.minimum(o_q, Q - 1)).to(tl.float32), 1.0)
        b_1 = b_0
    return b_0, b_1


@triton.jit
def _code_columns(q: tl.constexpr):
    """Which number of the code, from q, is where in a product: (4, 4), by lane and within a lane."""
    o_t, o_j = tl.arange(0, 4)[:, None], tl.arange(0, 4)[None, :]
    return tl.max_contiguous(q + o_j // 2 * 8 + o_t * 2 + o_j % 2, (1, 1))


@triton.jit
def _code(b_0, b_1, S: tl.constexpr, DOT: tl.constexpr, TYPE: tl.constexpr, PACK: tl.constexpr):
    """(16, 4 S) for the tensor cores, of what `_load_code` brought."""
    if PACK:
        b_00, b_01 = _halves(b_0, TYPE, DOT != TYPE)
        b_10, b_11 = _halves(b_1, TYPE, DOT != TYPE)
        b_c = tl.join(tl.join(b_00, b_01), tl.join(b_10, b_11))
        return tl.reshape(tl.permute(b_c, (0, 4, 3, 2, 1)), (16, 4 * S)).to(DOT)
    else:
        return tl.reshape(tl.permute(b_0, (0, 3, 2, 1)), (16, 4 * S)).to(DOT)


@triton.jit
def _weight(
    dt_weight, dt_bias, i_c, q: tl.constexpr,
    E: tl.constexpr, R: tl.constexpr, J: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What 16 numbers of a pixel, from q, are multiplied with to make z log2(e): (16 J, 16), as a sum of two.

    Of Q = R + 2 numbers and then ones, the first R take the weight, B and C zero, and the first one takes the bias.
    """
    # loaded by the lanes that use it: (4, 8, J, 2, 4)
    o_g, o_j, o_h = tl.arange(0, 8)[:, None, None], tl.arange(0, J)[None, :, None], tl.arange(0, 2)[None, None, :]
    o_c = (i_c * (16 * J) + o_g * (2 * J) + o_j * 2 + o_h)[None, :, :, :, None]
    o_q = _code_columns(q)[:, None, None, None, :]
    o = tl.max_contiguous(o_c * R + o_q, (1, 1, 1, 1, 1))
    b = tl.load(dt_weight + o, mask=(o_c < E) & (o_q < R), other=0.0).to(tl.float32)
    if q + 16 > R + 2:
        b_bias = tl.load(dt_bias + o_c + o_q * 0, mask=(o_c < E) & (o_q == R + 2), other=0.0)
        b += b_bias.to(tl.float32)
    b = tl.reshape(tl.permute(b, (2, 3, 1, 0, 4)), (16 * J, 16)) * LOG2E
    high = b.to(DOT)
    return high, (b - high.to(tl.float32)).to(DOT)


@triton.jit
def _choice(dt_weight, q: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr):
    """What 16 numbers of a pixel, from q, are multiplied with to give B to rows 0 to 7 and C to 8 to 15: (16, 16)."""
    o_g, o_h = tl.arange(0, 8)[None, :, None, None], tl.arange(0, 2)[None, None, :, None]
    o_q = _code_columns(q)[:, None, None, :] + o_g * 0 + o_h * 0
    b = (o_q == R + o_h).to(tl.float32)
    # a load of nothing: it makes the compiler lay b out as it lays out the weight, without a way through shared memory
    b = tl.load(dt_weight + tl.max_contiguous(o_q, (1, 1, 1, 1)), mask=o_q < 0, other=b.to(dt_weight.dtype.element_ty))
    return tl.reshape(tl.permute(b, (2, 1, 0, 3)), (16, 16)).to(DOT)


@triton.jit
def _product(b_high, b_low, b_code, b_z, DOT: tl.constexpr):
    """b_z + the weight (16 J, 16) times the code (16, 4 S), in fp32: the weight keeps 16 bits where p is bf16."""
    if DOT == tl.float32:  # noqa: SIM300
        return tl.dot(b_high, b_code, b_z, input_precision="tf32x3")
    else:
        return tl.dot(b_high, b_code, tl.dot(b_low, b_code, b_z))


@triton.jit
def _row(b, s: tl.constexpr, S: tl.constexpr):
    """Step s of b (4, 8, S, 2 J) in fp32. All terms but one are the integer 0: no instruction is left."""
    bits = tl.where(tl.arange(0, S)[None, None, :, None] == s, b.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=2, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _steps(b_a, b_b, b_h, S: tl.constexpr):
    """S steps of h = a h + b: all h (4, 8, S, 2 J), and the last."""
    o_s = tl.arange(0, S)[None, None, :, None]
    b_hs = b_b
    for s in tl.static_range(S):
        b_h = _row(b_a, s, S) * b_h + _row(b_b, s, S)
        b_hs = tl.where(o_s == s, b_h, b_hs)
    return b_hs, b_h


@triton.jit
def _load_tile(
    p_x, p_code, o_t, o_tn, m_x,
    EX: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, TYPE_P: tl.constexpr, PACK_P: tl.constexpr,
):  # fmt: skip
    """x and the code, with B and C, of a tile: at pixels o_t (4 or 1, 1, S), and for the products o_tn (4, 8, S/2)."""
    b_x = tl.load(p_x + (o_t.to(tl.int64) * EX)[:, :, :, None], mask=m_x, other=0)
    p_code += o_tn.to(tl.int64) * P
    b_codes = ()
    for q in tl.static_range(0, Q + 1, 16):
        b_codes = b_codes + (_load_code(p_code, q, Q, TYPE_P, PACK_P),)  # noqa: RUF005  not in a kernel
    return b_x, b_codes


@kernel(do_not_specialize=["B", "L", "T", "G", "n_segments"])
def ss2d_forward_one_kernel(
    x, p, dt_weight, dt_bias, A, D, table, y, states, ends, sums, B, L, T, G, n_segments,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, S: tl.constexpr, J: tl.constexpr, TWO: tl.constexpr,
    DOT: tl.constexpr, PACK_X: tl.constexpr, PACK_P: tl.constexpr, RAGGED: tl.constexpr, SPLIT: tl.constexpr,
    KEEP: tl.constexpr, ENDS: tl.constexpr, EXACT: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """Walk one route of four walkers: y (K, B, L, E) by pixels.

    A walk is cut into n_segments walkers of G tiles; SPLIT says that there are more than one, and then a first launch
    with ENDS leaves, for each, the state that it would end with from zero in ends (B, K, n_segments, E), and the sum
    of d2, which is its total decay, in sums; the second starts each walker from the right state. RAGGED says that
    there are steps beyond the last pixel, or walkers beyond the last. With PACK_X, PACK_P numbers of x, p are read
    in pairs. TWO: loads run two tiles ahead instead of one. LOG: A is log(-A).
    """
    C: tl.constexpr = 16 * J
    n_c: tl.constexpr = (E + C - 1) // C
    Q: tl.constexpr = R + 2
    TYPE_X: tl.constexpr = x.dtype.element_ty
    TYPE_P: tl.constexpr = p.dtype.element_ty
    i = tl.program_id(0)
    i_c, i = i % n_c, i // n_c
    i_k, i_u = i % K, i // K
    n_u = B * n_segments

    o_s = tl.arange(0, S)[None, None, :]
    o_u = i_u * 4 + tl.arange(0, 4)[:, None, None]
    m_u = (o_u < n_u)[:, :, :, None]
    o_u = tl.minimum(o_u, n_u - 1)
    o_g = tl.arange(0, 8)[None, :, None]
    o_un = tl.minimum(i_u * 4 + o_g // 2, n_u - 1)  # columns of a product: two steps of each of four walkers
    # hints, weaker than the truth: a lane takes 2 J neighbouring channels and no more
    o_c = tl.max_contiguous(i_c * C + o_g * (2 * J), (1, 1, 1))[:, :, :, None] + tl.arange(0, 2 * J)
    m_c = o_c < E

    b_W, b_choice = (), ()
    for q in tl.static_range(0, Q + 1, 16):
        b_W = b_W + (_weight(dt_weight + i_k * E * R, dt_bias + i_k * E, i_c, q, E, R, J, DOT),)  # noqa: RUF005
        b_choice = b_choice + (_choice(dt_weight, q, R, DOT),)  # noqa: RUF005
    b_D = tl.load(D + i_k * E + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_A = tl.load(A + i_k * E + o_c, mask=m_c, other=0.0).to(tl.float32)
    if LOG:
        b_A = -tl.exp(b_A)

    image, image_n = (o_u // n_segments).to(tl.int64), (o_un // n_segments).to(tl.int64)
    walk, i_g = image * K + i_k, o_u % n_segments
    table += i_k * (n_segments * G * S)
    if SPLIT:
        p_t = table + i_g * (G * S) + o_s
    else:
        p_t = table + o_s
    o_tn = o_un % n_segments * (G * S) + o_g % 2 + 2 * tl.arange(0, S // 2)[None, None, :]
    p_tn = tl.broadcast_to(table + tl.max_contiguous(o_tn, (1, 1, 1)), (4, 8, S // 2))
    if PACK_X:
        EX: tl.constexpr = E // 2
        o_x = tl.max_contiguous(i_c * (C // 2) + o_g * J, (1, 1, 1))[:, :, :, None] + tl.arange(0, J)
        p_x = x.to(tl.pointer_type(tl.int32)) + (image * (L * EX))[:, :, :, None] + o_x
    else:
        EX: tl.constexpr = E
        o_x = o_c
        p_x = x + (image * (L * EX))[:, :, :, None] + o_x
    m_x = o_x < EX
    if PACK_P:
        P: tl.constexpr = K * Q // 2
        p = p.to(tl.pointer_type(tl.int32)) + i_k * (Q // 2)
    else:
        P: tl.constexpr = K * Q
        p += i_k * Q
    p_code = p + image_n * L * P
    p_y = y + ((i_k * B + image) * L)[:, :, :, None] * E + o_c
    p_state = states + (walk * T + i_g * (G * S // 16))[:, :, :, None] * E + o_c
    p_ends = (walk * n_segments)[:, :, :, None] * E + o_c

    b_h = tl.zeros((4, 8, 1, 2 * J), tl.float32)
    b_sum = tl.zeros((4, 8, 1, 2 * J), tl.float32)
    if SPLIT and not ENDS:
        for j in tl.range(n_segments - 1, loop_unroll_factor=8):
            b_total = tl.load(sums + p_ends + j * E, mask=m_c, other=0.0)
            b_next = b_h * tl.exp2(b_total * b_A) + tl.load(ends + p_ends + j * E, mask=m_c, other=0.0)
            b_h = tl.where(j < i_g[:, :, :, None], b_next, b_h)

    # What a tile needs is loaded ahead, and the table, which tells where, one tile earlier.
    b_x, b_codes = _load_tile(p_x, p_code, tl.load(p_t), tl.load(p_tn), m_x, EX, P, Q, TYPE_P, PACK_P)
    i_1 = tl.minimum(1, G - 1) * S
    o_t1, o_tn1 = tl.load(p_t + i_1), tl.load(p_tn + i_1)
    if TWO:
        b_x1, b_codes1 = _load_tile(p_x, p_code, o_t1, o_tn1, m_x, EX, P, Q, TYPE_P, PACK_P)
        i_1 = tl.minimum(2, G - 1) * S
        o_t1, o_tn1 = tl.load(p_t + i_1), tl.load(p_tn + i_1)
    for i_t in range(G):
        b_z2 = tl.zeros((16 * J, 4 * S), tl.float32)
        b_BC = tl.zeros((16, 4 * S), tl.float32)
        for q in tl.static_range(0, Q + 1, 16):
            b_code = _code(b_codes[q // 16][0], b_codes[q // 16][1], S, DOT, TYPE_P, PACK_P)
            b_z2 = _product(b_W[q // 16][0], b_W[q // 16][1], b_code, b_z2, DOT)
            if q + 16 > R and q < Q:
                b_BC = tl.dot(b_choice[q // 16], b_code, b_BC, input_precision="tf32x3")
        b_z2 = tl.reshape(b_z2, (J, 2, 8, S // 2, 4, 2))
        b_z2 = tl.reshape(tl.permute(b_z2, (4, 2, 3, 5, 0, 1)), (4, 8, S, 2 * J))
        b_BC = tl.reshape(b_BC, (2, 8, S // 2, 4, 2))
        b_B, b_C = tl.split(tl.reshape(tl.permute(b_BC, (3, 1, 2, 4, 0)), (4, 8, S, 2)))
        if PACK_X:
            b_0, b_1 = _halves(b_x, TYPE_X, True)
            b_u = tl.reshape(tl.join(b_0, b_1), (4, 8, S, 2 * J))
        else:
            b_u = b_x.to(tl.float32)
        b_x2, b_codes2 = _load_tile(p_x, p_code, o_t1, o_tn1, m_x, EX, P, Q, TYPE_P, PACK_P)
        i_2 = tl.minimum(i_t + 2 + TWO, G - 1) * S
        o_t1, o_tn1 = tl.load(p_t + i_2), tl.load(p_tn + i_2)
        o_t = tl.load(p_t + i_t * S)
        tl.debug_barrier()  # of one warp, so next to free: loads before it, stores after it

        b_d2 = softplus2(b_z2, EXACT)
        if KEEP:
            if i_t * S % 16 == 0:
                m_state = m_c & m_u
                if RAGGED:
                    m_state = m_state & ((i_g * (G * S) + i_t * S)[:, :, :, None] < L)
                tl.store(p_state + (i_t * S // 16) * E, b_h, mask=m_state)
        b_a = tl.exp2(b_d2 * b_A)
        b_b = b_d2 * b_u * (b_B * LN2)[:, :, :, None]
        b_hs, b_h = _steps(b_a, b_b, b_h, S)
        if ENDS:
            b_sum += tl.sum(b_d2, axis=2, keep_dims=True)
        else:
            b_y = b_hs * b_C[:, :, :, None] + b_u * b_D
            m_y = m_c
            if RAGGED:
                m_y = m_c & m_u & ((i_g * (G * S) + i_t * S + o_s)[:, :, :, None] < L)
            tl.store(p_y + (o_t.to(tl.int64) * E)[:, :, :, None], b_y.to(y.dtype.element_ty), mask=m_y)
        if TWO:
            b_x, b_codes = b_x1, b_codes1
            b_x1, b_codes1 = b_x2, b_codes2
        else:
            b_x, b_codes = b_x2, b_codes2
    if ENDS:
        p_ends += i_g[:, :, :, None] * E
        tl.store(ends + p_ends, b_h, mask=m_c & m_u)
        tl.store(sums + p_ends, b_sum, mask=m_c & m_u)


@kernel
def sum_kernel(parts, y, n, K: tl.constexpr, BLOCK: tl.constexpr):
    """y (n,) = the sum over routes of parts (K, n), in fp32."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_y = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        b_y += tl.load(parts + k * n.to(tl.int64) + o, mask=o < n, other=0.0).to(tl.float32)
    tl.store(y + o, b_y.to(y.dtype.element_ty), mask=o < n)


@kernel(do_not_specialize=["n"])
def sum_norm_kernel(
    parts, y, weight, bias, n, eps,
    K: tl.constexpr, E: tl.constexpr, PIXELS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y (n, E) = the layer norm over E, with weight and bias, of the sum over routes of parts (K, n, E), in fp32."""
    o_n = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    o_c = tl.arange(0, C)[None, :]
    m = (o_n < n) & (o_c < E)
    o = o_n * E + o_c
    b_y = tl.zeros((PIXELS, C), tl.float32)
    for k in tl.static_range(K):
        b_y += tl.load(parts + k * n.to(tl.int64) * E + o, mask=m, other=0.0).to(tl.float32)
    b_y = tl.where(o_c < E, b_y - tl.sum(b_y, axis=1, keep_dims=True) / E, 0.0)
    b_y *= tl.rsqrt(tl.sum(b_y * b_y, axis=1, keep_dims=True) / E + eps)
    b_weight = tl.load(weight + o_c, mask=o_c < E, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_c, mask=o_c < E, other=0.0).to(tl.float32)
    tl.store(y + o, (b_y * b_weight + b_bias).to(y.dtype.element_ty), mask=m)
