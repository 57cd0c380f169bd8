"""The portable backend: a two-level chunked scan in plain torch, forward and hand-written backward, on any device.

A sequence of L steps is laid out position first, as (S, M) with S steps in each of M chunks, so that one torch call makes one
step in every chunk, image, route and channel at once. Three short loops then do the walk:

1. inside the chunks from a zero state, keeping only each chunk's last state (S calls);
2. from chunk to chunk, with the chunk's total decay exp(A * sum of delta) (M calls);
3. inside the chunks again, now from the right state, keeping every state (S calls).

Every factor is a decay exp(delta * A) <= 1 (A < 0) or a product of such, so nothing can overflow, however long the walk. The
backward walks the adjoint recurrence the same way, the other way round. States n = 0..N-1 are walked one after another: the
memory needed does not grow with N.

Layouts, in the letters of ops/README.md (B is the batch here; B_n, C_n the input and output maps):
    X, delta, y     (J, S, B, M, E)      J routes that walk in one direction together
    B_n, C_n        (J, N, S, B, M)
    A               (J, N, E)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .routes import ROUTES

__all__ = ["ss2d_backward", "ss2d_forward"]

# A torch call on the CPU is split over threads from 32,768 elements on; a step of one image should be about that large for
# each thread, and no larger, so that the working set of a few images stays in cache.
_ELEMENTS_A_THREAD = 32768


def _chunking(length: int) -> tuple[int, int]:
    """(S, M): steps in a chunk and number of chunks, S * M >= length, about square so that S + M is smallest."""
    steps = max(1, math.isqrt(length - 1) + 1)
    return steps, -(-length // steps)


def _states(decay: Tensor, h: Tensor, total: Tensor, reverse: bool) -> None:
    """Run h_l = decay_l * h_{l-1} + b_l in place.

    Args:
        decay: (J, S, B, M, E), in [0, 1].
        h: (J, S+1, B, M, E); slots 1..S hold b on entry and the states on return, slot 0 the state before each chunk. When
            `reverse`, slots 0..S-1 hold b and slot S the state before.
        total: (J, B, M, E), the product of decay over S.
        reverse: walk from the last position of the last chunk to the first of the first.
    """
    a, b = list(decay.unbind(1)), list(h.unbind(1))
    start = b.pop(-1) if reverse else b.pop(0)
    if reverse:
        a.reverse()
        b.reverse()
    end = b[0].clone()
    for a_s, b_s in zip(a[1:], b[1:], strict=True):
        torch.addcmul(b_s, a_s, end, out=end)
    order = range(start.shape[2] - 1, -1, -1) if reverse else range(start.shape[2])
    ends, totals, starts = end.unbind(2), total.unbind(2), start.unbind(2)
    carry = torch.zeros_like(ends[0])
    for m in order:
        starts[m].copy_(carry)
        torch.addcmul(ends[m], totals[m], carry, out=carry)
    before = start
    for a_s, b_s in zip(a, b, strict=True):
        b_s.addcmul_(a_s, before)
        before = b_s


def _walk_forward(
    X: Tensor, delta: Tensor, A: Tensor, Bs: Tensor, Cs: Tensor, reverse: bool, last_state: Tensor | None = None
) -> Tensor:
    """y (J, S, B, M, E) = sum over n of C_n h_n; fills last_state (J, N, B, E) when given. See the module's layouts."""
    J, S, batch, M, E = delta.shape
    du = delta * X
    delta_sum = delta.sum(1)
    h = delta.new_empty(J, S + 1, batch, M, E)
    now = h[:, :-1] if reverse else h[:, 1:]
    decay, y = torch.empty_like(delta), torch.empty_like(delta)
    for n in range(A.shape[1]):
        A_n = A[:, n].view(J, 1, 1, 1, E)
        torch.mul(delta, A_n, out=decay).exp_()
        torch.mul(du, Bs[:, n].unsqueeze(-1), out=now)
        _states(decay, h, (delta_sum * A_n[:, 0]).exp_(), reverse)
        if last_state is not None:
            last_state[:, n] = now[:, 0, :, 0] if reverse else now[:, -1, :, -1]
        C_n = Cs[:, n].unsqueeze(-1)
        if n == 0:
            torch.mul(now, C_n, out=y)
        else:
            y.addcmul_(now, C_n)
    return y


