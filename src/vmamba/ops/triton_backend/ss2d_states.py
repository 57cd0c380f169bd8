"""Launching the fused SS2D for many states: shapes, grids, workspaces."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routes import ROUTES
from . import STEPS
from .ss2d_forward_kernels import merge_kernel, table_kernel
from .ss2d_states_kernels import states_forward_kernel, weights_kernel

__all__ = ["states_outputs"]

# Programs that run at once on the 132 multiprocessors of an H200, twelve of 168 registers on each. Each takes one walk
# after another, so that scratch is bounded and stays in L2. Where there are fewer walks, they are cut into segments,
# each of at least so many tiles.
_PROGRAMS = 1584
_LEAST_TILES = 4

_BLOCK = 16  # states that a lane holds


class Plan:
    """How one call is cut up, and what its kernels are compiled for."""

    def __init__(self, x: Tensor, p: Tensor, dt_weight: Tensor, A: Tensor, routes: str, C: int):
        """x, p: contiguous and not empty. C: channels of a program, one or two for each lane of its warp."""
        self.B, self.H, self.W, self.E = x.shape
        self.K, _, self.R = dt_weight.shape
        self.N = A.shape[1]
        self.NB = min(_BLOCK, triton.next_power_of_2(self.N))
        self.n_n = -(-self.N // self.NB)
        self.L = self.H * self.W
        self.T = -(-self.L // STEPS)
        self.C = C
        self.n_c = -(-self.E // C)
        walks = self.B * self.K * self.n_n * self.n_c
        self.segments = max(1, min(_PROGRAMS // walks, self.T // _LEAST_TILES))
        self.G = -(-self.T // self.segments)
        self.segments = -(-self.T // self.G)
        self.total = walks * self.segments
        self.programs = min(self.total, _PROGRAMS)
        self.route_bits = [(r.order == "column") + 2 * r.reverse for r in ROUTES[routes]]
        self.dot = _dot_type(p)
        self.constants = {
            "K": self.K,
            "E": self.E,
            "R": self.R,
            "N": self.N,
            "NB": self.NB,
            "S": STEPS,
            "C": C,
            "LANE": C // 32,
            "QP": max(16, triton.next_power_of_2(self.R)),
            "DOT": self.dot,
            "EXACT": x.dtype == torch.float32,
            "num_warps": 1,
            "num_stages": 1,
            # 2.44 ms in stage 1 of v0; with 198 registers, nine programs a multiprocessor, 3.5
            "maxnreg": 168,
        }
        self.sizes = (self.B, self.L, self.T, self.G, self.segments, self.total)

    def table(self, like: Tensor) -> Tensor:
        """(K, T * 16): the pixel at each step of each route."""
        steps = self.T * STEPS
        table = torch.empty((self.K, steps), dtype=torch.int32, device=like.device)
        bits = sum(b << (2 * k) for k, b in enumerate(self.route_bits))
        table_kernel[(-(-steps // 256),)](table, self.H, self.W, self.L, steps, K=self.K, ROUTES=bits, BLOCK=256)
        return table

    def weights(self, dt_weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """The weight (2, K, QP / 16, E, 16) as the tensor cores take it, a sum of two, and A (K, N, E) in fp32."""
        dtype = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32}[self.dot]
        QP = self.constants["QP"]
        split = torch.empty((2, self.K, QP // 16, self.E, 16), dtype=dtype, device=A.device)
        A_out = torch.empty((self.K, self.N, self.E), dtype=torch.float32, device=A.device)
        grid = (-(-self.K * self.E * max(QP, self.N) // 1024),)
        weights_kernel[grid](dt_weight, A, split, A_out, K=self.K, E=self.E, R=self.R, N=self.N, QP=QP, BLOCK=1024)
        return split, A_out

    def merge(self, parts: Tensor, y: Tensor, norm: tuple[Tensor, Tensor, float] | None = None) -> None:
        """y (B, H, W, E) = the sum over routes and blocks of states of parts (B, K, n_n, T * 16, E), or its layer norm
        (weight, bias, eps).
        """
        C = triton.next_power_of_2(self.E)
        if norm is None:
            C = min(256, C)
        pixels = max(1, 4096 // C)
        weight, bias, eps = norm or (y, y, 0.0)
        # a block of states is to the sum one more walk of its route
        bits = [b for b in self.route_bits for _ in range(self.n_n)]
        merge_kernel[(self.B * -(-self.L // pixels), -(-self.E // C))](
            parts, y, weight, bias, self.H, self.W, self.L, self.T * STEPS, eps, K=len(bits), E=self.E,
            ROUTES=sum(b << (2 * k) for k, b in enumerate(bits)), NORM=norm is not None, PIXELS=pixels, C=C,
        )  # fmt: skip


def _dot_type(p: Tensor) -> tl.dtype:
    """The type in which the tensor cores take the code: its own."""
    # on the CPU runs Triton's interpreter, which cannot multiply bf16 matrices
    if p.dtype == torch.bfloat16 and p.device.type != "cpu":
        return tl.bfloat16
    return tl.float16 if p.dtype == torch.float16 else tl.float32


def states_outputs(
    x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: str, states: Tensor,
    keep: bool,
) -> tuple[Plan, Tensor]:  # fmt: skip
    """The outputs (B, K, n_n, T * 16, E) of all routes in the order of their walks, a part for each 16 states; the
    states (B, K, T, N, E) before each tile too, where `keep`. All tensors contiguous, x not empty.
    """
    plan = Plan(x, p, dt_weight, A, routes, 64 if x.shape[3] % 64 == 0 else 32)
    fp32 = {"dtype": torch.float32, "device": x.device}
    shape = (plan.B, plan.K, plan.segments) if plan.segments > 1 else (0,)
    ends, sums = torch.empty((*shape, plan.N, plan.E), **fp32), torch.empty((*shape, plan.E), **fp32)
    scratch = torch.empty((plan.programs, STEPS, 2 * plan.C + 2 * plan.NB), **fp32)
    parts = torch.empty((plan.B, plan.K, plan.n_n, plan.T * STEPS, plan.E), dtype=x.dtype, device=x.device)
    weight, A = plan.weights(dt_weight, A)
    arguments = (
        x, p, weight, dt_bias, A, D, plan.table(x), parts, states, ends, sums, scratch, *plan.sizes
    )  # fmt: skip
    if plan.segments > 1:
        states_forward_kernel[(plan.programs,)](*arguments, **plan.constants, KEEP=False, ENDS=True)
    states_forward_kernel[(plan.programs,)](*arguments, **plan.constants, KEEP=keep, ENDS=False)
    return plan, parts
