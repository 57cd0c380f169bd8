"""Launching the fused SS2D: shapes, grids, workspaces, and the sums that the kernels leave."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import portable
from ..routes import ROUTES
from . import STEPS
from . import ss2d_kernels as kernels

__all__ = ["ss2d_backward", "ss2d_forward"]

# One warp a program: the work of a tile is then free of barriers, and there are programs enough.
_ONE_WARP = {"num_warps": 1, "num_stages": 1}

# Where a launch would have fewer programs than this, walks are cut into segments: four schedulers on each of the 132
# multiprocessors of an H200, two warps on each.
_ENOUGH_PROGRAMS = 1056
_LEAST_TILES = 4  # of a segment


def _dot_type(p: Tensor) -> tl.dtype:
    """The type in which the tensor cores take the code: its own."""
    # on the CPU runs Triton's interpreter, which cannot multiply bf16 matrices
    if p.dtype == torch.bfloat16 and p.device.type != "cpu":
        return tl.bfloat16
    return tl.float16 if p.dtype == torch.float16 else tl.float32


def _sum_constants(p: Tensor, Q: int) -> dict[str, object]:
    """How the backward sums over channels and pixels on the tensor cores.

    bf16 for bf16; for fp16, whose range gradients may leave, and fp32 three tf32 products, as good as fp32.
    """
    dot = _dot_type(p)
    return {
        "QP": max(16, triton.next_power_of_2(Q)),
        "SUM": dot if dot == tl.bfloat16 else tl.float32,
        "PRECISION": "tf32x3",
    }


def _route_bits(routes: str) -> int:
    """Two bits a route: 1 by columns, 2 reversed."""
    return sum(((r.order == "column") + 2 * r.reverse) << (2 * k) for k, r in enumerate(ROUTES[routes]))


class _Plan:
    """How one call is cut up, and the constants that its kernels are compiled for."""

    def __init__(self, x: Tensor, p: Tensor, dt_weight: Tensor, A: Tensor, routes: str):
        self.B, self.H, self.W, self.E = x.shape
        self.K, _, self.R = dt_weight.shape
        self.N = A.shape[1]
        self.L = self.H * self.W
        self.T = -(-self.L // STEPS)
        self.steps = self.T * STEPS
        self.C = 64 if self.E % 64 == 0 else 32
        self.n_c = -(-self.E // self.C)
        walks = self.B * self.K * self.n_c
        self.segments = 1
        if walks < _ENOUGH_PROGRAMS:
            self.segments = max(1, min(-(-_ENOUGH_PROGRAMS // walks), self.T // _LEAST_TILES))
        self.G = -(-self.T // self.segments)
        self.segments = -(-self.T // self.G)
        self.route_bits = _route_bits(routes)
        # rows of a grid that tiles fill exactly need no table of pixels
        kinds = [0 if route.order == "column" or self.L % STEPS else 1 + route.reverse for route in ROUTES[routes]]
        self.constants = {
            "K": self.K,
            "E": self.E,
            "R": self.R,
            "N": self.N,
            "RP": max(16, triton.next_power_of_2(self.R)),
            "NP": triton.next_power_of_2(self.N),
            "S": STEPS,
            "C": self.C,
            "LANE": self.C // 32,
            "KINDS": sum(kind << (2 * k) for k, kind in enumerate(kinds)),
            "BODIES": sum(1 << kind for kind in set(kinds)),
            "DOT": _dot_type(p),
            "EXACT": x.dtype == torch.float32,
        }

    def grid(self, segments: int) -> tuple[int]:
        return (self.B * segments * self.K * self.n_c,)

    def table(self, like: Tensor) -> Tensor:
        table = torch.empty((self.K, self.steps), dtype=torch.int32, device=like.device)
        kernels.table_kernel[(-(-self.steps // 256),)](
            table, self.H, self.W, self.L, self.steps, K=self.K, ROUTES=self.route_bits, BLOCK=256
        )
        return table

    def merge(self, parts: Tensor, y: Tensor) -> None:
        """y (B, H, W, E) = the sum over routes of parts (B, K, steps, E)."""
        grid = (-(-self.L // 32), self.B, self.n_c)
        kernels.merge_kernel[grid](
            parts,
            y,
            self.H,
            self.W,
            self.L,
            self.steps,
            K=self.K,
            E=self.E,
            ROUTES=self.route_bits,
            PIXELS=32,
            C=self.C,
        )


def _prepare(x: Tensor, p: Tensor, *weights: Tensor) -> list[Tensor]:
    if p.dtype == torch.float64:
        p = p.float()
    return [t.contiguous() for t in (x, p, *weights)]


def ss2d_forward(
    x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """The 2-D scan (see `dispatch.Backend`). States: (B, K, T, N, E) fp32, the state before each tile of 16 steps."""
    if x.dtype == torch.float64:
        y = portable.ss2d_forward(x, p, dt_weight, dt_bias, A, D, routes)
        return y, torch.empty(0, dtype=torch.float32, device=x.device)
    x, p, *weights = _prepare(x, p, dt_weight, dt_bias, A, D)
    plan = _Plan(x, p, dt_weight, A, routes)
    y = torch.empty_like(x)
    empty = torch.empty(0, dtype=torch.float32, device=x.device)
    states = x.new_empty((plan.B, plan.K, plan.T, plan.N, plan.E), dtype=torch.float32) if keep else empty
    if x.numel() == 0:
        return y, states
    table = plan.table(x)
    parts = x.new_empty((plan.B, plan.K, plan.steps, plan.E))
    ends = sums = empty
    if plan.segments > 1:
        ends = empty.new_empty((plan.B, plan.K, plan.segments, plan.N, plan.E))
        sums = empty.new_empty((plan.B, plan.K, plan.segments, plan.E))
    arguments = (x, p, *weights, table, parts, states, ends, sums, plan.L, plan.T, plan.G, plan.segments)
    grid = plan.grid(plan.segments)
    if plan.segments > 1:
        kernels.ss2d_forward_kernel[grid](*arguments, **plan.constants, KEEP=False, ENDS=True, **_ONE_WARP)
    kernels.ss2d_forward_kernel[grid](*arguments, **plan.constants, KEEP=keep, ENDS=False, **_ONE_WARP)
    plan.merge(parts, y)
    return y, states


def ss2d_backward(
    gy: Tensor,
    x: Tensor,
    p: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor,
    routes: str,
) -> tuple[Tensor, ...]:
    """Gradients of `ss2d_forward` (see `dispatch.Backend`), walking each route back once from the states kept."""
    if x.dtype == torch.float64:
        return portable.ss2d_backward(gy, x, p, dt_weight, dt_bias, A, D, routes)
    if states.numel() == 0:
        _, states = ss2d_forward(x, p, dt_weight, dt_bias, A, D, routes, True)
    code_dtype = p.dtype
    x, p, *weights = _prepare(x, p, dt_weight, dt_bias, A, D)
    gy = gy.to(x.dtype).contiguous()
    plan = _Plan(x, p, dt_weight, A, routes)
    K, E, R, N, Q = plan.K, plan.E, plan.R, plan.N, plan.R + 2 * plan.N
    gx, gp = torch.empty_like(x), torch.empty_like(p)
    if x.numel() == 0:
        return gx, gp.to(code_dtype), *(torch.zeros_like(w) for w in (dt_weight, dt_bias, A, D))
    table = plan.table(x)
    gx_parts = x.new_empty((plan.B, K, plan.steps, E))
    fp32 = {"dtype": torch.float32, "device": x.device}
    gp_parts = torch.empty((plan.n_c, plan.B, K, plan.steps, Q), **fp32)
    programs = plan.B * plan.segments
    g_weight, g_bias, gA, gD = (torch.empty((programs, K * E * n), **fp32) for n in (R, 1, N, 1))
    ends = sums = torch.empty(0, **fp32)
    if plan.segments > 1:
        ends = torch.empty((plan.B, K, plan.segments, N, E), **fp32)
        sums = torch.empty((plan.B, K, plan.segments, E), **fp32)
    arguments = (
        *(gy, x, p, *weights, table, states, gx_parts, gp_parts, g_weight, g_bias, gA, gD, ends, sums),
        *(plan.B, plan.L, plan.T, plan.G, plan.segments),
    )
    grid = plan.grid(plan.segments)
    constants = {**plan.constants, **_sum_constants(p, Q), **_ONE_WARP}
    if plan.segments > 1:
        kernels.ss2d_backward_kernel[grid](*arguments, **constants, ENDS=True)
    kernels.ss2d_backward_kernel[grid](*arguments, **constants, ENDS=False)
    plan.merge(gx_parts, gx)
    kernels.merge_code_kernel[(-(-plan.L // 32), plan.B)](
        gp_parts, gp, plan.B, plan.H, plan.W, plan.L, plan.steps,
        K=K, Q=Q, QP=triton.next_power_of_2(Q), n_parts=plan.n_c, ROUTES=plan.route_bits, PIXELS=32,
    )  # fmt: skip
    weights = zip((g_weight, g_bias, gA, gD), (dt_weight, dt_bias, A, D), strict=True)
    return gx, gp.to(code_dtype), *(part.sum(0).view(w.shape).to(w.dtype) for part, w in weights)
