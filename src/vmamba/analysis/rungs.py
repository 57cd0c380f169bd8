"""SS2D as it was before it was fast: what the paper's acceleration steps started from, as layers that run.

Each computes what `vmamba.layers.SS2D` computes, from the same parameters, in the way of one step of the ladder of
VMamba (arXiv 2401.10166v4), section 4.3 and figure 3.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import SS2D
from ..layers.conv import DepthwiseConv3x3SiLU
from ..ops import ROUTES, depthwise_conv3x3, selective_scan
from ..ops.routes import Route

__all__ = ["BackendRung", "RungSS2D", "on_rung"]


@dataclass(frozen=True)
class BackendRung:
    """One way of computing SS2D with materialised routes: K scanned copies of x go to a 1-D scan, K come back.

    scan: backend of the 1-D scan, "portable" (plain torch) or "triton".
    low_precision: the scan takes the dtype that the layer computes in; else fp32. Its state is fp32 in both.
    linear: delta, B and C come from one linear layer on the image as it lies, channels last; else from einsum on the
        K scanned copies, and the layer permutes to channels first and back.
    """

    scan: str
    low_precision: bool
    linear: bool


class RungSS2D(nn.Module):
    """An SS2D, (B, H, W, C) -> (B, H, W, C), with its parameters and the computation of a rung.

    Args:
        layer: the layer, as every released model has it, up to routes, N, gate and norm.

    Raises:
        ValueError: for one with another convolution or activation, or cascaded routes.
    """

    def __init__(self, layer: SS2D, rung: BackendRung):
        super().__init__()
        if not isinstance(layer.conv, DepthwiseConv3x3SiLU) or layer.routes not in ROUTES:
            raise ValueError(
                "a rung needs an SS2D with a depthwise 3x3 convolution, SiLU and routes of "
                f"{', '.join(ROUTES)}; this one has {type(layer.conv).__name__} and {layer.routes}"
            )
        self.layer, self.rung = layer, rung
        self.routes = ROUTES[layer.routes]

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        x = layer.in_proj(x)
        z = None
        if layer.gate:
            x, z = x.chunk(2, dim=-1)
        y = self._from_linear(x) if self.rung.linear else self._from_einsum(x)
        y = layer.out_act(layer.out_norm(y))
        return layer.out_proj(y if z is None else y * layer.gate_act(z))

    def _from_einsum(self, x: Tensor) -> Tensor:
        """Channels first; (B, H, W, E) -> (B, H, W, E)."""
        layer, conv = self.layer, self.layer.conv
        R, N = layer.dt_weight.shape[2], layer.A_log.shape[1]
        x = x.permute(0, 3, 1, 2).contiguous()
        x = F.silu(F.conv2d(x, conv.weight, conv.bias, padding=1, groups=x.shape[1]))
        xs = torch.stack([_walk(x, route) for route in self.routes], dim=1)  # (B, K, E, L)
        ps = torch.einsum("bkel,kce->bkcl", xs, layer.x_proj_weight)
        code, B, C = ps.split([R, N, N], dim=2)
        delta = torch.einsum("bkrl,ker->bkel", code, layer.dt_weight)
        y = self._merge(self._scan(xs, delta, B, C), x.shape[2], x.shape[3])
        return y.permute(0, 2, 3, 1).contiguous()

    def _from_linear(self, x: Tensor) -> Tensor:
        """Channels last but for the scan's own sequences; (B, H, W, E) -> (B, H, W, E)."""
        layer, conv = self.layer, self.layer.conv
        R, N = layer.dt_weight.shape[2], layer.A_log.shape[1]
        x = depthwise_conv3x3(x, conv.weight, conv.bias, "silu", backend="portable")
        p = F.linear(x, layer.x_proj_weight.flatten(0, 1)).permute(0, 3, 1, 2)
        image = x.permute(0, 3, 1, 2)  # views: the stack below is the one copy
        xs = torch.stack([_walk(image, route) for route in self.routes], dim=1)
        of_route = zip(p.chunk(len(self.routes), dim=1), self.routes, strict=True)
        ps = torch.stack([_walk(p_k, route) for p_k, route in of_route], dim=1)
        code, B, C = ps.split([R, N, N], dim=2)
        delta = torch.matmul(layer.dt_weight, code)  # (K, E, R) (B, K, R, L)
        return self._merge(self._scan(xs, delta, B, C), x.shape[1], x.shape[2]).permute(0, 2, 3, 1)

    def _scan(self, xs: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """The 1-D scan along every route: (B, K, E, L) -> the same, in the dtype that the scan took."""
        layer = self.layer
        sequences = [xs.flatten(1, 2), delta.flatten(1, 2), B, C]
        if not self.rung.low_precision:
            sequences = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in sequences]
        u, delta, B, C = (t.contiguous() for t in sequences)
        bias = layer.dt_bias.flatten()
        A = -torch.exp(layer.A_log.to(torch.promote_types(layer.A_log.dtype, torch.float32)))
        y = selective_scan(u, delta, A, B, C, layer.D, delta_bias=bias, delta_softplus=True, backend=self.rung.scan)
        return y.unflatten(1, xs.shape[1:3])

    def _merge(self, y: Tensor, height: int, width: int) -> Tensor:
        """Each route's outputs back at their pixels, added: (B, K, E, L) -> (B, E, H, W)."""
        of_route = zip(y.unbind(1), self.routes, strict=True)
        first, *others = (_at_pixels(y_k, route, height, width) for y_k, route in of_route)
        return sum(others, first)


def _walk(image: Tensor, route: Route) -> Tensor:
    """(B, C, H, W) -> (B, C, L), the pixels as the route visits them."""
    sequence = (image if route.order == "row" else image.transpose(2, 3)).flatten(2)
    return sequence.flip(2) if route.reverse else sequence


def _at_pixels(sequence: Tensor, route: Route, height: int, width: int) -> Tensor:
    """(B, C, L) as the route visits pixels -> (B, C, H, W)."""
    sequence = sequence.flip(2) if route.reverse else sequence
    if route.order == "row":
        return sequence.unflatten(2, (height, width))
    return sequence.unflatten(2, (width, height)).transpose(2, 3)


def on_rung(model: nn.Module, rung: BackendRung) -> nn.Module:
    """A copy of `model` with every SS2D computed as `rung` says; with copies of its parameters.

    Raises:
        ValueError: if it has no SS2D, or one that a rung cannot compute.
    """
    model = copy.deepcopy(model)
    layers = [(parent, name) for parent in model.modules() for name in _names_of_ss2d(parent)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SS2D: a rung is for VMamba")
    for parent, name in layers:
        setattr(parent, name, RungSS2D(getattr(parent, name), rung))
    return model


def _names_of_ss2d(module: nn.Module) -> Sequence[str]:
    return [name for name, child in module.named_children() if isinstance(child, SS2D)]
