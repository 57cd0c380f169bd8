"""The public operators (interim: the reference only; backends follow)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import selective_scan_reference, ss2d_scan_reference

__all__ = ["selective_scan", "ss2d"]


def selective_scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False) -> Tensor:
    return selective_scan_reference(u, delta, A, B, C, D, delta_bias, delta_softplus)[0]


def ss2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    routes: str = "cross2d",
    backend: str | None = None,
) -> Tensor:
    """x (B,H,W,E), x_proj_weight (K, R+2N, E), dt_weight (K,E,R), dt_bias (K,E), A (K*E,N) negative, D (K*E,) -> (B,H,W,E)."""
    if routes == "cascade2d":
        raise NotImplementedError
    p = F.linear(x, x_proj_weight.flatten(0, 1))
    return ss2d_scan_reference(x, p, dt_weight, dt_bias, A, D, routes)
