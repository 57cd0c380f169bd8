"""Where each scan walks: the routes of SS2D as tables and as plain gathers.

A route visits the L = H*W pixels of a grid in some order. It is written here as an (order, direction) pair, so that
every backend can walk it in place; `scan_routes` and `merge_routes` are the plain form that copies, for the
reference, for pictures and for tests.

Source: VMamba (arXiv 2401.10166), section 4.2 "2D-Selective-Scan", and its ablation of scan patterns.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["ROUTES", "Route", "check_routes", "merge_routes", "route_indices", "scan_routes"]


class Route(NamedTuple):
    """One walk over the grid.

    order: "row" visits pixels row by row, "column" column by column.
    reverse: the same sequence from its last pixel to its first.
    """

    order: Literal["row", "column"]
    reverse: bool


# Route k of the paper's K = 4, in the order in which the released checkpoints store their weights.
# In every set the routes come as (forward routes, then reversed routes), which backends rely on.
ROUTES: dict[str, tuple[Route, ...]] = {
    "cross2d": (Route("row", False), Route("column", False), Route("row", True), Route("column", True)),
    "unidi": (Route("row", False),) * 4,
    "bidi": (Route("row", False), Route("row", False), Route("row", True), Route("row", True)),
}


def check_routes(routes: str) -> tuple[Route, ...]:
    """The routes of that name.

    Raises:
        ValueError: if no set of routes has that name.
    """
    if routes not in ROUTES:
        raise ValueError(f"unknown routes {routes!r}: choose one of {', '.join(ROUTES)}")
    return ROUTES[routes]


def route_indices(route: Route, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Row-major pixel numbers (L,), int64, in the order in which `route` visits them."""
    pixels = torch.arange(height * width, device=device).view(height, width)
    sequence = pixels.flatten() if route.order == "row" else pixels.t().flatten()
    return sequence.flip(0) if route.reverse else sequence


def scan_routes(x: Tensor, routes: str = "cross2d") -> Tensor:
    """Lay the pixels out as each route visits them.

    Args:
        x: (B, H, W, E), any dtype.
        routes: a key of `ROUTES`.

    Returns:
        (B, K, L, E), a copy: element l of sequence k is the l-th pixel of route k.
    """
    _, height, width, _ = x.shape
    flat = x.flatten(1, 2)
    walks = [route_indices(route, height, width, x.device) for route in check_routes(routes)]
    return torch.stack([flat[:, walk] for walk in walks], dim=1)


def merge_routes(y: Tensor, height: int, width: int, routes: str = "cross2d") -> Tensor:
    """Put each route's outputs back at their pixels and add the routes.

    Args:
        y: (B, K, L, E), sequences as `scan_routes` lays them out.
        height, width: the grid, height * width = L.
        routes: a key of `ROUTES`.

    Returns:
        (B, H, W, E). The adjoint of `scan_routes`.
    """
    merged = torch.zeros_like(y[:, 0])
    for sequence, route in zip(y.unbind(1), check_routes(routes), strict=True):
        merged = merged.index_add(1, route_indices(route, height, width, y.device), sequence)
    return merged.unflatten(1, (height, width))
