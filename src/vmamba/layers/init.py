"""Initialisation of the state space model inside SS2D.

Source: VMamba (arXiv 2401.10166), the ablation of initialisations ("mamba", "rand", "zero"); "mamba" is that of
Mamba (arXiv 2312.00752), section 3.6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["SSM_INITS", "init_ssm_"]

# The range that delta starts in under "mamba", and its floor.
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


def _mamba_(dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor) -> None:
    bound = dt_weight.shape[-1] ** -0.5
    nn.init.uniform_(dt_weight, -bound, bound)
    # delta = softplus(dt_bias) starts log-uniform in [DT_MIN, DT_MAX]; drawn in fp32 whatever the parameter's dtype
    dt = torch.rand(dt_bias.shape, device=dt_bias.device, dtype=torch.float32)
    dt = torch.exp(dt * (math.log(DT_MAX) - math.log(DT_MIN)) + math.log(DT_MIN)).clamp(min=DT_FLOOR)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    states = torch.arange(1, A_log.shape[1] + 1, device=A_log.device, dtype=torch.float32)
    A_log.copy_(states.log().expand_as(A_log))


def _rand_(dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor) -> None:
    nn.init.normal_(dt_weight, std=0.1)
    nn.init.normal_(dt_bias, std=0.1)
    nn.init.normal_(A_log)


def _zero_(dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor) -> None:
    nn.init.uniform_(dt_weight, 0.0, 0.1)
    nn.init.uniform_(dt_bias, 0.0, 0.1)
    nn.init.zeros_(A_log)


SSM_INITS = {"mamba": _mamba_, "rand": _rand_, "zero": _zero_}


@torch.no_grad()
def init_ssm_(
    x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, scheme: str = "mamba"
) -> None:
    """Draw the parameters of one SS2D in place, with torch's global random generator.

    Args:
        x_proj_weight: (K, R+2N, E), always drawn as `nn.Linear` draws a weight of fan-in E.
        dt_weight: (K, E, R). dt_bias: (K, E). A_log: (K*E, N). D: (K*E,), always ones.
        scheme: "mamba": delta log-uniform in [1e-3, 1e-1], A = -(1..N); "rand": A_log normal, delta's parameters
            0.1 * normal; "zero": A = -1, delta's parameters 0.1 * uniform.
    """
    bound = x_proj_weight.shape[-1] ** -0.5
    nn.init.uniform_(x_proj_weight, -bound, bound)
    SSM_INITS[scheme](dt_weight, dt_bias, A_log)
    nn.init.ones_(D)
