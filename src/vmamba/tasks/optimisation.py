"""Optimiser and learning-rate schedule, the same for every task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.optim.muon import Muon
from torch import nn
from torch.distributed.tensor import DTensor

from .muon import BatchedMuon

# what a model marks as undecayed and the official VMamba code decays all the same (D is 1-D and undecayed there, too)
_OFFICIALLY_DECAYED = ("A_log", "dt_bias")


def check_optimizer(name: str) -> None:
    """Refuse what is no name of an optimiser of timm's. ValueError."""
    if name not in list_optimizers():
        raise ValueError(
            f"timm has no optimiser {name!r}; see timm.optim.list_optimizers(), for example adamw, nmuon, lamb, sgd"
        )


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
    decay_vectors: bool = False,
) -> torch.optim.Optimizer:
    """A timm optimiser over ``model``; 1-D parameters, biases and ``model.no_weight_decay()`` are not decayed.

    The Muon family (Jordan et al., 2024) orthogonalises the weights of linear layers and convolutions, but for the
    classifier's and depthwise ones; everything else, the scan's own parameters among it, takes steps of AdamW.

    Args:
        betas, eps: None for the optimiser's own; what an optimiser has no use for is left out, as timm does.
        layer_decay: factor on the learning rate for every layer (of ``model.group_matcher()``) away from the head.
        decay_ssm: decay A_log and dt_bias all the same, as the official code does.
        decay_vectors: decay 1-D parameters and biases, too, but for those of norms and ``model.no_weight_decay()``, as
            the official detection and segmentation do.

    Raises:
        ValueError: timm has no optimiser of that name, or ``layer_decay`` and ``decay_vectors`` come together.
    """
    check_optimizer(name)
    undecayed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if decay_ssm:
        undecayed = {name for name in undecayed if name.rpartition(".")[2] not in _OFFICIALLY_DECAYED}
    if layer_decay is not None and decay_vectors:
        raise ValueError("decay_vectors does not go with layer_decay, whose groups leave vectors alone: choose one")
    if layer_decay is None:
        undecayed |= _norm_parameters(model) if decay_vectors else set()
        groups = param_groups_weight_decay(
            model, weight_decay, weight_decay_exclude_1d=not decay_vectors, no_weight_decay_list=undecayed
        )
    else:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=undecayed, layer_decay=layer_decay)
        # timm leaves this to its own schedulers; ours multiplies the group's learning rate
        for group in groups:
            group["lr"] = lr * group["lr_scale"]
    extra = {name: value for name, value in (("betas", betas), ("eps", eps)) if value is not None}
    if get_optimizer_class(name, bind_defaults=False) is Muon:
        groups = _split_for_muon(model, groups)
        sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        if name in ("muon", "nmuon") and not sharded:
            return BatchedMuon(groups, lr=lr, weight_decay=weight_decay, nesterov=name == "nmuon", **extra)
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, **extra)


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let a step of Adam or AdamW on a GPU be one kernel instead of some sixty, where parameters are whole there."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and all(
        parameter.is_cuda and not isinstance(parameter, DTensor) for parameter in parameters
    ):
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False


def _split_for_muon(model: nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``groups`` with what Muon must not orthogonalise in groups of its own.

    By shape alone, as timm decides, Muon would take the scan's weights of all routes, dt_bias (K, D) and Swin's tables
    of position biases for matrices of layers.
    """
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    kept_out = set(classifier.modules()) if isinstance(classifier, nn.Module) else set()
    matrices = {
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[1] > 1 and module not in kept_out
    }
    split = []
    for group in groups:
        rest = {key: value for key, value in group.items() if key != "params"}
        for orthogonal in (True, False):
            params = [p for p in group["params"] if (p in matrices) == orthogonal]
            if params:
                split.append({**rest, "params": params, "use_fallback": not orthogonal})
    return split


def _norm_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters of all norms, batch norms to layer norms, whatever their class is called in full."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }


def warmup_cosine(step: int, *, steps: int, warmup: int, start: float, end: float) -> float:
    """Factor on the base learning rate at optimiser step ``step`` (from 0) of ``steps``.

    Rises linearly from ``start`` to 1 over the first ``warmup`` steps, then falls as half a cosine to ``end``, which
    is reached when all steps are done.
    """
    if step < warmup:
        return _warming(step, warmup, start)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * _progress(step, steps, warmup)))


def warmup_polynomial(step: int, *, steps: int, warmup: int, start: float, end: float, power: float) -> float:
    """As :func:`warmup_cosine`, falling as the share of the steps that is left, to the power ``power``."""
    if step < warmup:
        return _warming(step, warmup, start)
    return end + (1 - end) * (1 - _progress(step, steps, warmup)) ** power


def warmup_steps(step: int, *, warmup: int, start: float, drops: Sequence[int], gamma: float) -> float:
    """As :func:`warmup_cosine`, multiplied by ``gamma`` from each of the steps ``drops`` on."""
    factor = _warming(step, warmup, start) if step < warmup else 1.0
    return factor * gamma ** sum(step >= drop for drop in drops)


def _warming(step: int, warmup: int, start: float) -> float:
    return start + (1 - start) * step / warmup


def _progress(step: int, steps: int, warmup: int) -> float:
    """Share of the steps after the warm-up that is done."""
    return min(1.0, (step - warmup) / max(1, steps - warmup))
