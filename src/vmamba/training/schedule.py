"""The learning rate of a run: a function of its config and the step alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..tasks import warmup_cosine
from .config import Config


@dataclass(frozen=True)
class Schedule:
    """Warm-up and cosine over the optimiser steps of the run that ``config`` describes."""

    config: Config
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.schedule.epochs * self.steps_per_epoch

    @property
    def warmup(self) -> int:
        """Optimiser steps of the warm-up."""
        # one longer than half the run would hardly leave time at the learning rate asked for
        return min(round(self.config.schedule.warmup_epochs * self.steps_per_epoch), self.steps // 2)

    def factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by at optimiser step ``step``, from 0."""
        schedule = self.config.schedule
        return warmup_cosine(
            step, steps=self.steps, warmup=self.warmup, start=schedule.warmup_from, end=schedule.decay_to
        )

    def learning_rate(self, step: int) -> float:
        """The learning rate at optimiser step ``step``, from 0; with layer decay that of the head."""
        return self.config.learning_rate * self.factor(step)
