"""The learning rate of a run: a function of its config and the step alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..tasks import warmup_cosine, warmup_polynomial, warmup_steps
from .config import Config


@dataclass(frozen=True)
class Schedule:
    """Warm-up and decay over the optimiser steps of the run that ``config`` describes."""

    config: Config
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.schedule.rounds * self.steps_per_epoch

    @property
    def warmup(self) -> int:
        """Optimiser steps of the warm-up."""
        schedule = self.config.schedule
        wanted = schedule.warmup_iterations
        if wanted is None:
            wanted = round(schedule.warmup_epochs * self.steps_per_epoch)
        # one longer than half the run would hardly leave time at the learning rate asked for
        return min(wanted, self.steps // 2)

    @property
    def drops(self) -> tuple[int, ...]:
        """Optimiser steps, from 0, from which a rate that falls in steps is lower."""
        schedule = self.config.schedule
        unit = 1 if schedule.iterations else self.steps_per_epoch
        return tuple(drop * unit for drop in schedule.drops)

    def factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by at optimiser step ``step``, from 0."""
        schedule = self.config.schedule
        warming = {"warmup": self.warmup, "start": schedule.warmup_from}
        if schedule.shape == "steps":
            return warmup_steps(step, drops=self.drops, gamma=schedule.gamma, **warming)
        if schedule.shape == "poly":
            return warmup_polynomial(step, steps=self.steps, end=schedule.decay_to, power=schedule.power, **warming)
        return warmup_cosine(step, steps=self.steps, end=schedule.decay_to, **warming)

    def learning_rate(self, step: int) -> float:
        """The learning rate at optimiser step ``step``, from 0; with layer decay that of the head."""
        return self.config.learning_rate * self.factor(step)
