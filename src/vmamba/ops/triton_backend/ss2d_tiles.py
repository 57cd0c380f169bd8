"""What the kernels of the fused SS2D are made of. One program walks one route of one image for one block of channels.

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
def softplus2(z2, EXACT: tl.constexpr):
    """log2(1 + 2^z2), relative error 9e-6, or 2e-7 where EXACT.

    max(z2, 0) + log2(1 + e) with e = 2^-|z2| in (0, 1], and log2(1 + e) = e P(e), P by minimax: accurate relative to
    itself however small delta is, and one special-function instruction where lg2 would make two.
    """
    e = tl.exp2(tl.abs(z2) * -1.0)  # the product is a sign bit of the operand; a minus would be an instruction
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
def compose(a1, b1, a2, b2):
    """h -> a2 (a1 h + b1) + b2: one step after another of h_l = a_l h_{l-1} + b_l."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _second(first, second):
    return second  # of two elements of a scan the newer


@triton.jit
def by_columns(b):
    """b itself, (S, C), in the layout of the scans: one lane owns whole columns.

    A scan that keeps the newer of two elements does nothing and costs nothing. The compiler does not carry the layout
    of the tensor cores past a scan, so the arithmetic that follows stays in the scans' layout, and only b is
    exchanged between lanes rather than everything that the scans read: a quarter of all instructions less.
    """
    return tl.associative_scan(b, 0, _second)


@triton.jit
def row(b, o_rows, i_row):
    """Row i_row of b (rows, C) in fp32, (1, C). All terms but one are the integer 0: no instruction is left."""
    bits = tl.where(o_rows[:, None] == i_row, b.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def steps_forward(b_a, b_b, b_h, S: tl.constexpr):
    """S steps of h = v + b with v = a h_before: v (S, C) and the last h (1, C), from a, b (S, C) and h (1, C)."""
    o_s = tl.arange(0, S)
    b_v = tl.zeros_like(b_a)
    for s in tl.static_range(S):
        b_now = row(b_a, o_s, s) * b_h
        b_v = tl.where((o_s == s)[:, None], b_now, b_v)
        b_h = b_now + row(b_b, o_s, s)
    return b_v, b_h


@triton.jit
def steps_back(b_a, b_c, b_q, S: tl.constexpr):
    """S steps of g = c + q_after with q = a g, from the last to the first: g (S, C) and the last q (1, C).

    Written out, since a reversed scan of Triton's exchanges its numbers between lanes.
    """
    o_s = tl.arange(0, S)
    b_g = tl.zeros_like(b_a)
    for s in tl.static_range(S):
        b_now = row(b_c, o_s, S - 1 - s) + b_q
        b_g = tl.where((o_s == S - 1 - s)[:, None], b_now, b_g)
        b_q = row(b_a, o_s, S - 1 - s) * b_now
    return b_g, b_q


@triton.jit
def pixels(table, i_t, S: tl.constexpr, DIRECT: tl.constexpr, REVERSE: tl.constexpr, L):
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
def load_dt_weight(dt_weight, o_c, o_q, m_c, R: tl.constexpr, DOT: tl.constexpr):
    """Wdt log2(e) of a channel block, (Q, C), as a sum of two numbers of the type that the tensor cores take.

    The rows of B and C are zero, so that a tile of p goes to the tensor cores as it is.
    """
    b = tl.load(dt_weight + o_c[None, :] * R + o_q[:, None], mask=m_c[None, :] & (o_q < R)[:, None], other=0.0)
    b = b.to(tl.float32) * LOG2E
    high = b.to(DOT)
    return high, (b - high.to(tl.float32)).to(DOT)


@triton.jit
def code_to_z2(b_p, b_high, b_low, b_bias):
    """z log2(e) = Wdt code + bias, (S, C), in fp32: the weight keeps 16 bits where p is bf16."""
    if b_p.dtype == tl.float32:
        b = tl.dot(b_p, b_high, input_precision="tf32x3")
    else:
        b = tl.dot(b_p, b_high, tl.dot(b_p, b_low))
    return by_columns(b) + b_bias


@triton.jit
def carried(sums, ends, b_A, o_c, m_c, i_first, i_last, step, N: tl.constexpr, E: tl.constexpr):
    """One state number (1, C) after the segments from i_first up to i_last, each with its total decay and its end."""
    b = tl.zeros_like(b_A)
    for i in range(i_first, i_last, step):
        b_total = tl.load(sums + i * E + o_c, mask=m_c, other=0.0)
        b = b * tl.exp2(b_total * b_A) + tl.load(ends + i * N * E + o_c, mask=m_c, other=0.0)
    return b


@triton.jit
def step_of(o_l, L, H, W, COLUMN: tl.constexpr, REVERSE: tl.constexpr):
    """The step at which a walk visits pixels o_l (row-major)."""
    if COLUMN:
        o_l = (o_l % W) * H + o_l // W
    if REVERSE:
        o_l = L - 1 - o_l
    return o_l
