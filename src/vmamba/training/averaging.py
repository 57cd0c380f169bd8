"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage(nn.Module):
    """A copy of ``model`` whose weights follow the model's: decay * own + (1 - decay) * the model's, at every update.

    Buffers are the model's. It begins as the model is. (torch's AveragedModel asks the GPU at every update whether it
    is the first, and waits for the answer.)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of ``model`` after an optimiser step."""
        self._average(list(self.module.parameters()), list(model.parameters()), None)
        for own, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(theirs)
