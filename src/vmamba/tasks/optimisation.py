"""Optimiser and learning-rate schedule, the same for every task."""

from __future__ import annotations

import math

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

# what a model marks as undecayed and the official VMamba code decays all the same (D is 1-D and undecayed there, too)
_OFFICIALLY_DECAYED = ("A_log", "dt_bias")


def make_optimizer(
    model: nn.Module,
    name: str = "adamw",
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    layer_decay: float | None = None,
    decay_ssm: bool = False,
) -> torch.optim.Optimizer:
    """A timm optimiser over ``model``; 1-D parameters, biases and ``model.no_weight_decay()`` are not decayed.

    Args:
        betas, eps: None for the optimiser's own; what an optimiser has no use for is left out, as timm does.
        layer_decay: factor on the learning rate for every layer (of ``model.group_matcher()``) away from the head.
        decay_ssm: decay A_log and dt_bias all the same, as the official code does.

    Raises:
        ValueError: timm has no optimiser of that name.
    """
    if name not in list_optimizers():
        raise ValueError(
            f"timm has no optimiser {name!r}; see timm.optim.list_optimizers(), for example adamw, lamb, sgd"
        )
    undecayed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if decay_ssm:
        undecayed = {name for name in undecayed if name.rpartition(".")[2] not in _OFFICIALLY_DECAYED}
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=undecayed)
    else:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=undecayed, layer_decay=layer_decay)
        # timm leaves this to its own schedulers; ours multiplies the group's learning rate
        for group in groups:
            group["lr"] = lr * group["lr_scale"]
    extra = {name: value for name, value in (("betas", betas), ("eps", eps)) if value is not None}
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, **extra)


def warmup_cosine(step: int, *, steps: int, warmup: int, start: float, end: float) -> float:
    """Factor on the base learning rate at optimiser step ``step`` (from 0) of ``steps``.

    Rises linearly from ``start`` to 1 over the first ``warmup`` steps, then falls as half a cosine to ``end``, which
    is reached when all steps are done.
    """
    if step < warmup:
        return start + (1 - start) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))
