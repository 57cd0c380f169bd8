"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

_Pairs = tuple[list[Tensor], list[Tensor]]


class MovingAverage(nn.Module):
    """A copy of ``model`` whose weights follow the model's: decay * own + (1 - decay) * the model's, at every update.

    Buffers are the model's. It begins as the model is. (torch's AveragedModel asks the GPU at every update whether it
    is the first, and waits for the answer.)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._average = get_ema_multi_avg_fn(decay)
        self._pairs: tuple[_Pairs, _Pairs] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of ``model`` after an optimiser step."""
        if self._pairs is None:
            # found once: walking through the modules of two networks takes longer than the update
            self._pairs = _pairs(self.module, model, "parameters"), _pairs(self.module, model, "buffers")
        parameters, buffers = self._pairs
        self._average(*parameters, None)
        if buffers[0]:
            torch._foreach_copy_(*buffers)


def _pairs(own: nn.Module, theirs: nn.Module, kind: str) -> _Pairs:
    return [*getattr(own, kind)()], [*getattr(theirs, kind)()]
