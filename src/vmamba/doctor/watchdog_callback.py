"""The watchdog as a callback of Lightning's Trainer. Imports Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._extras import require
from .watchdog import Watchdog

pl = require("lightning.pytorch", "train")

__all__ = ["WatchdogCallback"]


class WatchdogCallback(pl.Callback):
    """A :class:`~vmamba.doctor.Watchdog` over `Trainer.fit`.

    Args:
        seconds, on_stall: as of the watchdog.
        directory: where the files go; None is the trainer's `default_root_dir`, for `vmamba train` its run directory.
        resumable: whether a stop ends with the command of `vmamba train` to go on with.
    """

    def __init__(
        self, seconds: float, directory: str | Path | None = None, *, on_stall: str = "dump", resumable: bool = False
    ) -> None:
        self.directory = directory
        self.resumable = resumable
        # before any data is looked at: settings that are wrong
        self._watchdog = Watchdog(seconds, directory or ".", on_stall=on_stall)

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self.directory is None:
            self._watchdog.directory = Path(trainer.default_root_dir)
        if self.resumable:
            self._watchdog.advice = f"go on with: vmamba train --resume {self._watchdog.directory}"
        self._watchdog.start()

    def on_train_epoch_start(self, *_: Any) -> None:
        self._watchdog.mark("data")

    def on_train_batch_start(self, *_: Any) -> None:
        self._watchdog.mark("forward")

    def on_before_backward(self, *_: Any) -> None:
        self._watchdog.mark("backward")

    def on_after_backward(self, *_: Any) -> None:
        self._watchdog.mark("optimiser")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._watchdog.step()
        else:
            self._watchdog.mark("data")

    def on_validation_start(self, *_: Any) -> None:
        self._watchdog.mark("validation")

    def on_validation_batch_end(self, *_: Any) -> None:
        self._watchdog.mark("validation")

    def on_train_epoch_end(self, *_: Any) -> None:
        self._watchdog.mark("end of the epoch")

    def on_exception(self, *_: Any) -> None:
        self._watchdog.close()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._watchdog.close()
