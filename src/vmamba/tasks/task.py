"""What a task is to the engine that trains it: a loss for a batch, and scores for a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Scores(Protocol):
    """Gathers one evaluation, batch by batch."""

    def update(self, model: nn.Module, batch: Any) -> None:
        """Run ``model`` on ``batch`` and remember what the metrics need. Call under ``torch.inference_mode``."""

    def merge(self, other: Scores) -> None:
        """Take in what ``other`` gathered on other batches, in another process for example."""

    def compute(self) -> dict[str, float]:
        """The metrics over all batches so far; "loss" among them where evaluation measures one."""


class Chart(NamedTuple):
    """A picture of metrics over the epochs: its file, its title, what its axis says, and ``{metric: curve's name}``."""

    file: str
    title: str
    axis: str
    curves: Mapping[str, str]


class Task(Protocol):
    """Model-independent definition of a task; batches are whatever its data loader yields.

    ``metric`` names the entry of ``Scores.compute()`` whose maximum marks the best checkpoint. ``figures`` are the
    entries in percent that a report shows and what to call them, the first one first; ``chart`` is their picture;
    ``loss_axis`` says what the loss is and its unit. ``trains_at_one_size``: all training images have one size, so that
    it pays to compile for it; ``evaluates_at_one_size`` likewise.
    """

    metric: str
    figures: Mapping[str, str]
    chart: Chart
    loss_axis: str
    trains_at_one_size: bool
    evaluates_at_one_size: bool

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Scalar loss of one training batch, differentiable. May draw from the global random generators."""

    def scores(self) -> Scores:
        """Fresh scores for one evaluation."""
