"""Optimiser and learning-rate schedule, the same for every task."""

from __future__ import annotations

import math

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn


def make_optimizer(
    model: nn.Module,
    name: str = "adamw",
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] | None = None,
) -> torch.optim.Optimizer:
    """A timm optimiser over ``model``; 1-D parameters, biases and ``model.no_weight_decay()`` are not decayed.

    Raises:
        ValueError: timm has no optimiser of that name.
    """
    if name not in list_optimizers():
        raise ValueError(
            f"timm has no optimiser {name!r}; see timm.optim.list_optimizers(), for example adamw, lamb, sgd"
        )
    extra = {"betas": betas} if betas else {}
    return create_optimizer_v2(model, opt=name, lr=lr, weight_decay=weight_decay, **extra)


def warmup_cosine(step: int, *, steps: int, warmup: int, start: float, end: float) -> float:
    """Factor on the base learning rate at optimiser step ``step`` (from 0) of ``steps``.

    Rises linearly from ``start`` to 1 over the first ``warmup`` steps, then falls as half a cosine to ``end``, which
    is reached when all steps are done.
    """
    if step < warmup:
        return start + (1 - start) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))
