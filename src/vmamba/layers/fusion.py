"""When a layer may run as joined operators (`vmamba.ops.inference`, `training`) in the place of its modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmamba.ops.joining import inference_dtype, training_dtype

__all__ = ["fused_dtype", "fused_training_dtype", "is_plain", "is_untouched"]


def fused_dtype(layer: nn.Module, x: Tensor) -> torch.dtype | None:
    """The dtype to compute in without gradients, or None for module by module: in training, in fp32, without kernels,
    and where somebody looks in or has put something else there: hooks, adapters, quantised or sharded weights.
    """
    if layer.training:
        return None
    dtype = inference_dtype(x)
    return dtype if dtype is not None and is_untouched(layer) else None


def fused_training_dtype(layer: nn.Module, x: Tensor) -> torch.dtype | None:
    """The dtype to compute in where gradients are recorded, or None for module by module, as above."""
    dtype = training_dtype(x)
    return dtype if dtype is not None and is_untouched(layer) else None


def is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether the module is exactly one of these classes: a subclass may compute something else."""
    return type(module) in kinds


def is_untouched(layer: nn.Module) -> bool:
    """Whether nobody looks into the layer or has put something else there: no hooks, no unusual parameters."""
    # asked at every call of a block: 15 us where `Module.modules` takes 35
    for parameter in layer._parameters.values():
        if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
            return False
    for module in layer._modules.values():
        if module is None:
            continue
        if module._forward_hooks or module._forward_pre_hooks or not is_untouched(module):
            return False
    return True
