"""Launching the fused SS2D: shapes, grids, workspaces, and the sums that the kernels leave."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import portable
from ..routes import ROUTES
from . import STEPS
from .ss2d_backward_kernels import (
    code_gradient_kernel,
    merge_gradient_kernel,
    ss2d_backward_kernel,
    sum_parts_kernel,
)
from .ss2d_few_kernels import ss2d_few_kernel
from .ss2d_forward_kernels import merge_kernel, ss2d_forward_kernel, table_kernel
from .ss2d_narrow_kernels import ss2d_forward_narrow_kernel
from .ss2d_one_kernels import ss2d_forward_one_kernel, sum_kernel, sum_norm_kernel
from .ss2d_states import Plan, states_outputs

__all__ = ["few_outputs", "ss2d_backward", "ss2d_forward", "ss2d_norm_forward"]

# What runs at once on the 132 multiprocessors of an H200, twelve programs of 168 registers on each. Where a launch
# would have fewer, walks are cut into segments, each of at least so many tiles.
_PROGRAMS = 1584
_LEAST_TILES = 4
# Programs of one of four routes that run at once, for the backward's products with up to 128 channels a program; with
# 256 two fifths as many. The limit is shared memory.
_PRODUCTS = 165

# From so many states a walk goes step by step, its states in registers (56x56x192, N = 16: 2.4 ms instead of 4.4).
_MANY = 16

# N = 1 has a kernel of its own for codes of so many numbers: 56x56x96, R = 6, 0.347 ms instead of 0.413
_NARROW = 6
# and one, faster where lanes can share what they load: from so many channels
_OWN_KERNEL = 384
_WARPS = 1056  # two for each scheduler

# Few walks: so many tiles of 256 steps and 16 channels, two for each multiprocessor
_FEW_TILES = 320


def _dot_type(p: Tensor) -> tl.dtype:
    """The type in which the tensor cores take the code: its own."""
    # on the CPU runs Triton's interpreter, which cannot multiply bf16 matrices
    if p.dtype == torch.bfloat16 and p.device.type != "cpu":
        return tl.bfloat16
    return tl.float16 if p.dtype == torch.float16 else tl.float32


@functools.cache
def _route_bits(routes: str) -> int:
    """Two bits a route: 1 by columns, 2 reversed."""
    return sum(((r.order == "column") + 2 * r.reverse) << (2 * k) for k, r in enumerate(ROUTES[routes]))


@functools.cache
def _kinds(routes: str, filled: bool) -> tuple[int, int]:
    """Two bits a route, 0 for a walk by the table of pixels, 1 and 2 for rows forward and reversed; and which occur.

    Rows of a grid that tiles fill exactly need no table.
    """
    kinds = [1 + r.reverse if filled and r.order != "column" else 0 for r in ROUTES[routes]]
    return sum(kind << (2 * k) for k, kind in enumerate(kinds)), sum(1 << kind for kind in set(kinds))


class _Plan:
    """How one call is cut up, and the constants that its kernels are compiled for."""

    def __init__(self, x: Tensor, p: Tensor, dt_weight: Tensor, A: Tensor, routes: str, C: int):
        """x, p: contiguous and not empty. C: channels of a program, one or two for each lane of its warp."""
        self.B, self.H, self.W, self.E = x.shape
        self.K, _, self.R = dt_weight.shape
        self.N = A.shape[1]
        self.L = self.H * self.W
        self.T = -(-self.L // STEPS)
        self.steps = self.T * STEPS
        self.C = C
        self.n_c = -(-self.E // C)
        self.segments = max(1, min(_PROGRAMS // (self.B * self.K * self.n_c), self.T // _LEAST_TILES))
        self.G = -(-self.T // self.segments)
        self.segments = -(-self.T // self.G)
        self.route_bits = _route_bits(routes)
        kinds, bodies = _kinds(routes, self.L % STEPS == 0)
        columns = max(16, triton.next_power_of_2(self.R + 2 if self.N == 1 else self.R))  # of a tile of p
        self.constants = {
            "K": self.K,
            "E": self.E,
            "R": self.R,
            "N": self.N,
            "S": STEPS,
            "C": C,
            "LANE": C // 32,
            "QP": columns,
            "DOT": _dot_type(p),
            "KINDS": kinds,
            "BODIES": bodies,
            "EXACT": x.dtype == torch.float32,
            # one warp a program: next to no barriers, and programs enough
            "num_warps": 1,
            "num_stages": 1,
            # stages 1 and 2: all programs at once, where 176 registers made two rounds of them, the second nearly
            # empty. With a larger weight the limit would only spill.
            "maxnreg": 168 if columns == 16 and self.N == 1 else None,
        }
        self.sizes = (self.B, self.L, self.T, self.G, self.segments)
        self.grid = (self.B * self.segments * self.K * self.n_c,)

    def segment_buffers(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(carry, ends, sums): the states between tiles where N > 1, and what passes between segments."""
        shape = (self.B, self.K, self.segments, self.N, self.E)
        fp32 = {"dtype": torch.float32, "device": device}
        carry = torch.empty(shape if self.N > 1 else 0, **fp32)
        if self.segments == 1:
            return carry, torch.empty(0, **fp32), torch.empty(0, **fp32)
        return carry, torch.empty(shape, **fp32), torch.empty((*shape[:3], self.E), **fp32)

    def table(self, like: Tensor) -> Tensor:
        """(K, steps): the pixel at each step of each route. Made anew each time, 2 us: nothing outlives the call."""
        table = torch.empty((self.K, self.steps), dtype=torch.int32, device=like.device)
        table_kernel[(-(-self.steps // 256),)](
            table, self.H, self.W, self.L, self.steps, K=self.K, ROUTES=self.route_bits, BLOCK=256
        )
        return table

    def merge(self, parts: Tensor, y: Tensor, norm: tuple[Tensor, Tensor, float] | None = None) -> None:
        """y (B, H, W, E) = the sum over routes of parts (B, K, steps, E), or its layer norm (weight, bias, eps)."""
        # whole pixels where they fit, so that memory is read and written in long runs: 0.10 ms in stage 1, in blocks
        # of 32 channels 0.24
        C = triton.next_power_of_2(self.E)
        if norm is None:
            C = min(256, C)
        pixels = max(1, 4096 // C)
        grid = (self.B * -(-self.L // pixels), -(-self.E // C))
        weight, bias, eps = norm or (y, y, 0.0)
        merge_kernel[grid](
            parts, y, weight, bias, self.H, self.W, self.L, self.steps, eps,
            K=self.K, E=self.E, ROUTES=self.route_bits, NORM=norm is not None, PIXELS=pixels, C=C,
        )  # fmt: skip


def _prepare(x: Tensor, p: Tensor, *weights: Tensor) -> list[Tensor]:
    if p.dtype == torch.float64:
        p = p.float()
    return [t.contiguous() for t in (x, p, *weights)]


def _tile_of(E: int) -> tuple[int, int, bool]:
    """(J, S, two): 2 J channels a lane, which share addresses, B and C; S steps a tile; whether to load two ahead."""
    # two ahead: 0.062 ms against 0.085 with 384 channels; with 768 registers spill, 0.060 against 0.052
    if E < 768:
        return (1, 8, True) if E < 384 else (2, 4, True)
    return 4, 4, False


class FewTile(NamedTuple):
    """How `ss2d_few_kernel` cuts a walk: steps of a lane, warps of a program, and programs that share a walk."""

    steps: int
    warps: int
    segments: int


def _few_tile(L: int, walks: int) -> FewTile:
    """For walks, each of L steps of 16 channels: 4.1, 4.8, 9.2 and 16.7 us for one image in the stages of VMamba-T."""
    if L <= 64:
        return FewTile(4, 4, 1)
    if L <= 128:
        return FewTile(8, 4, 1)
    if 256 < L <= 1024:
        return FewTile(16, 8, 1)
    return FewTile(8, 8, max(1, min(-(-L // 256), _FEW_TILES // walks)))


def _are_few(x: Tensor, p: Tensor, A: Tensor) -> bool:
    B, H, W, E = x.shape
    L, KE = H * W, A.shape[0]
    tiles = B * (KE // E) * -(-E // 16) * -(-L // 256)
    return A.shape[1] == 1 and tiles <= _FEW_TILES and L <= 2**20 and B * L * max(KE, p.shape[3]) < 2**31


def few_outputs(
    x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, routes: str,
    tile: FewTile | None = None,
) -> Tensor | None:  # fmt: skip
    """The routes' outputs at their pixels, (K, B, H, W, E), where walks are few and N = 1; else None."""
    if x.dtype == torch.float64 or x.numel() == 0 or not (tile or _are_few(x, p, A_log)):
        return None
    x, p, *weights = _prepare(x, p, dt_weight, dt_bias, A_log, D)
    return _few_outputs(x, p, *weights, routes, True, tile)


def _few_outputs(
    x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: str,
    log: bool, tile: FewTile | None = None,
) -> Tensor:  # fmt: skip
    """The same for contiguous tensors that are not empty. log: A is log(-A)."""
    B, H, W, E = x.shape
    K, _, R = dt_weight.shape
    L, n_c = H * W, -(-E // 16)
    tile = tile or _few_tile(L, B * K * n_c)
    tiles = -(-L // (4 * tile.warps * tile.steps))
    G = -(-tiles // tile.segments)
    segments = -(-tiles // G)
    parts = torch.empty((K, B, H, W, E), dtype=x.dtype, device=x.device)
    ends = sums = parts
    if segments > 1:
        ends, sums = torch.empty((2, B, K, segments, E), dtype=torch.float32, device=x.device)
    arguments = (x, p, dt_weight, dt_bias, A, D, parts, ends, sums, B, H, W, G, segments)
    constants = {
        "K": K,
        "E": E,
        "R": R,
        "QP": max(16, triton.next_power_of_2(R)),
        "S": tile.steps,
        "WARPS": tile.warps,
        "ROUTES": _route_bits(routes),
        "DOT": _dot_type(p),
        "LOG": log,
        "SPLIT": segments > 1,
        "LOOP": G > 1,
        "EXACT": x.dtype == torch.float32,
        "num_warps": tile.warps,
        "num_stages": 1,
    }
    grid = (B * segments * K * n_c,)
    if segments > 1:
        ss2d_few_kernel[grid](*arguments, **constants, ENDS=True)
    ss2d_few_kernel[grid](*arguments, **constants, ENDS=False)
    return parts


def _route_outputs(
    x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: str,
    states: Tensor, keep: bool, log: bool = False,
) -> Tensor:  # fmt: skip
    """The routes' outputs at their pixels, (K, B, L, E), where N = 1. All tensors contiguous, x not empty.

    log: A is log(-A).
    """
    B, H, W, E = x.shape
    K, _, R = dt_weight.shape
    L = H * W
    J, S, two = _tile_of(E)
    n_c = -(-E // (16 * J))
    tiles, per_state = -(-L // S), STEPS // S
    segments = max(1, min(4 * _WARPS // (B * K * n_c), tiles // (_LEAST_TILES * per_state)))
    G = -(-tiles // segments)
    if segments > 1:
        G = -(-G // per_state) * per_state  # states lie before each 16 steps of a walk
    segments = -(-tiles // G)
    walkers = B * segments
    table = torch.empty((K, segments * G * S), dtype=torch.int32, device=x.device)
    table_kernel[(-(-table.shape[1] // 256),)](
        table, H, W, L, table.shape[1], K=K, ROUTES=_route_bits(routes), BLOCK=256
    )
    fp32 = {"dtype": torch.float32, "device": x.device}
    ends, sums = (torch.empty((B, K, segments, E) if segments > 1 else 0, **fp32) for _ in range(2))
    parts = torch.empty((K, B, L, E), dtype=x.dtype, device=x.device)
    arguments = (
        x, p, dt_weight, dt_bias, A, D, table, parts, states, ends, sums, B, L, -(-L // STEPS), G, segments
    )  # fmt: skip
    constants = {
        "K": K,
        "E": E,
        "R": R,
        "S": S,
        "J": J,
        "TWO": two,
        "DOT": _dot_type(p),
        "PACK_X": x.element_size() == 2 and E % 2 == 0,
        "PACK_P": p.element_size() == 2 and R % 2 == 0,
        "RAGGED": table.shape[1] > L or walkers % 4 > 0,
        "SPLIT": segments > 1,
        "EXACT": x.dtype == torch.float32,
        "LOG": log,
        "num_warps": 1,
        "num_stages": 1,
    }
    grid = (-(-walkers // 4) * K * n_c,)
    if segments > 1:
        ss2d_forward_one_kernel[grid](*arguments, **constants, KEEP=False, ENDS=True)
    ss2d_forward_one_kernel[grid](*arguments, **constants, KEEP=keep, ENDS=False)
    return parts


def ss2d_forward(
    x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """The 2-D scan (see `dispatch.Backend`). States: (B, K, T, N, E) fp32, the state before each tile of 16 steps."""
    fp32 = {"dtype": torch.float32, "device": x.device}
    if x.dtype == torch.float64:
        return portable.ss2d_forward(x, p, dt_weight, dt_bias, A, D, routes), torch.empty(0, **fp32)
    K, E, _ = dt_weight.shape
    B, H, W, _ = x.shape
    states = torch.empty((B, K, -(-H * W // STEPS), A.shape[1], E) if keep else 0, **fp32)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y, states
    x, p, *weights = _prepare(x, p, dt_weight, dt_bias, A, D)
    few = not keep and _are_few(x, p, A)
    if few or (A.shape[1] == 1 and E >= _OWN_KERNEL):
        if few:
            parts = _few_outputs(x, p, *weights, routes, False)
        else:
            parts = _route_outputs(x, p, *weights, routes, states, keep)
        sum_kernel[(-(-y.numel() // 2048),)](parts, y, y.numel(), K=K, BLOCK=2048)
    else:
        plan, parts = _walk_outputs(x, p, *weights, routes, states, keep)
        plan.merge(parts, y)
    return y, states


def _walk_outputs(
    x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: str, states: Tensor,
    keep: bool, log: bool = False,
) -> tuple[_Plan | Plan, Tensor]:  # fmt: skip
    """The outputs (B, K, steps, E) of all routes in the order of their walks; states too, where `keep`.

    log: A is log(-A).
    """
    if log and A.shape[1] > 1:  # read anew in each tile, so made once
        A, log = -torch.exp(A.float()), False
    if A.shape[1] >= _MANY:
        return states_outputs(x, p, dt_weight, dt_bias, A, D, routes, states, keep)
    is_narrow = A.shape[1] == 1 and dt_weight.shape[2] <= _NARROW
    plan = _Plan(x, p, dt_weight, A, routes, 64 if x.shape[3] % 64 == 0 and not is_narrow else 32)
    carry, ends, sums = plan.segment_buffers(x.device)
    parts = torch.empty((plan.B, plan.K, plan.steps, plan.E), dtype=x.dtype, device=x.device)
    arguments = (x, p, dt_weight, dt_bias, A, D, plan.table(x), parts, states)
    if is_narrow:
        sizes, constants = plan.sizes[1:], _narrow_constants(plan, p)
        if plan.segments > 1:
            ss2d_forward_narrow_kernel[plan.grid](
                *arguments, ends, sums, *sizes, **constants, LOG=log, KEEP=False, ENDS=True
            )
        # storing states raises 156 registers to 206, and then nine programs a multiprocessor run instead of twelve
        ss2d_forward_narrow_kernel[plan.grid](
            *arguments, ends, sums, *sizes, **constants, LOG=log, KEEP=keep, ENDS=False, maxnreg=168 if keep else None
        )
        return plan, parts
    if plan.segments > 1:
        ss2d_forward_kernel[plan.grid](
            *arguments, ends, ends, sums, *plan.sizes, **plan.constants, LOG=log, KEEP=False, ENDS=True
        )
    ss2d_forward_kernel[plan.grid](
        *arguments, carry, ends, sums, *plan.sizes, **plan.constants, LOG=log, KEEP=keep, ENDS=False
    )
    return plan, parts


def _narrow_constants(plan: _Plan, p: Tensor) -> dict[str, object]:
    """What `ss2d_forward_narrow_kernel` is compiled for."""
    pack = p.element_size() == 2 and plan.R % 2 == 0
    names = ("K", "E", "R", "S", "KINDS", "BODIES", "EXACT", "num_warps", "num_stages")
    return {name: plan.constants[name] for name in names} | {
        "QP": triton.next_power_of_2(plan.R),
        "PACK": pack,
        "VEC": math.gcd((plan.R + 2) // 2 if pack else plan.R + 2, 4),
    }


def ss2d_norm_forward(
    x: Tensor,
    p: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    routes: str,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """`ss2d_forward` without states, and the layer norm over channels that follows it in the network.

    Args:
        x, p, dt_weight, dt_bias, D, routes: see `dispatch.Backend`.
        A_log: log(-A), (K*E, N).
        norm_weight, norm_bias: (E,), any float dtype.
        eps: added to the variance.

    Returns:
        (B, H, W, E) in the dtype of x, with statistics of the sum of routes in fp32.
    """
    if x.dtype == torch.float64:
        y = portable.ss2d_forward(x, p, dt_weight, dt_bias, -torch.exp(A_log), D, routes)
        return torch.nn.functional.layer_norm(y, x.shape[-1:], norm_weight.to(y.dtype), norm_bias.to(y.dtype), eps)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x, p, *weights = _prepare(x, p, dt_weight, dt_bias, A_log, D)
    E, n = x.shape[-1], x.numel() // x.shape[-1]
    norm = (norm_weight.contiguous(), norm_bias.contiguous(), eps)
    states = x.new_empty(0, dtype=torch.float32)
    if few := _are_few(x, p, A_log):
        parts = _few_outputs(x, p, *weights, routes, True)
    elif A_log.shape[1] == 1 and E >= _OWN_KERNEL:
        parts = _route_outputs(x, p, *weights, routes, states, False, log=True)
    else:
        plan, parts = _walk_outputs(x, p, *weights, routes, states, False, log=True)
        plan.merge(parts, y, norm)
        return y
    C = triton.next_power_of_2(E)
    pixels = max(1, (1024 if few else 4096) // C)
    sum_norm_kernel[(-(-n // pixels),)](parts, y, *norm[:2], n, eps, K=parts.shape[0], E=E, PIXELS=pixels, C=C)
    return y


def _products_tile(E: int, bf16: bool) -> tuple[int, int, int, int]:
    """(steps, channels, warps) of a block of the backward's products with gz, and how many programs of a route.

    Whole pixels where they fit into shared memory, and so many blocks a program that all programs run at once; else 64
    channels of many steps at a time, a block a program.
    """
    widest = 256 if bf16 else 128
    if widest < E:
        return widest, 64, widest // 32, 0
    width = triton.next_power_of_2(max(16, E))
    # 56x56x96: 0.206 ms with eight warps, 0.230 with four; 28x28x192 the other way round
    warps = 8 if bf16 and width == 128 else 4
    return 64, width, warps, _PRODUCTS if width <= 128 else -(-_PRODUCTS * 2 // 5)


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
    tensors = (x, p, dt_weight, dt_bias, A, D)
    if x.numel() == 0:
        return tuple(torch.zeros_like(t) for t in tensors)
    if states.numel() == 0:
        _, states = ss2d_forward(*tensors, routes, True)
    x, p, *weights = _prepare(*tensors)
    gy = gy.to(x.dtype).contiguous()
    plan = _Plan(x, p, dt_weight, A, routes, 32)
    (B, H, W, E), K, R, N, L, steps = x.shape, plan.K, plan.R, plan.N, plan.L, plan.steps
    # sums over channels and pixels: bf16 for bf16; for fp32, and for fp16, whose range gradients may leave, three tf32
    # products, as good as one in fp32
    bf16 = x.dtype == torch.bfloat16
    products = {"SUM": tl.bfloat16 if _dot_type(p) == tl.bfloat16 else tl.float32, "PRECISION": "tf32x3"}
    fp32 = {"dtype": torch.float32, "device": x.device}
    walks = (B, K, steps)
    rows, width, product_warps, programs = _products_tile(E, bf16)
    block = min(rows, triton.next_power_of_2(steps))
    images = rows // block
    blocks = -(-B // images) * -(-steps // block)
    G = -(-blocks // programs) if width >= E else 1
    gx_parts = torch.empty((*walks, E), dtype=x.dtype, device=x.device)
    gz = torch.empty((*walks, E), dtype=torch.bfloat16 if bf16 else torch.float32, device=x.device)
    gBC = torch.empty((plan.n_c, *walks, 2 * N), **fp32)
    g_channels = torch.empty((B * plan.segments, (N + 2) * K * E), **fp32)
    g_weight = torch.empty((-(-blocks // G), K * E * R), **fp32)
    gx, gp, *gradients = (torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in tensors)
    table = plan.table(x)
    carry, ends, sums = plan.segment_buffers(x.device)
    arguments = (gy, x, p, *weights[:3], table, states, gx_parts, gz, gBC, g_channels)
    constants = {
        "K": K, "E": E, "R": R, "N": N, "S": STEPS, "C": plan.C, "LANE": plan.C // 32,
        "QP": max(16, triton.next_power_of_2(R)), "DOT": _dot_type(p), **products,
        "EXACT": x.dtype == torch.float32, "num_warps": 1, "num_stages": 1,
        # stages 1 and 2: all programs of stage 1 at once; 0.69 ms with the limit, 1.0 without
        "maxnreg": 168 if R <= 16 and N == 1 else None,
    }  # fmt: skip
    if plan.segments > 1:
        ss2d_backward_kernel[plan.grid](*arguments, ends, ends, sums, *plan.sizes, **constants, ENDS=True)
    ss2d_backward_kernel[plan.grid](*arguments, carry, ends, sums, *plan.sizes, **constants, ENDS=False)
    code_gradient_kernel[(g_weight.shape[0], K)](
        gz, gBC, p, weights[0], table, gp, g_weight, B, L, steps, G,
        K=K, E=E, R=R, N=N, n_parts=plan.n_c, IMAGES=images, STEPS=block, C=width, QP=constants["QP"],
        NP=triton.next_power_of_2(2 * N), **products, num_warps=product_warps,
    )  # fmt: skip
    vector = math.gcd(E, 8)
    merge_gradient_kernel[(B * -(-L * (E // vector) // 256),)](
        gx_parts, gy, weights[3], gx, H, W, L, steps, K=K, E=E, ROUTES=plan.route_bits, VECTOR=vector, BLOCK=256
    )
    blocks = -(-K * E * R // 64) + -(-K * E * N // 64) + 2 * -(-K * E // 64)
    sum_parts_kernel[(blocks,)](
        g_weight, g_channels, *gradients, g_weight.shape[0], g_channels.shape[0],
        KE=K * E, R=R, N=N, ROWS=32, BLOCK=64,
    )  # fmt: skip
    return gx, gp, *gradients
