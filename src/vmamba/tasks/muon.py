"""Muon with few launches: all matrices of one shape are orthogonalised together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.optim.muon import _COEFFICIENTS as COEFFICIENTS
from timm.optim.muon import Muon, get_lr_scale, resolve_ns_coefficients, zeropower_via_newtonschulz
from torch import Tensor

__all__ = ["BatchedMuon"]

# of a parameter group: what the orthogonal matrices depend on
_SETTINGS = ("ns_steps", "ns_coefficients", "eps", "safety_factor", "scale_eps", "adjust_lr_fn")


class BatchedMuon(Muon):
    """timm's Muon (Jordan et al., 2024), the same but for rounding, in a few launches.

    timm orthogonalises one matrix after another in 25 launches each, 1,500 a step for the 61 matrices of VMamba-T,
    which have 17 shapes: more than all the rest of a step that is a CUDA graph. Here every shape takes those 25 once,
    and on a GPU all shapes together are one CUDA graph from the second step on. A step needs the memory of all matrices
    once more, the graph three times, and that of the largest shape a few times in bf16.

    Every group says with ``use_fallback`` whether its parameters are matrices (2-D, or weights of convolutions, which
    count as (out, rest)) or take steps of AdamW. States are named as in timm's: a checkpoint of one serves the other.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # what is orthogonalised, and how -> nothing after the first time, then its graph
        self._graphs: dict[tuple, _Graph | None] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._graphs = {}

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
        steps = self._steps(updates, group)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, steps, alpha=-group["lr"])

    def _steps(self, updates: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """`_orthogonal` of the updates, by a graph where there is one."""
        devices = {u.device for u in updates}
        if len(devices) > 1 or not updates[0].is_cuda or torch.cuda.is_current_stream_capturing():
            return _orthogonal(updates, group)
        key = (*devices, *((u.shape, u.dtype) for u in updates), *(str(group[name]) for name in _SETTINGS))
        if key not in self._graphs:
            self._graphs[key] = None  # the first time cuBLAS makes its workspaces, which is not for a graph
            return _orthogonal(updates, group)
        graph = self._graphs[key] = self._graphs[key] or _Graph(updates, group)
        return graph(updates)


class _Graph:
    """`_orthogonal` for updates of given shapes on one GPU as a CUDA graph."""

    def __init__(self, updates: Sequence[Tensor], group: dict[str, Any]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._updates = [torch.empty_like(u) for u in updates]
        # other threads, such as those of a data loader, may use the GPU meanwhile
        with torch.cuda.device(updates[0].device), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._steps = _orthogonal(self._updates, group)

    def __call__(self, updates: Sequence[Tensor]) -> list[Tensor]:
        torch._foreach_copy_(self._updates, updates)
        self._graph.replay()
        return self._steps


def _orthogonal(updates: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Each update as an orthogonal matrix times its factor on the learning rate, in its own shape and type."""
    of_shape: dict[tuple, list[int]] = {}
    for i, update in enumerate(updates):
        of_shape.setdefault((*update.shape, update.dtype), []).append(i)
    steps: list[Tensor] = [torch.empty(0)] * len(updates)
    for members in of_shape.values():
        matrices = torch.stack([updates[i].flatten(1) for i in members])
        orthogonal = zeropower_via_newtonschulz(
            matrices,
            group["ns_steps"],
            resolve_ns_coefficients(group["ns_coefficients"], COEFFICIENTS),
            eps=group["eps"],
            safety_factor=group["safety_factor"],
            scale_eps=group["scale_eps"],
        )
        factor = get_lr_scale(matrices.shape, group["adjust_lr_fn"]) if group["adjust_lr_fn"] else 1.0
        for i, matrix in zip(members, orthogonal.to(matrices.dtype).mul_(factor), strict=True):
            steps[i] = matrix.view(updates[i].shape)
    return steps
