"""Launching the 1-D selective scan: layouts, tiles, grids, workspaces, and the sums that the kernels leave."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import portable
from . import SCAN_STEPS
from .scan1d_kernels import scan_backward_kernel, scan_forward_kernel

__all__ = ["scan_backward", "scan_forward"]

_ALIGNED = 16  # rows start at multiples of so many numbers

# Warps that keep the 132 multiprocessors of an H200 busy, 16 on each. Where a launch would have fewer, sequences are
# cut into segments, each of at least so many tiles.
_WARPS = 2112
_LEAST_TILES = 2

# The forward would rather have four rounds of them: at (8, 1536, 2048), N = 16, 3072 warps with 8 lanes along time take
# 0.35 ms and 12288 with 32 take 0.26, for all that more lanes are more exchanges.
_FORWARD_WARPS = 8448

_STEPS = 16  # of a lane; with 8 the exchanges weigh more: 0.34 ms forward


def _rows(t: Tensor, L_rows: int) -> Tensor:
    """t with rows that start at multiples of 16 numbers and go on to L_rows, zero from L on: t itself, or a copy."""
    L = t.shape[-1]
    if L_rows != L:
        return torch.nn.functional.pad(t, (0, L_rows - L))
    apart = all(stride % _ALIGNED == 0 for stride, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1)
    if t.stride(-1) == 1 and apart and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _strides(t: Tensor) -> tuple[int, ...]:
    return t.stride()[:-1]


def _forward_tile(groups: int, E: int, L: int) -> tuple[int, int]:
    """(C, M) of a tile, one warp, for so many groups of E channels over the batch."""
    lanes = triton.next_power_of_2(triton.cdiv(L, _STEPS))
    M = min(lanes, SCAN_STEPS // _STEPS)
    while min(lanes, 32) > M and groups * E * M < 32 * _FORWARD_WARPS:
        M *= 2
    return _filled(M, 32 // M, E, lanes)


def _backward_tile(groups: int, E: int, L: int) -> tuple[int, int]:
    """The same for the backward: 16 channels, which is what the tensor cores sum over, in four warps.

    Never more lanes along time for want of warps: 16 of them make 1.37 ms of 1.08, 32 leave registers too few.
    """
    lanes = triton.next_power_of_2(triton.cdiv(L, _STEPS))
    M = min(lanes, SCAN_STEPS // _STEPS)
    return _filled(M, max(16, 32 // M), E, lanes)


def _filled(M: int, C: int, E: int, lanes: int) -> tuple[int, int]:
    """(C, M) with no more channels than a group has, and then with lanes along time for a whole warp if there are."""
    C = min(C, triton.next_power_of_2(E))
    return C, max(M, min(lanes, 32 // C))


class _Plan:
    """How one call is cut up: C channels and M lanes of S steps in a tile, and what follows from them."""

    def __init__(self, u: Tensor, A: Tensor, B: Tensor, delta_softplus: bool, tile: Callable[..., tuple[int, int]]):
        self.batch, self.channels, self.L = u.shape
        self.K, self.N = B.shape[1], A.shape[1]
        self.E = self.channels // self.K
        self.L_rows = triton.cdiv(self.L, _ALIGNED) * _ALIGNED
        self.C, M = tile(self.batch * self.K, self.E, self.L)
        self.T = triton.cdiv(self.L, M * _STEPS)
        programs = self.batch * self.K * triton.cdiv(self.E, self.C)
        warps = max(1, self.C * M // 32)
        self.segments = max(1, min(_WARPS // (programs * warps), self.T // _LEAST_TILES))
        self.G = triton.cdiv(self.T, self.segments)
        self.segments = triton.cdiv(self.T, self.G)
        self.grid = (programs * self.segments,)
        self.n_states = triton.cdiv(self.L, SCAN_STEPS)
        self.sizes = (
            self.L, self.L_rows, self.T, self.G, self.segments, self.n_states, self.K, self.E, self.N,
        )  # fmt: skip
        self.constants = {
            "S": _STEPS,
            "C": self.C,
            "M": M,
            "EVEN": self.T * M * _STEPS == self.L,
            "SOFTPLUS": delta_softplus,
            "EXACT": u.dtype == torch.float32,
            "num_warps": warps,
            "num_stages": 1,
        }

    def segment_buffers(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(carry, ends, sums): the states between tiles, and what passes between segments."""
        fp32 = {"dtype": torch.float32, "device": device}
        shape = (self.batch, self.segments, self.channels)
        carry = torch.empty((*shape, self.N), **fp32)
        if self.segments == 1:
            return carry, carry, carry
        return carry, torch.empty((*shape, self.N), **fp32), torch.empty(shape, **fp32)


