"""What a task is to the engine that trains it: a loss for a batch, and scores for a data set."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class Scores(Protocol):
    """Gathers one evaluation, batch by batch."""

    def update(self, model: nn.Module, batch: Any) -> None:
        """Run ``model`` on ``batch`` and remember what the metrics need. Call under ``torch.inference_mode``."""

    def merge(self, other: Scores) -> None:
        """Take in what ``other`` gathered on other batches, in another process for example."""

    def compute(self) -> dict[str, float]:
        """The metrics over all batches so far, "loss" among them."""


class Task(Protocol):
    """Model-independent definition of a task; batches are whatever its data loader yields.

    ``metric`` names the entry of ``Scores.compute()`` whose maximum marks the best checkpoint.
    """

    metric: str

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Scalar loss of one training batch, differentiable. May draw from the global random generators."""

    def scores(self) -> Scores:
        """Fresh scores for one evaluation."""