def _walk_backward(
    X: Tensor, delta: Tensor, A: Tensor, Bs: Tensor, Cs: Tensor, gy: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `_walk_forward`'s y: (gX, gdelta) (J, S, B, M, E), gA (J, N, E), (gB, gC) (J, N, S, B, M).

    The gradient of the state is g_l = C_l gy_l + decay_{l+1} g_{l+1}. With q_l = decay_l g_l it is the forward recurrence
    itself, q_l = decay_l q_{l+1} + decay_l C_l gy_l, walked the other way; and q_l h_{l-1} is the gradient of delta_l A.
    """
    J, S, batch, M, E = delta.shape
    du = delta * X
    delta_sum = delta.sum(1)
    h, q = delta.new_empty(J, S + 1, batch, M, E), delta.new_empty(J, S + 1, batch, M, E)
    # the slot that a walk starts from holds the state before each chunk, so "one step earlier" is a shift by one slot
    low, high = slice(None, -1), slice(1, None)
    h_now, h_before = (h[:, low], h[:, high]) if reverse else (h[:, high], h[:, low])
    q_now, q_before = (q[:, high], q[:, low]) if reverse else (q[:, low], q[:, high])
    decay, work = torch.empty_like(delta), torch.empty_like(delta)
    gdelta, gdu = torch.empty_like(delta), torch.empty_like(delta)
    gA, gB, gC = torch.empty_like(A), delta.new_empty(Bs.shape), delta.new_empty(Bs.shape)
    for n in range(A.shape[1]):
        A_n, B_n, C_n = A[:, n].view(J, 1, 1, 1, E), Bs[:, n].unsqueeze(-1), Cs[:, n].unsqueeze(-1)
        torch.mul(delta, A_n, out=decay).exp_()
        total = (delta_sum * A_n[:, 0]).exp_()
        torch.mul(du, B_n, out=h_now)
        _states(decay, h, total, reverse)
        torch.sum(torch.mul(gy, h_now, out=work), -1, out=gC[:, n])
        torch.mul(gy, C_n, out=q_now).mul_(decay)
        _states(decay, q, total, not reverse)
        g = torch.addcmul(q_before, gy, C_n, out=decay)
        torch.sum(torch.mul(g, du, out=work), -1, out=gB[:, n])
        torch.mul(q_now, h_before, out=work)
        if n == 0:
            torch.mul(g, B_n, out=gdu)
            torch.mul(work, A_n, out=gdelta)
        else:
            gdu.addcmul_(g, B_n)
            gdelta.addcmul_(work, A_n)
        torch.sum(work.mul_(delta), (1, 2, 3), out=gA[:, n])
    gdelta.addcmul_(gdu, X)
    return gdu.mul_(delta), gdelta, gA, gB, gC


def _images_at_a_time(x: Tensor, elements_a_step: int) -> int:
    """How many images to walk together: enough to feed every thread, few enough to stay in cache. All of them on a GPU."""
    if x.device.type != "cpu":
        return max(1, x.shape[0])
    return max(1, round(_ELEMENTS_A_THREAD * torch.get_num_threads() / max(1, elements_a_step)))


class _Grid:
    """Moves tensors between (B, H, W, c) and walks (S, B, M, c), for both orders of a grid."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self.length = height * width
        self.steps, self.chunks = _chunking(self.length)
        self.padding = self.steps * self.chunks - self.length

    def to_walk(self, image: Tensor, order: str) -> Tensor:
        """(B, H, W, c) -> (S, B, M, c), a view where the chunks are the grid's own rows or columns."""
        if order == "column":
            image = image.transpose(1, 2)
        if image.shape[2] != self.steps:
            batch, c = image.shape[0], image.shape[3]
            image = image.reshape(batch, self.length, c)
            image = F.pad(image, (0, 0, 0, self.padding)).view(batch, self.chunks, self.steps, c)
        return image.permute(2, 0, 1, 3)

    def to_image(self, walk: Tensor, order: str) -> Tensor:
        """(S, B, M, c) -> (B, H, W, c), the inverse of `to_walk`."""
        inner, outer = (self.width, self.height) if order == "row" else (self.height, self.width)
        image = walk.permute(1, 2, 0, 3)
        if inner != self.steps:
            image = image.reshape(walk.shape[1], -1, walk.shape[3])[:, : self.length].unflatten(1, (outer, inner))
        return image if order == "row" else image.transpose(1, 2)

    def clear_padding(self, walk: Tensor) -> None:
        """Zero what lies beyond the last pixel of (J, S, B, M, c), in place."""
        if self.padding:
            walk[:, self.steps - self.padding :, :, -1] = 0


class _Direction:
    """The routes of a set that walk in one direction: their numbers k and, for each, the order of its walk."""

    def __init__(self, routes: str, reverse: bool):
        table = ROUTES[routes]
        self.reverse = reverse
        self.ks = [k for k, route in enumerate(table) if route.reverse == reverse]
        self.orders = [table[k].order for k in self.ks]

    def gather(self, grid: _Grid, p: Tensor) -> Tensor:
        """p (B, H, W, K, c) -> (J, S, B, M, c)."""
        return torch.stack([grid.to_walk(p[..., k, :], order) for k, order in zip(self.ks, self.orders, strict=True)])

    def select(self, walks: dict[str, Tensor]) -> Tensor:
        """The walk (S, B, M, c) of each route's order, as (J, S, B, M, c)."""
        if len(set(self.orders)) == 1:
            return walks[self.orders[0]].expand(len(self.orders), -1, -1, -1, -1)
        return torch.stack([walks[order] for order in self.orders])


def _directions(routes: str) -> list[_Direction]:
    return [d for d in (_Direction(routes, False), _Direction(routes, True)) if d.ks]


def _delta(code: Tensor, dt_weight: Tensor, dt_bias: Tensor, grid: _Grid) -> Tensor:
    """softplus(Wdt code + bias): (J, S, B, M, R), (J, E, R), (J, E) -> (J, S, B, M, E), zero beyond the last pixel."""
    flat = torch.baddbmm(dt_bias[:, None], code.flatten(1, 3), dt_weight.transpose(1, 2))
    delta = F.softplus(flat).view(*code.shape[:-1], dt_weight.shape[1])
    grid.clear_padding(delta)
    return delta


def ss2d_forward(
    x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: str
) -> Tensor:
    """The 2-D scan; arguments and result as `reference.ss2d_scan_reference`. Computes in fp32 (fp64 for fp64 input)."""
    K, E, R = dt_weight.shape
    N = A.shape[1]
    batch, height, width, _ = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt_weight, dt_bias = dt_weight.to(dtype), dt_bias.to(dtype)
    A_k = A.to(dtype).view(K, E, N).transpose(1, 2)
    D_sum = D.to(dtype).view(K, E).sum(0)
    grid = _Grid(height, width)
    directions = _directions(routes)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = _images_at_a_time(x, len(directions[0].ks) * grid.chunks * E)
    for x_i, p_i, out_i in zip(x.split(block), p.split(block), out.split(block), strict=True):
        x_i, p_i = x_i.to(dtype), p_i.to(dtype).unflatten(-1, (K, R + 2 * N))
        merged: dict[str, Tensor] = {}
        walks = {order: grid.to_walk(x_i, order).contiguous() for order in {o for d in directions for o in d.orders}}
        for direction in directions:
            code, Bs, Cs = direction.gather(grid, p_i).split([R, N, N], dim=-1)
            y = _walk_forward(
                direction.select(walks),
                _delta(code, dt_weight[direction.ks], dt_bias[direction.ks], grid),
                A_k[direction.ks],
                Bs.movedim(-1, 1),
                Cs.movedim(-1, 1),
                direction.reverse,
            )
            for y_k, order in zip(y, direction.orders, strict=True):
                merged[order] = merged[order].add_(y_k) if order in merged else y_k
        result = x_i * D_sum
        for order, walk in merged.items():
            result += grid.to_image(walk, order)
        out_i.copy_(result)
    return out


def ss2d_backward(
    gy: Tensor, x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `ss2d_forward` with respect to its six tensors, each in its tensor's shape and dtype.

    Only inputs are kept between forward and backward; the states are walked again, a few images at a time.
    """
    K, E, R = dt_weight.shape
    N = A.shape[1]
    batch, height, width, _ = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt_weight_, dt_bias_ = dt_weight.to(dtype), dt_bias.to(dtype)
    A_k = A.to(dtype).view(K, E, N).transpose(1, 2)
    D_sum = D.to(dtype).view(K, E).sum(0)
    grid = _Grid(height, width)
    directions = _directions(routes)
    gx = torch.empty_like(x, memory_format=torch.contiguous_format)
    gp = torch.empty_like(p, memory_format=torch.contiguous_format)
    gdt_weight, gdt_bias = torch.zeros_like(dt_weight_), torch.zeros_like(dt_bias_)
    gA, gD = torch.zeros_like(A_k), torch.zeros_like(D_sum)
    block = _images_at_a_time(x, len(directions[0].ks) * grid.chunks * E)
    blocks = zip(*(t.split(block) for t in (gy, x, p, gx, gp)), strict=True)
    for gy_i, x_i, p_i, gx_i, gp_i in blocks:
        gy_i, x_i = gy_i.to(dtype), x_i.to(dtype)
        p_i, gp_i = p_i.to(dtype).unflatten(-1, (K, R + 2 * N)), gp_i.unflatten(-1, (K, R + 2 * N))
        orders = {o for d in directions for o in d.orders}
        walks = {order: grid.to_walk(x_i, order).contiguous() for order in orders}
        gwalks = {order: grid.to_walk(gy_i, order).contiguous() for order in orders}
        merged: dict[str, Tensor] = {}
        for direction in directions:
            ks = direction.ks
            code, Bs, Cs = direction.gather(grid, p_i).split([R, N, N], dim=-1)
            delta = _delta(code, dt_weight_[ks], dt_bias_[ks], grid)
            gX, gdelta, gA_j, gB, gC = _walk_backward(
                direction.select(walks),
                delta,
                A_k[ks],
                Bs.movedim(-1, 1),
                Cs.movedim(-1, 1),
                direction.select(gwalks),
                direction.reverse,
            )
            # softplus'(z) = sigmoid(z) = 1 - exp(-softplus(z))
            gz = gdelta.mul_(delta.neg_().expm1_().neg_()).flatten(1, 3)
            gcode = torch.bmm(gz, dt_weight_[ks]).view(code.shape)
            gdt_weight[ks] += torch.bmm(gz.transpose(1, 2), code.flatten(1, 3))
            gdt_bias[ks] += gz.sum(1)
            gA[ks] += gA_j
            g_p = torch.cat([gcode, gB.movedim(1, -1), gC.movedim(1, -1)], dim=-1)
            for gX_k, g_p_k, k, order in zip(gX, g_p, ks, direction.orders, strict=True):
                merged[order] = merged[order].add_(gX_k) if order in merged else gX_k
                gp_i[..., k, :] = grid.to_image(g_p_k, order)
        gD += torch.einsum("bhwe,bhwe->e", gy_i, x_i)
        result = gy_i * D_sum
        for order, walk in merged.items():
            result += grid.to_image(walk, order)
        gx_i.copy_(result)
    return (
        gx,
        gp,
        gdt_weight.to(dt_weight.dtype),
        gdt_bias.to(dt_bias.dtype),
        gA.transpose(1, 2).reshape(A.shape).to(A.dtype),
        gD.expand(K, E).reshape(D.shape).to(D.dtype),
    )
