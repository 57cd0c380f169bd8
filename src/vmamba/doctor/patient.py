"""A subject under examination: brought back to where it was before every probe, and aware of its time."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .position import Position
from .subject import Subject

__all__ = ["Patient"]

# a probe that can do with less uses this share of its time, so that it ends before it is ended
USED_SHARE = 0.5
SEED = 0


class Patient:
    """The subject, where it is, and what earlier probes found out.

    Attributes:
        facts: what a later probe wants to know of an earlier one, such as the seconds of a step.
    """

    def __init__(self, subject: Subject, position: Position, time_limit: float) -> None:
        self.subject = subject
        self.position = position
        self.time_limit = time_limit
        self.facts: dict[str, Any] = {}
        self._state = _copied(subject.model.state_dict())
        self._optimizer = None if subject.optimizer is None else copy.deepcopy(subject.optimizer.state_dict())
        self._began = time.monotonic()

    def begin(self) -> None:
        """Weights, optimiser and gradients as they were; the random generators at one seed; time starts anew."""
        self.restore()
        self._began = time.monotonic()

    def restore(self) -> None:
        model, optimizer = self.subject.model, self.subject.optimizer
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name in self._state:
                    tensor.copy_(self._state[name])
        for parameter in model.parameters():
            parameter.grad = None
        if optimizer is not None:
            optimizer.load_state_dict(copy.deepcopy(self._optimizer))
        self.seed()

    def seed(self) -> None:
        """The same random numbers again: a loss is then a function of the weights alone."""
        random.seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002 the global generator is the one that augmentations draw from
        torch.manual_seed(SEED)

    def has_time(self, for_another: float = 0.0) -> bool:
        """Whether a probe that could do with less may go on for so many more seconds."""
        return time.monotonic() - self._began + for_another < USED_SHARE * self.time_limit

    def step(self) -> Tensor:
        """One whole training step, plain, without hooks; returns the loss."""
        subject = self.subject
        self.position.note("forward")
        loss = subject.compute_loss()
        self.position.note("backward")
        loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        """Clip as the subject does, step the optimiser where there is one, and forget the gradients."""
        subject = self.subject
        if subject.optimizer is not None:
            self.position.note("optimiser")
            if subject.clip_norm:
                torch.nn.utils.clip_grad_norm_(subject.model.parameters(), subject.clip_norm)
            subject.optimizer.step()
        for parameter in subject.model.parameters():
            parameter.grad = None


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    # on the CPU: a model that fills the GPU has no room for a second one
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in state.items()
        if isinstance(value, Tensor) and not value.is_meta
    }
