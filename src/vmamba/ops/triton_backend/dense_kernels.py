"""Kernels of the dense parts of a block: LayerNorm, linear maps, the MLP with its norm and residual sum.

All tensors are rows of C numbers, one a pixel. What is computed in fp32: means, variances, sums of products, GELU and
the residual sum; what goes into a product of matrices is rounded to DOT, the dtype of the computation. Weights may be
wider than DOT and are rounded where they are loaded.

The tensor cores take tiles whose sides are powers of two, and C = 96 and 192 are not. So a row is cut into two parts,
of C0 and C1 numbers (64 and 32; C1 = 0 where C is a power of two), each with its own product: nothing is padded.

GELU(v) = v Phi(v) = max(v, 0) - t Q(t), with t = |v| and Q(t) = 1 - Phi(t) = 2^P(t), P a polynomial: as many
multiplications as its degree and one special function, against about 25 instructions for erf, and, unlike 1 + erf,
exact in the tail as well.

Names: o_* offsets, b_* blocks in registers, i_* indices, m_* masks. Letters as in ops/README.md; M rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel


@triton.jit
def gelu(v, FINE: tl.constexpr):
    """GELU of fp32 numbers, to 0.07 units in the last place of bf16, or of fp16 where FINE.

    The polynomials are least maximum fits of log2 Q on [0, 5.5] and [0, 6], relative error of Q 2.5e-4 and 3.3e-6;
    beyond, they fall faster than log2 Q does, and t Q(t) is below 1e-7 there.
    """
    t = tl.abs(v)
    if FINE:
        p = -1.8348093e-06 * t + 6.1598243e-05
        p = p * t - 9.3052443e-04
        p = p * t + 8.5078888e-03
        p = p * t - 5.3960066e-02
        p = p * t - 4.5846438e-01
        p = p * t - 1.1512511
        p = p * t - 0.99999529
    else:
        p = -2.3325128e-04 * t + 4.8697740e-03
        p = p * t - 4.4599019e-02
        p = p * t - 4.6968105e-01
        p = p * t - 1.1462609
        p = p * t - 1.0003591
    return tl.maximum(v, 0.0) - t * tl.exp2(p)


@triton.jit
def _later(i, FAR: tl.constexpr):
    """0 for every i that occurs. As an offset, it keeps a load inside a loop over i whose result would otherwise wait
    in registers through the loop, where there is no room for it."""
    return (i >> 30) * FAR


@triton.jit
def _load_parts(rows, m, C0: tl.constexpr, C1: tl.constexpr):
    """Both parts of rows (pointers to their first numbers, (BM, 1)) in fp32; the second is the first where C1 = 0."""
    xa = tl.load(rows + tl.arange(0, C0)[None, :], mask=m, other=0.0).to(tl.float32)
    if C1 > 0:
        xb = tl.load(rows + C0 + tl.arange(0, C1)[None, :], mask=m, other=0.0).to(tl.float32)
    else:
        xb = xa
    return xa, xb


@triton.jit
def _store_parts(rows, ba, bb, m, C0: tl.constexpr, C1: tl.constexpr):
    tl.store(rows + tl.arange(0, C0)[None, :], ba.to(rows.dtype.element_ty), mask=m)
    if C1 > 0:
        tl.store(rows + C0 + tl.arange(0, C1)[None, :], bb.to(rows.dtype.element_ty), mask=m)


@triton.jit
def _normalise_parts(xa, xb, weight, bias, eps, C0: tl.constexpr, C1: tl.constexpr, DOT: tl.constexpr):
    """LayerNorm of rows in two parts, in DOT."""
    b_sum = tl.sum(xa, 1)
    if C1 > 0:
        b_sum += tl.sum(xb, 1)
    b_mean = (b_sum * (1.0 / (C0 + C1)))[:, None]
    xa -= b_mean
    b_sum = tl.sum(xa * xa, 1)
    if C1 > 0:
        xb -= b_mean
        b_sum += tl.sum(xb * xb, 1)
    b_scale = tl.rsqrt(b_sum * (1.0 / (C0 + C1)) + eps)[:, None]
    o_a = tl.arange(0, C0)
    xa *= b_scale
    na = xa * tl.load(weight + o_a).to(tl.float32)[None, :] + tl.load(bias + o_a).to(tl.float32)[None, :]
    if C1 > 0:
        o_b = C0 + tl.arange(0, C1)
        xb *= b_scale
        nb = xb * tl.load(weight + o_b).to(tl.float32)[None, :] + tl.load(bias + o_b).to(tl.float32)[None, :]
    else:
        nb = na
    return na.to(DOT), nb.to(DOT)


@triton.jit
def _parts_of_rows(weight, o_n, C0: tl.constexpr, C1: tl.constexpr, DOT: tl.constexpr):
    """Rows o_n of weight (N, C), transposed: (C0, rows) and (C1, rows)."""
    rows = weight + o_n[:, None] * (C0 + C1)
    wa = tl.load(rows + tl.arange(0, C0)[None, :]).to(DOT).trans()
    if C1 > 0:
        wb = tl.load(rows + C0 + tl.arange(0, C1)[None, :]).to(DOT).trans()
    else:
        wb = wa
    return wa, wb


@triton.jit
def _parts_of_columns(weight, o_n, N: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, DOT: tl.constexpr):
    """Columns o_n of weight (C, N), transposed: (columns, C0) and (columns, C1)."""
    columns = weight + o_n[None, :]
    wa = tl.load(columns + tl.arange(0, C0)[:, None] * N).to(DOT).trans()
    if C1 > 0:
        wb = tl.load(columns + (C0 + tl.arange(0, C1))[:, None] * N).to(DOT).trans()
    else:
        wb = wa
    return wa, wb


@triton.jit
def _dot_parts(na, nb, wa, wb, C1: tl.constexpr):
    """(rows, numbers of the block) = rows times a block of weights, over both parts of C."""
    b = tl.dot(na, wa)
    if C1 > 0:
        b = tl.dot(nb, wb, b)
    return b


@triton.jit
def _as_product(xa, xb, wa, wb, C1: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr):
    """The same numbers, laid out over the threads as a sum of products is: as the sum of a product with zeros.

    From this layout LayerNorm's result goes into products, and x into the residual sum, without leaving registers.
    wa, wb: any weights of the products' shapes (some, C0) and (some, C1).
    """
    zeros = tl.zeros((BM, wa.shape[0]), DOT)
    xa = tl.dot(zeros, wa, xa)
    if C1 > 0:
        xb = tl.dot(zeros, wb, xb)
    else:
        xb = xa
    return xa, xb


@triton.jit
def _hidden_block(
    b, bias1, hidden, scale, o_m, m, o_n, n_image,
    N: tl.constexpr, KEEP: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """Columns o_n of gelu(b + bias1) for rows o_m, times scale; b + bias1 goes to hidden where KEEP."""
    b += tl.load(bias1 + o_n).to(tl.float32)[None, :]
    if KEEP:
        tl.store(hidden + o_m.to(tl.int64)[:, None] * N + o_n[None, :], b.to(DOT), mask=m)
    b = gelu(b, FINE)
    if SCALED:
        b *= _row_scale(scale, o_m, m, n_image)
    return b.to(DOT)


@triton.jit
def _row_scale(scale, o_m, m, n_image):
    """The factor of the image that each of the rows o_m belongs to, (BM, 1)."""
    return tl.load(scale + (o_m // n_image)[:, None], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _add_bias(
    ba, bb, bias, scale, o_m, m, n_image, C0: tl.constexpr, C1: tl.constexpr, SCALED: tl.constexpr
):  # fmt: skip
    """Both parts of rows o_m plus those of one row, bias, times scale."""
    b_scale = _row_scale(scale, o_m, m, n_image) if SCALED else 1.0
    ba += tl.load(bias + tl.arange(0, C0)).to(tl.float32)[None, :] * b_scale
    if C1 > 0:
        bb += tl.load(bias + C0 + tl.arange(0, C1)).to(tl.float32)[None, :] * b_scale
    return ba, bb


@kernel(do_not_specialize=["M", "n_image"])
def mlp_resident_kernel(
    x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, out, hidden, scale, M, n_image,
    C0: tl.constexpr, C1: tl.constexpr, N: tl.constexpr, PROGRAMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, FINE: tl.constexpr,
    KEEP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """out = x + scale fc2(gelu(fc1(LayerNorm(x)))), all weights in shared memory from first to last.

    x, out (M, C0 + C1); weight1 (N, C), weight2 (C, N). KEEP: what goes into GELU is left in hidden (M, N), in DOT.
    SCALED: a factor for each image of n_image rows, scale (M / n_image,). Grid: PROGRAMS or fewer, each walks over
    tiles of BM rows. There is no barrier between the blocks of the hidden numbers, so that the groups of four warps
    drift apart, and one's GELU runs beside another's products.
    """
    C: tl.constexpr = C0 + C1
    w1, w2 = (), ()
    for j in tl.static_range(N // BN):
        o_n = j * BN + tl.arange(0, BN)
        w1 = w1 + (_parts_of_rows(weight1, o_n, C0, C1, DOT),)  # noqa: RUF005  (*...) is not Triton
        w2 = w2 + (_parts_of_columns(weight2, o_n, N, C0, C1, DOT),)  # noqa: RUF005  (*...) is not Triton
    for i in tl.range(tl.program_id(0), tl.cdiv(M, BM), PROGRAMS, num_stages=STAGES):
        zero = _later(i, 16)
        o_m = i * BM + tl.arange(0, BM)
        m = (o_m < M)[:, None]
        o_row = o_m.to(tl.int64)[:, None] * C
        xa, xb = _load_parts(x + o_row, m, C0, C1)
        xa, xb = _as_product(xa, xb, w2[0][0], w2[0][1], C1, BM, DOT)
        na, nb = _normalise_parts(xa, xb, norm_weight + zero, norm_bias + zero, eps, C0, C1, DOT)
        xa, xb = _add_bias(xa, xb, bias2 + zero, scale, o_m, m, n_image, C0, C1, SCALED)
        for j in tl.static_range(N // BN):
            b = _dot_parts(na, nb, w1[j][0], w1[j][1], C1)
            o_n = j * BN + tl.arange(0, BN)
            b = _hidden_block(b, bias1 + zero, hidden, scale, o_m, m, o_n, n_image, N, KEEP, SCALED, DOT, FINE)
            xa = tl.dot(b, w2[j][0], xa)
            if C1 > 0:
                xb = tl.dot(b, w2[j][1], xb)
        _store_parts(out + o_row, xa, xb, m, C0, C1)


@kernel(do_not_specialize=["M", "n_image"])
def mlp_kernel(
    x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, out, hidden, scale, M, n_image,
    C0: tl.constexpr, C1: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, FINE: tl.constexpr,
    KEEP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """out = x + scale fc2(gelu(fc1(LayerNorm(x)))) of BM rows, the weights streamed in blocks of BN hidden numbers.

    Arguments as in mlp_resident_kernel. Grid: (tiles of BM rows,).
    """
    C: tl.constexpr = C0 + C1
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m = (o_m < M)[:, None]
    o_row = o_m.to(tl.int64)[:, None] * C
    xa, xb = _load_parts(x + o_row, m, C0, C1)
    na, nb = _normalise_parts(xa, xb, norm_weight, norm_bias, eps, C0, C1, DOT)
    ya = tl.zeros((BM, C0), tl.float32)
    if C1 > 0:
        yb = tl.zeros((BM, C1), tl.float32)
    else:
        yb = ya
    for j in tl.range(0, N, BN, num_stages=STAGES):
        o_n = j + tl.arange(0, BN)
        wa, wb = _parts_of_rows(weight1, o_n, C0, C1, DOT)
        b = _dot_parts(na, nb, wa, wb, C1)
        b = _hidden_block(b, bias1, hidden, scale, o_m, m, o_n, n_image, N, KEEP, SCALED, DOT, FINE)
        wa, wb = _parts_of_columns(weight2, o_n, N, C0, C1, DOT)
        ya = tl.dot(b, wa, ya)
        if C1 > 0:
            yb = tl.dot(b, wb, yb)
    # once more, from L2: in registers there was no room for it through the loop
    xa, xb = _load_parts(x + o_row, m, C0, C1)
    ya, yb = _add_bias(ya + xa, yb + xb, bias2, scale, o_m, m, n_image, C0, C1, SCALED)
    _store_parts(out + o_row, ya, yb, m, C0, C1)


@kernel(do_not_specialize=["M"])
def linear_resident_kernel(
    x, norm_weight, norm_bias, eps, weight, bias, residual, out, M,
    C0: tl.constexpr, C1: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out = norm(x) weight.T (+ bias) (+ residual), a share of the weights in shared memory from first to last.

    x (M, C0 + C1), LayerNorm of it where NORM; weight (N, C); residual and out (M, N). Grid: (PROGRAMS or fewer,
    N / SHARE).
    """
    C: tl.constexpr = C0 + C1
    first = tl.program_id(1) * SHARE
    w = ()
    for j in tl.static_range(SHARE // BN):
        o_n = first + j * BN + tl.arange(0, BN)
        w = w + (_parts_of_rows(weight, o_n, C0, C1, DOT),)  # noqa: RUF005  (*...) is not Triton
    for i in tl.range(tl.program_id(0), tl.cdiv(M, BM), PROGRAMS, num_stages=STAGES):
        zero = _later(i, 16)
        o_m = i * BM + tl.arange(0, BM)
        m = (o_m < M)[:, None]
        o_m = o_m.to(tl.int64)[:, None]
        xa, xb = _load_parts(x + o_m * C, m, C0, C1)
        if NORM:
            na, nb = _normalise_parts(xa, xb, norm_weight + zero, norm_bias + zero, eps, C0, C1, DOT)
        else:
            na, nb = xa.to(DOT), xb.to(DOT)
        for j in tl.static_range(SHARE // BN):
            o_n = first + j * BN + tl.arange(0, BN)
            b = _dot_parts(na, nb, w[j][0], w[j][1], C1)
            if HAS_BIAS:
                b += tl.load(bias + zero + o_n).to(tl.float32)[None, :]
            o = o_m * N + o_n[None, :]
            if RESIDUAL:
                b += tl.load(residual + o, mask=m, other=0.0).to(tl.float32)
            tl.store(out + o, b.to(out.dtype.element_ty), mask=m)


@kernel(do_not_specialize=["M"])
def norm_kernel(
    x, weight, bias, eps, out, shift, shifted, M,
    C: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """out = LayerNorm(x) of BM rows. x, out (M, C); WIDTH is C or the next power of two. Grid: (tiles of BM rows,).

    SHIFT: shifted = x + shift too, (M, C) and (C,).
    """
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_c = tl.arange(0, WIDTH)
    m_c = o_c < C
    m = (o_m < M)[:, None] & m_c[None, :]
    o = o_m.to(tl.int64)[:, None] * C + o_c[None, :]
    b_x = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
    if SHIFT:
        b_shift = tl.load(shift + o_c, mask=m_c, other=0.0).to(tl.float32)
        tl.store(shifted + o, (b_x + b_shift[None, :]).to(shifted.dtype.element_ty), mask=m)
    b_x = tl.where(m_c[None, :], b_x - (tl.sum(b_x, 1) * (1.0 / C))[:, None], 0.0)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 1) * (1.0 / C) + eps)[:, None]
    b_weight = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    tl.store(out + o, (b_x * b_weight[None, :] + b_bias[None, :]).to(out.dtype.element_ty), mask=m)


@kernel(do_not_specialize=["M"])
def linear_kernel(
    x, weight, bias, residual, out, M,
    K: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """out = act(x weight.T (+ bias)) (+ residual): a tile of BM rows and BN columns.

    x (M, K), weight (N, K), residual and out (M, N), any K and N. Grid: (tiles,), those of the same rows one after
    another.
    """
    i = tl.program_id(0)
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    o_m = (i // BLOCKS) * BM + tl.arange(0, BM)
    o_n = (i % BLOCKS) * BN + tl.arange(0, BN)
    m_m = (o_m < M)[:, None]
    m_n = o_n < N
    o_m = o_m.to(tl.int64)[:, None]
    b = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        o_k = k + tl.arange(0, BK)
        if K % BK == 0:
            b_a = tl.load(x + o_m * K + o_k[None, :], mask=m_m, other=0.0)
        else:
            b_a = tl.load(x + o_m * K + o_k[None, :], mask=m_m & (o_k < K)[None, :], other=0.0)
        if K % BK == 0 and N % BN == 0:
            b_w = tl.load(weight + o_n[:, None] * K + o_k[None, :])
        else:
            b_w = tl.load(weight + o_n[:, None] * K + o_k[None, :], mask=m_n[:, None] & (o_k < K)[None, :], other=0.0)
        b = tl.dot(b_a.to(DOT), b_w.to(DOT).trans(), b)
    if HAS_BIAS:
        b += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if GELU:
        b = gelu(b, FINE)
    m = m_m & m_n[None, :]
    o = o_m * N + o_n[None, :]
    if RESIDUAL:
        b += tl.load(residual + o, mask=m, other=0.0).to(tl.float32)
    tl.store(out + o, b.to(out.dtype.element_ty), mask=m)


@triton.jit
def _load_shares(rows, m_rows, o_k, m_k):
    """Numbers of rows (pointers to their first, (8, R)) as a product's lanes want them, (4, 8, SHARES, R, TILES, 4)."""
    m = m_rows[None, :, None, :, None, None] & m_k
    return tl.load(rows[None, :, None, :, None, None] + o_k, mask=m, other=0.0)


@triton.jit
def _as_factor(b, DOT: tl.constexpr):
    """What `_load_shares` brought as (SHARES, 8 R, 16 TILES) in DOT: the numbers stay in their lanes."""
    S: tl.constexpr = b.shape[2]
    R: tl.constexpr = b.shape[3]
    TILES: tl.constexpr = b.shape[4]
    b = tl.reshape(b.to(DOT), (4, 8, S, R, TILES, 2, 2))
    return tl.reshape(tl.permute(b, (2, 3, 1, 4, 5, 0, 6)), (S, 8 * R, 16 * TILES))


@triton.jit
def _sum_of_rows(b):
    """(1, 8, 1, R, 1, 1): the sum over what (4, 8, SHARES, R, TILES, 4) holds of each row."""
    b = tl.sum(tl.sum(b, 5, keep_dims=True), 4, keep_dims=True)
    return tl.sum(tl.sum(b, 0, keep_dims=True), 2, keep_dims=True)


@kernel(do_not_specialize=["M"])
def linear_few_kernel(
    x, norm_weight, norm_bias, eps, weight, bias, residual, out, M,
    K: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, SHARES: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """out = norm(x) weight.T (+ bias) (+ residual): a tile of BM rows and BN columns, for few rows.

    Made for latency: much of what a program reads is under way at once, and nothing but sums goes through shared
    memory. x (PARTS, M, K), their sum; LayerNorm of it where NORM; the rest as in `linear_kernel`. The numbers of a row
    are cut into SHARES, one a warp, and a share is taken TILES times 16 numbers at once; where there is a NORM or are
    several PARTS, that is all of it. Which of the 16 numbers a product calls the first is free, if both factors agree:
    here a lane takes 4 neighbours, so that it loads them from memory as the tensor cores want them. Grid: (tiles,),
    those of the same rows one after another.
    """
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    SHARE: tl.constexpr = (K + SHARES - 1) // SHARES
    CHUNKS: tl.constexpr = (SHARE + 16 * TILES - 1) // (16 * TILES)
    i = tl.program_id(0)
    i_m, i_n = i // BLOCKS * BM, i % BLOCKS * BN
    o_g = tl.arange(0, 8)[:, None]
    o_n = i_n + tl.arange(0, BN // 8)[None, :] * 8 + o_g
    o_m = i_m + tl.arange(0, BM // 8)[None, :] * 8 + o_g
    o_w = tl.arange(0, 4)[:, None, None, None, None, None] * 4 + tl.arange(0, 4)
    o_w += tl.arange(0, TILES)[None, None, None, None, :, None] * 16
    o_k = o_w + tl.arange(0, SHARES)[None, None, :, None, None, None] * SHARE
    m_k = (o_w < SHARE) & (o_k < K)
    p_w = weight + o_n * K
    p_x = x + o_m.to(tl.int64) * K
    # weights first: they come from far, while x was written just now
    b_w = _load_shares(p_w, o_n < N, o_k, m_k)
    b_x = _load_shares(p_x, o_m < M, o_k, m_k)
    if PARTS > 1:
        b_x = b_x.to(tl.float32)
        for j in tl.static_range(1, PARTS):
            b_x += _load_shares(p_x + M.to(tl.int64) * (j * K), o_m < M, o_k, m_k).to(tl.float32)
    o_rows, o_columns = i_m + tl.arange(0, BM)[:, None], i_n + tl.arange(0, BN)[None, :]
    m = (o_rows < M) & (o_columns < N)
    o = o_rows.to(tl.int64) * N + o_columns
    if RESIDUAL:
        b_residual = tl.load(residual + o, mask=m, other=0.0)
    if NORM:
        b_weight = tl.load(norm_weight + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_bias = tl.load(norm_bias + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_x = b_x.to(tl.float32)
        b_x = tl.where(m_k, b_x - _sum_of_rows(b_x) * (1.0 / K), 0.0)
        b_x = b_x * tl.rsqrt(_sum_of_rows(b_x * b_x) * (1.0 / K) + eps) * b_weight + b_bias
    b = tl.zeros((SHARES, BM, BN), tl.float32)
    for j in tl.static_range(1, CHUNKS + 1):
        b_a, b_b = _as_factor(b_x, DOT), tl.permute(_as_factor(b_w, DOT), (0, 2, 1))
        if j < CHUNKS:
            m_j = (o_w + j * 16 * TILES < SHARE) & (o_k + j * 16 * TILES < K)
            b_w = _load_shares(p_w, o_n < N, o_k + j * 16 * TILES, m_j)
            b_x = _load_shares(p_x, o_m < M, o_k + j * 16 * TILES, m_j)
        b = tl.dot(b_a, b_b, b)
    b = tl.sum(b, 0)
    if HAS_BIAS:
        b += tl.load(bias + o_columns, mask=o_columns < N, other=0.0).to(tl.float32)
    if RESIDUAL:
        b += b_residual.to(tl.float32)
    tl.store(out + o, b.to(out.dtype.element_ty), mask=m)
