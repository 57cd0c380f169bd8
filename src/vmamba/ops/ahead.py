"""Compiling the kernels of a network's first step side by side, before it.

A kernel is compiled when it is first launched, so the first step of a network compiles its thirty kernels one after
another (a training step its forty). Which they are is decided where they are launched, by shapes, dtypes and the
device; so the step is gone through once before: what our kernels would compute is left as memory lies, and they are
compiled side by side meanwhile. Numbers, whatever they are, decide nothing, and all of them are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from .dispatch import BACKENDS, choose
from .library import is_transformed

__all__ = ["compile_ahead", "first_step"]

_seen: set[tuple] = set()


def first_step(kind: Hashable, x: Tensor) -> tuple | None:
    """What `compile_ahead` is to know a step of that kind on x by, if it is the first and may be gone through ahead.

    kind: what the network is and how it runs. What x (B, C, H, W) is, autocast and whether gradients are recorded are
    added, and of sizes the power of two: images one by one take other kernels than many, those of 256 pixels nearly
    the same as those of 224.
    """
    device = x.device.type
    # who traces would take in what is thrown away here; torch.compile meets operators and no kernel
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if BACKENDS[choose("auto", device)].compile_ahead is None:
        return None
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    sizes = tuple(shape.numel().bit_length() for shape in (x.shape[:1], x.shape[2:]))
    kind = (kind, sizes, x.device, x.dtype, autocast, torch.is_grad_enabled())
    if kind in _seen:
        return None
    # and so would these
    if (
        type(x) is not Tensor
        or is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.is_anomaly_enabled()
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    return kind


def compile_ahead(known: tuple, step: Callable[[], Tensor], x: Tensor, parameters: Iterable[Tensor]) -> None:
    """Compile what `step` launches, and what the gradients of `parameters` take where they are recorded.

    Random numbers are drawn as if nothing had happened, and no gradient is kept. `step` must have no other effects.
    `known` is from `first_step`; the next step of its kind is no longer the first.
    """
    _seen.add(known)
    devices = [] if x.device.index is None else [x.device.index]
    context = BACKENDS[choose("auto", x.device.type)].compile_ahead
    # what goes wrong here goes wrong in the step itself, which says it better
    with suppress(Exception), torch.random.fork_rng(devices, device_type=x.device.type), context():
        y = step()
        if y.requires_grad:
            inputs = [p for p in parameters if p.requires_grad]
            # in this thread, which the context is for
            with torch.autograd.set_multithreading_enabled(False):
                torch.autograd.grad(y, inputs, torch.empty_like(y), allow_unused=True)
