"""Which implementation runs an operator: by where the tensor is, or as asked.

An automatic choice may fall back, and says so once; an explicit choice works or raises, listing what there is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import convolution, portable, triton_backend

__all__ = ["BACKENDS", "Backend", "BackendStatus", "backends", "choose"]


class Backend(NamedTuple):
    """One implementation of the operators. Functions take what the registered operators take (see `library`).

    unavailable: why the backend cannot run on a device (by its type, such as "cuda"), or None if it can.
    ss2d_states: shape of the states that `ss2d_forward` keeps for backward, from (x, A, routes).
    ss2d_forward: (x, p, dt_weight, dt_bias, A, D, routes, keep) -> (y, states).
    ss2d_backward: (gy, x, p, dt_weight, dt_bias, A, D, states, routes) -> the six gradients.
    scan_states: shape of the states that `scan_forward` keeps, from (u, A, B).
    scan_forward: (u, delta, A, B, C, D, delta_bias, delta_softplus, keep) -> (y, last_state, states).
    scan_backward: (gy, u, delta, A, B, C, D, delta_bias, states, delta_softplus) -> the seven gradients.
    conv_forward: (x, weight, bias, activation) -> y; torch's own unless the backend has a depthwise convolution.
    conv_backward: (gy, x, weight, bias, activation) -> gradients of x, weight and bias, contiguous or not.
    joined: a namespace of the functions of `inference.Plain` and `training`, with kernels of its own, or None.
    compile_ahead: () -> a context in which kernels are compiled, side by side, and not run; None where none are.
    """

    unavailable: Callable[[str], str | None]
    ss2d_states: Callable[[Tensor, Tensor, str], tuple[int, ...]]
    ss2d_forward: Callable[..., tuple[Tensor, Tensor]]
    ss2d_backward: Callable[..., tuple[Tensor, ...]]
    scan_states: Callable[[Tensor, Tensor, Tensor], tuple[int, ...]]
    scan_forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    scan_backward: Callable[..., tuple[Tensor, ...]]
    conv_forward: Callable[..., Tensor] = convolution.conv
    conv_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = convolution.conv_backward
    joined: Any = None
    compile_ahead: Callable[[], AbstractContextManager] | None = None


def _portable_ss2d_forward(x, p, dt_weight, dt_bias, A, D, routes, keep):
    return portable.ss2d_forward(x, p, dt_weight, dt_bias, A, D, routes), _no_states(x)


def _portable_ss2d_backward(gy, x, p, dt_weight, dt_bias, A, D, states, routes):
    return portable.ss2d_backward(gy, x, p, dt_weight, dt_bias, A, D, routes)


def _portable_scan_forward(u, delta, A, B, C, D, delta_bias, delta_softplus, keep):
    y, last_state = portable.selective_scan_forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return y, last_state, _no_states(u)


def _portable_scan_backward(gy, u, delta, A, B, C, D, delta_bias, states, delta_softplus):
    return portable.selective_scan_backward(gy, u, delta, A, B, C, D, delta_bias, delta_softplus)


def _no_states(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)


# The first available one is the automatic choice.
BACKENDS: dict[str, Backend] = {
    "triton": Backend(
        unavailable=triton_backend.unavailable,
        ss2d_states=triton_backend.ss2d_states,
        ss2d_forward=triton_backend.ss2d_forward,
        ss2d_backward=triton_backend.ss2d_backward,
        scan_states=triton_backend.scan_states,
        scan_forward=triton_backend.scan_forward,
        scan_backward=triton_backend.scan_backward,
        conv_forward=triton_backend.conv_forward,
        conv_backward=triton_backend.conv_backward,
        joined=triton_backend.Joined,
        compile_ahead=triton_backend.compile_ahead,
    ),
    "portable": Backend(
        unavailable=lambda device_type: None,
        ss2d_states=lambda x, A, routes: (0,),
        ss2d_forward=_portable_ss2d_forward,
        ss2d_backward=_portable_ss2d_backward,
        scan_states=lambda u, A, B: (0,),
        scan_forward=_portable_scan_forward,
        scan_backward=_portable_scan_backward,
    ),
}


class BackendStatus(NamedTuple):
    """What `backends` says of one backend: can it run there, is it the automatic choice, and if it cannot, why."""

    available: bool
    chosen: bool
    reason: str


def backends(device: torch.device | str = "cpu") -> dict[str, BackendStatus]:
    """What there is to run an operator on tensors on `device`, and which one an automatic choice takes.

    Args:
        device: a device or its name, "cpu" or "cuda". Nothing is allocated on it.

    Returns:
        a status for each backend by name, in order of preference. The loops of `vmamba.ops.reference` are always there
        too, as `backend="reference"`; they are never chosen.
    """
    device_type = torch.device(device).type
    chosen = choose("auto", device_type)
    statuses = {}
    for name, backend in BACKENDS.items():
        reason = backend.unavailable(device_type)
        statuses[name] = BackendStatus(reason is None, name == chosen, reason or "")
    return statuses


_said: set[tuple[str, str]] = set()


def choose(name: str, device_type: str) -> str:
    """The name of the backend that runs: the first available one for "auto", else `name` itself.

    Raises:
        ValueError: if `name` is unknown.
        RuntimeError: if the backend asked for cannot run on that device.
    """
    if name == "auto":
        passed_over = []
        for candidate, backend in BACKENDS.items():
            reason = backend.unavailable(device_type)
            if reason is None:
                # nobody expects kernels on the CPU, and nothing runs on "meta"
                if passed_over and device_type not in ("cpu", "meta") and (candidate, device_type) not in _said:
                    _said.add((candidate, device_type))
                    warnings.warn(
                        f"vmamba runs its operators on {device_type} with the slower {candidate!r} backend, because "
                        + "; ".join(passed_over),
                        stacklevel=2,
                    )
                return candidate
            passed_over.append(f"{candidate!r} cannot: {reason}")
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose 'auto', 'reference' or one of {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unavailable(device_type)
    if reason is not None:
        able = [other for other, backend in BACKENDS.items() if backend.unavailable(device_type) is None]
        raise RuntimeError(
            f"backend {name!r} cannot run on {device_type}: {reason}. Available there: {', '.join(able)}"
        )
    return name