def _weights(u: Tensor, A: Tensor, D: Tensor | None, delta_bias: Tensor | None) -> list[Tensor]:
    """A, D and delta_bias as the kernels read them, zeros for what is absent."""
    absent = torch.zeros(u.shape[1] if D is None or delta_bias is None else 0, device=u.device)
    return [absent if t is None else t.contiguous() for t in (A, D, delta_bias)]


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The 1-D scan (see `dispatch.Backend`). States: (batch, K*E, n_states, N) fp32, one before each 128 steps."""
    fp32 = {"dtype": torch.float32, "device": u.device}
    if u.dtype == torch.float64:
        y, last_state = portable.selective_scan_forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
        return y, last_state, torch.empty(0, **fp32)
    batch, channels, L = u.shape
    if u.numel() == 0:
        return torch.empty_like(u), torch.zeros((batch, channels, A.shape[1]), **fp32), torch.empty(0, **fp32)
    plan = _Plan(u, A, B, delta_softplus, _forward_tile)
    u, delta, B, C = (_rows(_narrow(t), plan.L_rows) for t in (u, delta, B, C))
    weights = _weights(u, *(_narrow(t) for t in (A, D, delta_bias)))
    keep = keep and plan.n_states > 1
    states = torch.empty((batch, channels, plan.n_states, plan.N) if keep else 0, **fp32)
    y = torch.empty((batch, channels, plan.L_rows), dtype=u.dtype, device=u.device)
    strides = [s for t in (u, delta, B, C, y) for s in _strides(t)]
    # 16 warps on a multiprocessor, 0.257 ms; without the limit 168 registers and 12 of them, 0.281 ms
    constants = {**plan.constants, "maxnreg": 128}
    carry, ends, sums = plan.segment_buffers(u.device)
    arguments = (u, delta, weights[0], B, C, *weights[1:], y)
    if plan.segments > 1:
        scan_forward_kernel[plan.grid](
            *arguments, ends, ends, sums, states, *strides, *plan.sizes, **constants, KEEP=False, ENDS=True
        )
    scan_forward_kernel[plan.grid](
        *arguments, carry, ends, sums, states, *strides, *plan.sizes, **constants, KEEP=keep, ENDS=False
    )
    return y[..., :L].contiguous(), carry[:, -1].contiguous(), states


def _narrow(t: Tensor | None) -> Tensor | None:
    """fp64 among narrower inputs is read as fp32."""
    return t.float() if t is not None and t.dtype == torch.float64 else t


def scan_backward(
    gy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    """Gradients of `scan_forward` (see `dispatch.Backend`), walking back once from the states kept."""
    if u.dtype == torch.float64:
        return portable.selective_scan_backward(gy, u, delta, A, B, C, D, delta_bias, delta_softplus)
    tensors = (u, delta, A, B, C, D, delta_bias)
    if u.numel() == 0:
        return tuple(u.new_zeros(0) if t is None else torch.zeros_like(t) for t in tensors)
    plan = _Plan(u, A, B, delta_softplus, _backward_tile)
    if plan.n_states > 1 and states.numel() == 0:
        states = scan_forward(*tensors, delta_softplus, True)[2]
    gy, *rows = (_rows(_narrow(t), plan.L_rows) for t in (gy, u, delta, B, C))
    weights = _weights(u, *(_narrow(t) for t in (A, D, delta_bias)))
    batch, K, N, L, L_rows = plan.batch, plan.K, plan.N, plan.L, plan.L_rows
    fp32 = {"dtype": torch.float32, "device": u.device}
    gu, gdelta = (torch.empty((batch, plan.channels, L_rows), dtype=t.dtype, device=u.device) for t in (u, delta))
    g_maps = torch.empty((2, triton.cdiv(plan.E, plan.C), batch, K, N, L_rows), **fp32)
    gA, gD, g_bias = (torch.empty((batch * plan.segments, plan.channels, *n), **fp32) for n in ((N,), (), ()))
    strides = [s for t in (gy, *rows, gu) for s in _strides(t)]
    # sums over channels: bf16 for bf16; for fp32, and for fp16, whose range gradients may leave, three tf32 products,
    # as good as one in fp32. Triton's interpreter, on the CPU, cannot multiply bf16 matrices.
    low = u.dtype == torch.bfloat16 and u.is_cuda
    constants = {**plan.constants, "KEPT": plan.n_states > 1, "SUM": tl.bfloat16 if low else tl.float32}
    carry, ends, sums = plan.segment_buffers(u.device)
    arguments = (gy, *rows[:2], weights[0], *rows[2:], *weights[1:], states, gu, gdelta, g_maps, gA, gD, g_bias)
    if plan.segments > 1:
        scan_backward_kernel[plan.grid](*arguments, ends, ends, sums, *strides, *plan.sizes, **constants, ENDS=True)
    scan_backward_kernel[plan.grid](*arguments, carry, ends, sums, *strides, *plan.sizes, **constants, ENDS=False)
    gB, gC = g_maps.sum(1)[..., :L]
    gA, gD, g_bias = (t.sum(0) for t in (gA, gD, g_bias))
    absent = u.new_zeros(0)
    return (
        gu[..., :L].contiguous(),
        gdelta[..., :L].contiguous(),
        gA.to(A.dtype),
        gB.to(B.dtype).contiguous(),
        gC.to(C.dtype).contiguous(),
        absent if D is None else gD.to(D.dtype),
        absent if delta_bias is None else g_bias.to(delta_bias.dtype),
    )
