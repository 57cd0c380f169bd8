"""Muon with few launches: all matrices of one shape are orthogonalised together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from timm.optim.muon import _COEFFICIENTS as COEFFICIENTS
from timm.optim.muon import Muon, get_lr_scale, resolve_ns_coefficients, zeropower_via_newtonschulz
from torch import Tensor

__all__ = ["BatchedMuon"]


class BatchedMuon(Muon):
    """timm's Muon (Jordan et al., 2024), the same but for rounding, in a quarter of the launches.

    timm orthogonalises one matrix after another in 25 launches each, 1,500 a step for the 61 matrices of VMamba-T,
    which have 17 shapes: more than all the rest of a step that is a CUDA graph. Here every shape takes those 25 once.
    A step needs the memory of all matrices once more, and that of the largest shape's a few times in bf16.

    Every group says with ``use_fallback`` whether its parameters are matrices (2-D, or weights of convolutions, which
    count as (out, rest)) or take steps of AdamW. States are named as in timm's: a checkpoint of one serves the other.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change all parameters that have a gradient; ``closure`` computes the gradients, its result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        everything = self.param_groups
        for group in everything:
            if not group["use_fallback"]:
                self._orthogonal_step(group)
        self.param_groups = [group for group in everything if group["use_fallback"]]
        try:
            # without what torch wraps around the step of every class: its hooks would run twice
            inspect.unwrap(Muon.step)(self)
        finally:
            self.param_groups = everything
        return loss

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p].update(use_muon=True, momentum_buffer=torch.zeros_like(p))
        moments = [self.state[p]["momentum_buffer"] for p in params]
        gradients = [p.grad for p in params]
        torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, moments, group["momentum"]) if group["nesterov"] else moments

        of_shape: dict[tuple[int, ...], list[int]] = {}
        for i, p in enumerate(params):
            of_shape.setdefault((*p.shape, p.dtype), []).append(i)
        steps: list[Tensor] = [torch.empty(0)] * len(params)
        for members in of_shape.values():
            matrices = _orthogonal(torch.stack([updates[i].flatten(1) for i in members]), group)
            for i, matrix in zip(members, matrices, strict=True):
                steps[i] = matrix.view(params[i].shape)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, steps)


def _orthogonal(matrices: Tensor, group: dict[str, Any]) -> Tensor:
    """(n, out, in) -> the steps to take, of the same type."""
    orthogonal = zeropower_via_newtonschulz(
        matrices,
        group["ns_steps"],
        resolve_ns_coefficients(group["ns_coefficients"], COEFFICIENTS),
        eps=group["eps"],
        safety_factor=group["safety_factor"],
        scale_eps=group["scale_eps"],
    )
    factor = get_lr_scale(matrices.shape, group["adjust_lr_fn"]) if group["adjust_lr_fn"] else 1.0
    return orthogonal.to(matrices.dtype).mul_(-group["lr"] * factor)
