"""SS2D as a module: projections, depthwise convolution, the 2-D selective scan, norm and gate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vmamba.ops import ROUTES, ss2d
from vmamba.ops.inference import depthwise_silu, linear_residual, norm_linear, ss2d_norm, ss2d_residual

from .act import ACTIVATIONS
from .conv import ConvNHWC, DepthwiseConv3x3SiLU
from .fusion import is_plain
from .init import init_ssm_
from .norm import SSM_OUT_NORMS, BranchNorm

__all__ = ["SS2D"]

ROUTE_COUNT = 4  # K


class SS2D(nn.Module):
    """2-D selective scan, (B, H, W, C) -> (B, H, W, C).

        x = act(conv(in_proj(x)));  y = out_act(out_norm(scan(x)));  out = out_proj(y)

    With `gate`, in_proj gives 2E channels: x and z, and y * act(z) goes to out_proj.

    Source: VMamba (arXiv 2401.10166), section 4.2 and figure 3.

    Args:
        dim: C.
        d_state: N.
        dt_rank: R, or "auto" for ceil(C / 16).
        ssm_ratio: E = int(ssm_ratio * C).
        conv: kernel size of the depthwise convolution, odd; 0 for none.
        conv_bias: whether it has a bias.
        act: activation after it and of the gate, a key of `ACTIVATIONS`.
        gate: whether there is a gate. gate_act: whether it is activated.
        out_norm: a key of `SSM_OUT_NORMS`. out_act: whether GELU follows it.
        routes: a key of `vmamba.ops.ROUTES`, or "cascade2d".
        init: a key of `SSM_INITS`.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 1,
        dt_rank: int | str = "auto",
        ssm_ratio: float = 1.0,
        conv: int = 3,
        conv_bias: bool = False,
        act: str = "silu",
        gate: bool = False,
        gate_act: bool = True,
        out_norm: str = "layernorm",
        out_act: bool = False,
        routes: str = "cross2d",
        init: str = "mamba",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        E, N, K = int(ssm_ratio * dim), d_state, ROUTE_COUNT
        R = math.ceil(dim / 16) if dt_rank == "auto" else dt_rank
        self.gate, self.routes, self.init = gate, routes, init
        self.in_proj = nn.Linear(dim, 2 * E if gate else E, bias=False, **dd)
        if conv == 3 and act == "silu":  # every released model
            self.conv, self.act = DepthwiseConv3x3SiLU(E, conv_bias, **dd), nn.Identity()
        else:
            depthwise = {"padding": conv // 2, "groups": E, "bias": conv_bias}
            self.conv = ConvNHWC(E, E, conv, **depthwise, **dd) if conv else nn.Identity()
            self.act = ACTIVATIONS[act]()
        self.gate_act = ACTIVATIONS[act]() if gate and gate_act else nn.Identity()
        self.x_proj_weight = nn.Parameter(torch.empty(K, R + 2 * N, E, **dd))
        self.dt_weight = nn.Parameter(torch.empty(K, E, R, **dd))
        self.dt_bias = nn.Parameter(torch.empty(K, E, **dd))
        self.A_log = nn.Parameter(torch.empty(K * E, N, **dd))
        self.D = nn.Parameter(torch.empty(K * E, **dd))
        self.out_norm = SSM_OUT_NORMS[out_norm](E, **dd)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = nn.Linear(E, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the state space model's own parameters again; the projections are left to whoever owns the network."""
        init_ssm_(self.x_proj_weight, self.dt_weight, self.dt_bias, self.A_log, self.D, self.init)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        x = self.act(self.conv(x))
        y = ss2d(x, self.x_proj_weight, self.dt_weight, self.dt_bias, self._A(), self.D, routes=self.routes)
        y = self.out_act(self.out_norm(y))
        if self.gate:
            y = y * self.gate_act(z)
        return self.out_proj(y)

    def _A(self) -> Tensor:
        # fp32 (or better) under half precision: exp of a rounded A_log would move every time constant
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def is_usual(self) -> bool:
        """Whether `forward_residual` computes what this module is."""
        return (
            self.routes in ROUTES
            and is_plain(self.conv, DepthwiseConv3x3SiLU)
            and is_plain(self.act, nn.Identity)
            and is_plain(self.out_norm, BranchNorm)
            and is_plain(self.out_act, nn.Identity)
            and is_plain(self.in_proj, nn.Linear)
            and is_plain(self.out_proj, nn.Linear)
        )

    def forward_residual(self, x: Tensor, norm: BranchNorm, dtype: torch.dtype) -> Tensor:
        """x + self(norm(x)) in x's dtype, computed in `dtype` by joined operators, which have no gradients."""
        h = norm_linear(x, norm.weight, norm.bias, norm.eps, self.in_proj.weight, self.in_proj.bias, dtype)
        if self.gate:
            h, z = h.chunk(2, dim=-1)
        norm, out = self.out_norm, self.out_proj
        weights = (self.x_proj_weight, self.dt_weight, self.dt_bias, self.A_log, self.D, self.routes)
        scan = (depthwise_silu(h, self.conv.weight, self.conv.bias), *weights, norm.weight, norm.bias, norm.eps)
        if self.gate:
            return linear_residual(ss2d_norm(*scan) * self.gate_act(z), out.weight, out.bias, x)
        return ss2d_residual(*scan, out.weight, out.bias, x)
