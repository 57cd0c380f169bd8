"""The portable backend: a two-level chunked scan in plain torch, forward and hand-written backward, on any device.

A sequence of L steps is laid out position first, as (S, M) with S steps in each of M chunks, so that one torch call
makes one step in every chunk, image, route and channel at once. Three short loops then do the walk:

1. inside the chunks from a zero state, keeping only each chunk's last state (S calls);
2. from chunk to chunk, with the chunk's total decay exp(A * sum of delta) (M calls);
3. inside the chunks again, now from the right state, keeping every state (S calls).

Every factor is a decay exp(delta * A) <= 1 (A < 0) or a product of such, so nothing can overflow, however long the
walk. The backward walks the adjoint recurrence the same way, the other way round. States n = 0..N-1 are walked one
after another: the memory needed does not grow with N.

Layouts, in the letters of ops/README.md (here B is the batch; Bs and Cs are the input and output maps):
    X, delta, y     (J, S, B, M, E)      J routes that walk in one direction together
    Bs, Cs          (J, N, S, B, M)
    A               (J, N, E)
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .routes import ROUTES

__all__ = ["selective_scan_backward", "selective_scan_forward", "ss2d_backward", "ss2d_forward"]

# exp2 is 3.5 times as fast as exp on the CPU (vectorised Sleef, AVX-512), so decays are powers of two
_LOG2E = math.log2(math.e)

# atanh(s) / s as a polynomial in s^2 on [0, 1/9] (interpolated at the Chebyshev nodes), lowest power first: error 4e-9
_ATANH = (1.00000000, 0.33333161, 0.20012298, 0.13982579, 0.14078889)

# Elements of one (J, S, B, M, E) array that are walked together: about ten such arrays are live, and 2 MiB each keeps
# them in the last-level cache while every torch call still has work for all threads.
_BLOCK_ELEMENTS = 2**19

# Scratch memory kept from call to call, in bytes; what is larger is allocated and freed each time.
_SCRATCH_KEPT = 64 * 2**20


class _Scratch(threading.local):
    """Memory for temporaries on the CPU, kept between calls.

    Fresh pages cost more than the arithmetic: on a virtual machine a first touch was measured at 2 us a page, 1.2 ms
    for an array that a multiplication fills in 0.05 ms, and malloc gives large blocks back to the system after each
    call.
    """

    def __init__(self) -> None:
        self.kept: dict[torch.dtype, Tensor] = {}

    def take(self, like: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Uninitialised tensors of these shapes, valid until the next call of `take` in this thread."""
        if like.device.type != "cpu":
            return [like.new_empty(shape) for shape in shapes]
        sizes = [-(-math.prod(shape) // 16) * 16 for shape in shapes]  # whole cache lines
        total = sum(sizes)
        flat = self.kept.get(like.dtype)
        if flat is None or flat.numel() < total:
            with torch.inference_mode(False):  # an inference tensor could not be written to outside inference mode
                flat = torch.empty(total, dtype=like.dtype)
            if flat.nbytes <= _SCRATCH_KEPT:
                self.kept[like.dtype] = flat
        parts = flat[:total].split(sizes)
        return [part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)]


_scratch = _Scratch()


def _chunking(length: int) -> tuple[int, int]:
    """(S, M): steps in a chunk and number of chunks, S * M >= length, about square so that S + M is smallest."""
    steps = max(1, math.isqrt(length - 1) + 1)
    return steps, -(-length // steps)


def _states(decay: Tensor, h: Tensor, total: Tensor, reverse: bool) -> None:
    """Run h_l = decay_l * h_{l-1} + b_l in place.

    Args:
        decay: (J, S, B, M, E), in [0, 1].
        h: (J, S+1, B, M, E); slots 1..S hold b on entry and the states on return, slot 0 the state before each chunk.
            When `reverse`, slots 0..S-1 hold b and slot S the state before.
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
    ends, totals, starts = list(end.unbind(2)), list(total.unbind(2)), list(start.unbind(2))
    if reverse:
        ends.reverse()
        totals.reverse()
        starts.reverse()
    starts[0].zero_()
    for end_m, total_m, before, after in zip(ends, totals, starts, starts[1:], strict=False):
        torch.addcmul(end_m, total_m, before, out=after)
    before = start
    for a_s, b_s in zip(a, b, strict=True):
        b_s.addcmul_(a_s, before)
        before = b_s


def _forward_shapes(J: int, S: int, B: int, M: int, E: int) -> list[tuple[int, ...]]:
    return [(J, S, B, M, E)] * 2 + [(J, S + 1, B, M, E)]


def _walk_forward(
    X: Tensor | Sequence[Tensor],
    delta: Tensor,
    A: Tensor,
    Bs: Tensor,
    Cs: Tensor,
    y: Tensor,
    scratch: Sequence[Tensor],
    reverse: bool,
    last_state: Tensor | None = None,
) -> None:
    """Add sum over n of C_n h_n to y (J, S, B, M, E); fill last_state (J, N, B, E) when given. X may be J views."""
    J, E = A.shape[0], A.shape[2]
    du, decay, h = scratch
    now = h[:, :-1] if reverse else h[:, 1:]
    for delta_j, X_j, du_j in zip(delta, X, du, strict=True):
        torch.mul(delta_j, X_j, out=du_j)
    delta_sum = delta.sum(1)
    for n in range(A.shape[1]):
        log2_decay = A[:, n].view(J, 1, 1, 1, E) * _LOG2E
        torch.mul(delta, log2_decay, out=decay).exp2_()
        torch.mul(du, Bs[:, n].unsqueeze(-1), out=now)
        _states(decay, h, (delta_sum * log2_decay[:, 0]).exp2_(), reverse)
        y.addcmul_(now, Cs[:, n].unsqueeze(-1))
        if last_state is not None:
            last_state[:, n] = now[:, 0, :, 0] if reverse else now[:, -1, :, -1]


def _backward_shapes(J: int, S: int, B: int, M: int, E: int) -> list[tuple[int, ...]]:
    return [(J, S, B, M, E)] * 5 + [(J, S + 1, B, M, E)] * 2


def _walk_backward(
    X: Tensor,
    delta: Tensor,
    A: Tensor,
    Bs: Tensor,
    Cs: Tensor,
    gy: Tensor,
    gX: Tensor,
    gB: Tensor,
    gC: Tensor,
    scratch: Sequence[Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `_walk_forward`: adds X's to gX, writes gB and gC, returns gdelta (J, S, B, M, E) and gA (J, N, E).

    The gradient of the state is g_l = C_l gy_l + decay_{l+1} g_{l+1}. With q_l = decay_l g_l it is the forward
    recurrence itself, q_l = decay_l q_{l+1} + decay_l C_l gy_l, walked the other way; and q_l h_{l-1} is the gradient
    of delta_l A.
    """
    J, E = A.shape[0], A.shape[2]
    du, decay, work, gdu, gdelta, h, q = scratch
    # the slot that a walk starts from holds the state before each chunk, so "one step earlier" is a shift by one slot
    low, high = slice(None, -1), slice(1, None)
    h_now, h_before = (h[:, low], h[:, high]) if reverse else (h[:, high], h[:, low])
    q_now, q_before = (q[:, high], q[:, low]) if reverse else (q[:, low], q[:, high])
    torch.mul(delta, X, out=du)
    delta_sum = delta.sum(1)
    gA = torch.empty_like(A)
    for n in range(A.shape[1]):
        A_n, B_n, C_n = A[:, n].view(J, 1, 1, 1, E), Bs[:, n].unsqueeze(-1), Cs[:, n].unsqueeze(-1)
        torch.mul(delta, A_n * _LOG2E, out=decay).exp2_()
        total = (delta_sum * (A_n[:, 0] * _LOG2E)).exp2_()
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
    gX.addcmul_(gdu, delta)
    gdelta.addcmul_(gdu, X)
    return gdelta, gA


def _images_at_a_time(x: Tensor, elements_an_image: int) -> int:
    """How many images to walk together: few enough to stay in cache on the CPU, all of them on a GPU."""
    if x.device.type != "cpu":
        return max(1, x.shape[0])
    return max(1, _BLOCK_ELEMENTS // max(1, elements_an_image))


class _Grid:
    """Moves tensors between images (B, H, W, c) and walks (S, B, M, c), for both orders of a grid."""

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
            image = image.flatten(1, 2)[:, : self.length].unflatten(1, (outer, inner))
        return image if order == "row" else image.transpose(1, 2)


class _Routes:
    """A set of routes as walks: J orders, each walked in D directions; route k = d * J + j.

    `ROUTES` lists the forward routes first and then, in the same orders, the reversed ones.
    """

    def __init__(self, routes: str):
        table = ROUTES[routes]
        self.directions = [False, True] if any(route.reverse for route in table) else [False]
        self.orders = [route.order for route in table[: len(table) // len(self.directions)]]

        self.different = list(dict.fromkeys(self.orders))

    def lay_out(self, grid: _Grid, image: Tensor, out: Tensor) -> Tensor:
        """Write (B, H, W, c) in each different order to out (orders, S, B, M, c)."""
        for order, walk in zip(self.different, out, strict=True):
            walk.copy_(grid.to_walk(image, order))
        return out

    def add_to_image(self, grid: _Grid, walks: Tensor, image: Tensor) -> None:
        """Add each of the walks (orders, S, B, M, c), back at its pixels, to the image (B, H, W, c)."""
        for walk, order in zip(walks, self.different, strict=True):
            image.add_(grid.to_image(walk, order))

    def of_route(self, walks: Tensor) -> Tensor:
        """The walks (orders, S, B, M, c) of each route's order, as (J, S, B, M, c); a view."""
        return walks if len(self.different) == len(self.orders) else walks.expand(len(self.orders), -1, -1, -1, -1)

    def code_of(self, walks: Tensor, d: int) -> Tensor:
        """Direction d's own numbers of the walks (orders, S, B, M, K * c), as (J, S, B, M, c); a view."""
        J = len(self.orders)
        own = walks.unflatten(-1, (len(self.directions), J, -1))[..., d, :, :]
        if len(self.different) == J:
            return own.diagonal(dim1=0, dim2=-2).movedim(-1, 0)
        return own[0].movedim(-2, 0)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _clear_padding(walk: Tensor, padding: int) -> None:
    """Zero what lies beyond the last step of (J, S, B, M, E), in place: delta = 0 leaves the state as it is."""
    if padding:
        walk[:, walk.shape[1] - padding :, :, -1] = 0


def _softplus(z: Tensor, out: Tensor, work: Sequence[Tensor]) -> None:
    """out = log(1 + exp(z)), relative error below 2e-6 in fp32; work: two tensors of z's shape.

    On the CPU torch's softplus spends 7 ns an element in log1p. Here log1p(w) = 2 atanh(w / (2 + w)) with w =
    exp(-|z|), by multiplications only: 2 ns. Other dtypes and devices take torch's own.
    """
    if z.dtype != torch.float32 or z.device.type != "cpu":
        torch.ops.aten.softplus.out(z, out=out)
        return
    s, square = work
    torch.abs(z, out=s).mul_(-_LOG2E).exp2_()
    s.div_(torch.add(s, 2, out=square))
    torch.mul(s, s, out=square)
    *lower, next_to_last, _ = z.new_tensor(_ATANH).split(1)
    torch.add(next_to_last, square, alpha=_ATANH[-1], out=out)
    for coefficient in reversed(lower):
        torch.addcmul(coefficient, out, square, out=out)
    torch.addcmul(torch.clamp(z, min=0, out=square), out, s, value=2, out=out)


def _low_rank_delta(
    code: Tensor, dt_weight: Tensor, dt_bias: Tensor, z: Tensor, delta: Tensor, work: Sequence[Tensor], padding: int
) -> None:
    """z = Wdt code + bias and delta = softplus(z): code (J, S, B, M, R), weight (J, E, R), bias (J, E)."""
    J, E = dt_bias.shape
    torch.baddbmm(dt_bias[:, None], code.flatten(1, 3), dt_weight.transpose(1, 2), out=z.view(J, -1, E))
    _softplus(z, delta, work[:2])
    _clear_padding(delta, padding)


def ss2d_forward(x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: str) -> Tensor:
    """The 2-D scan; arguments and result as `reference.ss2d_scan_reference`. Computes in fp32 (fp64 for fp64 input)."""
    K, E, R = dt_weight.shape
    N = A.shape[1]
    _, height, width, _ = x.shape
    dtype = _compute_dtype(x)
    grid, walks = _Grid(height, width), _Routes(routes)
    J, different, S, M = len(walks.orders), len(walks.different), grid.steps, grid.chunks
    dt_weight, dt_bias, D_sum = dt_weight.to(dtype), dt_bias.to(dtype), D.to(dtype).view(K, E).sum(0)
    A = A.to(dtype).view(K, E, N).transpose(1, 2)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = _images_at_a_time(x, J * S * M * E)
    for x_i, p_i, out_i in zip(x.split(block), p.split(block), out.split(block), strict=True):
        x_i = x_i.to(dtype)
        shape = (J, S, len(x_i), M, E)
        P, y, z, delta, *scratch = _scratch.take(
            x_i, [(different, *shape[1:4], p.shape[-1]), *[shape] * 3, *_forward_shapes(*shape)]
        )
        # read once for each direction: a view costs less than a copy
        X = [grid.to_walk(x_i, order) for order in walks.orders]
        P = walks.lay_out(grid, p_i, P)
        y.zero_()
        for d, reverse in enumerate(walks.directions):
            ks = slice(d * J, (d + 1) * J)
            code, Bs, Cs = walks.code_of(P, d).split([R, N, N], dim=-1)
            _low_rank_delta(code, dt_weight[ks], dt_bias[ks], z, delta, scratch, grid.padding)
            _walk_forward(X, delta, A[ks], Bs.movedim(-1, 1), Cs.movedim(-1, 1), y, scratch, reverse)
        result = torch.mul(x_i, D_sum, out=out_i if x.dtype == dtype else None)
        walks.add_to_image(grid, y if different == J else y.sum(0, keepdim=True), result)
        if x.dtype != dtype:
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
    _, height, width, _ = x.shape
    dtype = _compute_dtype(x)
    grid, walks = _Grid(height, width), _Routes(routes)
    J, different, S, M = len(walks.orders), len(walks.different), grid.steps, grid.chunks
    Wdt, bias, D_sum = dt_weight.to(dtype), dt_bias.to(dtype), D.to(dtype).view(K, E).sum(0)
    A_k = A.to(dtype).view(K, E, N).transpose(1, 2)
    gx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gp = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    gWdt, gbias, gA, gD = (torch.zeros_like(t) for t in (Wdt, bias, A_k, D_sum))
    block = _images_at_a_time(x, J * S * M * E)
    for gy_i, x_i, p_i, gx_i, gp_i in zip(*(t.split(block) for t in (gy, x, p, gx, gp)), strict=True):
        gy_i, x_i = gy_i.to(dtype), x_i.to(dtype)
        shape = (J, S, len(x_i), M, E)
        wide, narrow = (different, *shape[1:]), (different, *shape[1:4], p.shape[-1])
        X, gY, P, gP, gX, z, delta, *scratch = _scratch.take(
            x_i, [wide, wide, narrow, narrow, *[shape] * 3, *_backward_shapes(*shape)]
        )
        gD += torch.mul(walks.lay_out(grid, gy_i, gY)[0], walks.lay_out(grid, x_i, X)[0], out=z[0]).sum((0, 1, 2))
        X, gY = walks.of_route(X), walks.of_route(gY)
        P = walks.lay_out(grid, p_i, P)
        gX.zero_()
        gP.zero_()
        for d, reverse in enumerate(walks.directions):
            ks = slice(d * J, (d + 1) * J)
            code, Bs, Cs = (t.movedim(-1, 1) for t in walks.code_of(P, d).split([R, N, N], dim=-1))
            gcode, gB, gC = (t.movedim(-1, 1) for t in walks.code_of(gP, d).split([R, N, N], dim=-1))
            _low_rank_delta(code.movedim(1, -1), Wdt[ks], bias[ks], z, delta, scratch, grid.padding)
            gdelta, gA_d = _walk_backward(X, delta, A_k[ks], Bs, Cs, gY, gX, gB, gC, scratch, reverse)
            gz = gdelta.mul_(z.sigmoid_()).flatten(1, 3)
            # both products with the short side R first: five times as fast in this order as in the other
            gcode.copy_(torch.bmm(Wdt[ks].transpose(1, 2), gz.transpose(1, 2)).view(code.shape))
            gWdt[ks] += torch.bmm(code.flatten(2, 4), gz).transpose(1, 2)
            gbias[ks] += gz.sum(1)
            gA[ks] += gA_d
        result = torch.mul(gy_i, D_sum, out=gx_i if x.dtype == dtype else None)
        walks.add_to_image(grid, gX if different == J else gX.sum(0, keepdim=True), result)
        if x.dtype != dtype:
            gx_i.copy_(result)
        walks.add_to_image(grid, gP, gp_i.zero_())
    return (
        gx,
        gp,
        gWdt.to(dt_weight.dtype),
        gbias.to(dt_bias.dtype),
        gA.transpose(1, 2).reshape(A.shape).to(A.dtype),
        gD.expand(K, E).reshape(D.shape).to(D.dtype),
    )


def _to_steps(t: Tensor, steps: int, chunks: int) -> Tensor:
    """(B, J, c, L) -> (J, S, B, M, c), zeros beyond the last step."""
    t = F.pad(t, (0, steps * chunks - t.shape[-1])).unflatten(-1, (chunks, steps))
    return t.permute(1, 4, 0, 3, 2).contiguous()


def _to_sequence(t: Tensor, length: int) -> Tensor:
    """(J, S, B, M, c) -> (B, J * c, L), the inverse of `_to_steps` with J and c joined."""
    return t.permute(2, 0, 4, 3, 1).flatten(3)[..., :length].flatten(1, 2)


def _sequence_delta(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """(z, delta) of the 1-D scan: z = delta + bias, and softplus(z) where asked. All (B, K*E, L)."""
    z = delta if delta_bias is None else delta + delta_bias[:, None]
    return z, F.softplus(z) if delta_softplus else z


def selective_scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The 1-D scan; arguments and results as `reference.selective_scan_reference`."""
    batch, channels, length = u.shape
    J, N = B.shape[1], A.shape[1]
    E = channels // J
    dtype = _compute_dtype(u)
    us, As, Bs, Cs = (t.to(dtype) for t in (u, A, B, C))
    S, M = _chunking(length)
    _, deltas = _sequence_delta(delta.to(dtype), None if delta_bias is None else delta_bias.to(dtype), delta_softplus)
    X, deltas = (_to_steps(t.unflatten(1, (J, E)), S, M) for t in (us, deltas))
    Bs, Cs = (_to_steps(t, S, M).movedim(-1, 1) for t in (Bs, Cs))
    shape = (J, S, batch, M, E)
    y, last_state = torch.zeros_like(X), us.new_empty(J, N, batch, E)
    A_j = As.view(J, E, N).transpose(1, 2)
    _walk_forward(X, deltas, A_j, Bs, Cs, y, _scratch.take(X, _forward_shapes(*shape)), False, last_state)
    out = _to_sequence(y, length)
    if D is not None:
        out = out + us * D.to(dtype)[:, None]
    return out.to(u.dtype).contiguous(), last_state.permute(2, 0, 3, 1).reshape(batch, channels, N)


def selective_scan_backward(
    gy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `selective_scan_forward`'s y: of u, delta, A, B, C, D and delta_bias, each in its tensor's dtype.

    Those of an absent D or delta_bias are empty.
    """
    batch, channels, length = u.shape
    J, N = B.shape[1], A.shape[1]
    E = channels // J
    dtype = _compute_dtype(u)
    gys, us, As, Bs, Cs = (t.to(dtype) for t in (gy, u, A, B, C))
    S, M = _chunking(length)
    z, deltas = _sequence_delta(delta.to(dtype), None if delta_bias is None else delta_bias.to(dtype), delta_softplus)
    X, deltas, gY = (_to_steps(t.unflatten(1, (J, E)), S, M) for t in (us, deltas, gys))
    Bs, Cs = (_to_steps(t, S, M).movedim(-1, 1) for t in (Bs, Cs))
    shape = (J, S, batch, M, E)
    gX, gB, gC = torch.zeros_like(X), torch.empty_like(Bs), torch.empty_like(Cs)
    A_j = As.view(J, E, N).transpose(1, 2)
    scratch = _scratch.take(X, _backward_shapes(*shape))
    gdelta, gA = _walk_backward(X, deltas, A_j, Bs, Cs, gY, gX, gB, gC, scratch, False)
    gu, gz = _to_sequence(gX, length), _to_sequence(gdelta, length)
    if delta_softplus:
        gz = gz * z.sigmoid()
    gD, gbias = u.new_empty(0), u.new_empty(0)
    if D is not None:
        gu = gu + gys * D.to(dtype)[:, None]
        gD = (gys * us).sum((0, 2)).to(D.dtype)
    if delta_bias is not None:
        gbias = gz.sum((0, 2)).to(delta_bias.dtype)
    gB, gC = (_to_sequence(t.movedim(1, -1), length).unflatten(1, (J, N)) for t in (gB, gC))
    return (
        gu.to(u.dtype).contiguous(),
        gz.to(delta.dtype).contiguous(),
        gA.transpose(1, 2).reshape(channels, N).to(A.dtype),
        gB.to(B.dtype).contiguous(),
        gC.to(C.dtype).contiguous(),
        gD,
        gbias,
    )
