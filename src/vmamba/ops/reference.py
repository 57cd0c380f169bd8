"""The definition: the selective scan and SS2D as plain loops.

Slow and plain on purpose. Every backend is judged by these functions, outputs and gradients, in fp64 where it can be.
They are differentiable any number of times, because autograd sees every step.

Source: Mamba (arXiv 2312.00752), algorithm 2; VMamba (arXiv 2401.10166), section 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .routes import check_routes, merge_routes, scan_routes

__all__ = ["selective_scan_reference", "ss2d_scan_reference"]


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One selective scan a channel, one step a time:

        delta = softplus(delta + delta_bias)
        h_l   = exp(delta_l A) h_{l-1} + delta_l B_l u_l
        y_l   = <C_l, h_l> + D u_l

    Args:
        u: (batch, K*E, L).
        delta: (batch, K*E, L).
        A: (K*E, N).
        B, C: (batch, K, N, L); channel c reads group c // E.
        D: (K*E,) or None.
        delta_bias: (K*E,) or None.
        delta_softplus: whether softplus is applied to delta + delta_bias.

    Returns:
        y (batch, K*E, L) in u's dtype, and the last state (batch, K*E, N) in the dtype of the state: fp64 for fp64
        input, fp32 otherwise.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    channels_a_group = u.shape[1] // B.shape[1]
    us, delta, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    B, C = (m.to(dtype).repeat_interleave(channels_a_group, dim=1) for m in (B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h = us.new_zeros(us.shape[0], us.shape[1], A.shape[1])
    y = []
    # unbind, never indexing: indexing makes autograd fill a full-size gradient at every step, O(L^2) in the backward
    for u_l, delta_l, B_l, C_l in zip(us.unbind(-1), delta.unbind(-1), B.unbind(-1), C.unbind(-1), strict=True):
        h = torch.exp(delta_l[..., None] * A) * h + (delta_l * u_l)[..., None] * B_l
        y.append((h * C_l).sum(-1))
    out = torch.stack(y, dim=-1) if y else us.clone()
    if D is not None:
        out = out + us * D.to(dtype)[:, None]
    return out.to(u.dtype), h


def ss2d_scan_reference(
    x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: str = "cross2d"
) -> Tensor:
    """The 2-D scan by copying: K scanned copies of x and p, K selective scans, one merge.

    Args:
        x: (B, H, W, E).
        p: (B, H, W, K*(R+2N)), per pixel and route [R for delta | N for B | N for C].
        dt_weight: (K, E, R). dt_bias: (K, E). A: (K*E, N), negative. D: (K*E,).
        routes: a key of `vmamba.ops.ROUTES`.

    Returns:
        (B, H, W, E) in x's dtype: the sum of the routes, each put back at its pixels.
    """
    K, E, R = dt_weight.shape
    N = A.shape[1]
    height, width = x.shape[1:3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    xs = scan_routes(x.to(dtype), routes)  # (B, K, L, E)
    ps = torch.stack(
        [scan_routes(p_k, routes)[:, k] for k, p_k in enumerate(p.to(dtype).chunk(len(check_routes(routes)), dim=-1))],
        dim=1,
    )  # (B, K, L, R+2N)
    code, B, C = ps.split([R, N, N], dim=-1)
    delta = torch.einsum("bklr,ker->bkel", code, dt_weight.to(dtype)).flatten(1, 2)
    y, _ = selective_scan_reference(
        xs.transpose(2, 3).flatten(1, 2),
        delta,
        A,
        B.transpose(2, 3),
        C.transpose(2, 3),
        D,
        dt_bias.flatten(),
        delta_softplus=True,
    )
    y = y.unflatten(1, (K, E)).transpose(2, 3)
    return merge_routes(y, height, width, routes).to(x.dtype)
