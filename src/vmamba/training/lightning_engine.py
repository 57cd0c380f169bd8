"""The training loop: any Task on Lightning. Imports Lightning, so import it only where training starts."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from .._files import save_tensors
from ..data.loading import STEP_STREAM, derive_seed, seed_generators
from ..tasks import Task, make_optimizer, warmup_cosine
from .checkpoints import ABOUT, WEIGHTS, About
from .config import Config
from .metrics_file import MetricsFile

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
# a finished step's loss is looked at this many steps later at most: looking makes the CPU wait for a GPU
LOOK_EVERY = 20


class TaskModule(pl.LightningModule):
    """A model, the task it learns, and how it is optimised.

    Randomness inside a step (drop path, dropout, mixup) is seeded by the run's seed and the step, so that a resumed
    run draws what the uninterrupted one would have drawn.
    """

    def __init__(self, model: nn.Module, task: Task, config: Config, steps_per_epoch: int) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.averaged: AveragedModel | None = None
        if config.run.ema_decay:
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.run.ema_decay))
            self.averaged.requires_grad_(False)

    @property
    def model_to_use(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average of the weights where there is one."""
        return self.model if self.averaged is None else self.averaged.module

    def configure_optimizers(self) -> dict[str, Any]:
        schedule = self.config.schedule
        optimizer = optimizer_of(self.model, self.config)
        steps = schedule.epochs * self.steps_per_epoch
        # a warm-up longer than the run would never reach the learning rate asked for
        warmup = min(round(schedule.warmup_epochs * self.steps_per_epoch), steps // 2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_cosine(
                step, steps=steps, warmup=warmup, start=schedule.warmup_from, end=schedule.decay_to
            ),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_generators(derive_seed(self.config.run.seed, STEP_STREAM, self.global_step))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.task.training_loss(self.model, batch)
        self.log("loss", loss, prog_bar=True, batch_size=1)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def on_validation_epoch_start(self) -> None:
        self.scores = self.task.scores()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.scores.update(self.model_to_use, batch)


def optimizer_of(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimiser that ``config`` asks for, over ``model``."""
    optim = config.optim
    return make_optimizer(model, optim.name, lr=optim.lr, weight_decay=optim.weight_decay, betas=optim.betas)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes aside and renames; reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_tensors(checkpoint, path)


class Recorder(pl.Callback):
    """Keeps the run directory: metrics.csv, TensorBoard events, last and best checkpoint; prints a line an epoch.

    Stops the run with FloatingPointError at the first loss that is not finite, before it can reach a checkpoint.
    """

    def __init__(self, run_dir: Path, about: About, epochs: int, resumed_at: int) -> None:
        self.run_dir = run_dir
        self.about = about
        self.epochs = epochs
        self.metrics_file = MetricsFile(run_dir / "metrics.csv", keep=resumed_at)
        self.best: dict[str, float] = {}
        self._pending: list[tuple[int, float, Tensor]] = []
        self._events: SummaryWriter | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def on_train_start(self, trainer: pl.Trainer, module: TaskModule) -> None:
        self._events = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=trainer.global_step or None)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: TaskModule) -> None:
        self._started = time.perf_counter()
        self._loss_sum, self._steps = 0.0, 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: TaskModule, batch: Any, batch_idx: int) -> None:
        # the schedule moves on before the step's end is reported
        self._lr_used = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pending.append((trainer.global_step, self._lr_used, outputs["loss"].detach()))
        if len(self._pending) >= LOOK_EVERY:
            self._look()

    def on_validation_start(self, trainer: pl.Trainer, module: TaskModule) -> None:
        self._look()
        self._training_seconds = time.perf_counter() - self._started

    def on_train_epoch_end(self, trainer: pl.Trainer, module: TaskModule) -> None:
        epoch = trainer.current_epoch + 1
        metrics = module.scores.compute()
        seconds = time.perf_counter() - self._started
        images = self._steps * trainer.train_dataloader.batch_size
        row = {
            "epoch": epoch,
            "step": trainer.global_step,
            "lr": self._lr_used,
            "train_loss": self._loss_sum / self._steps,
            "val_loss": metrics["loss"],
            **{name: value for name, value in metrics.items() if name != "loss"},
            "seconds": seconds,
            "img/s": images / self._training_seconds,
        }
        self.metrics_file.append(row)
        for name, value in row.items():
            if name not in ("epoch", "step", "train_loss"):
                self._events.add_scalar(f"epoch/{name}", value, trainer.global_step)
        self._events.flush()

        # small validation sets tie often; the lower loss decides then
        def rank(m: dict[str, float]) -> tuple[float, float]:
            return (m[module.task.metric], -m["loss"])

        improved = not self.best or rank(metrics) > rank(self.best)
        if improved:
            self.best = {"epoch": epoch, **metrics}
        trainer.save_checkpoint(self.run_dir / "checkpoints" / "last.ckpt", weights_only=False)
        if improved:
            best = {WEIGHTS: module.model_to_use.state_dict(), ABOUT: self._describe(epoch, metrics)}
            save_tensors(best, self.run_dir / "checkpoints" / "best.ckpt")
        shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items() if name != "loss")
        print(
            f"epoch {epoch:>3}/{self.epochs}  lr {row['lr']:.2e}  train loss {row['train_loss']:.4f}  "
            f"val loss {metrics['loss']:.4f}  {shown}  {seconds:.1f} s{'  best' if improved else ''}",
            flush=True,
        )

    def on_save_checkpoint(self, trainer: pl.Trainer, module: TaskModule, checkpoint: dict[str, Any]) -> None:
        # shares its storage with Lightning's own copy, so it costs no space
        checkpoint[WEIGHTS] = module.model_to_use.state_dict()
        checkpoint[ABOUT] = self._describe(trainer.current_epoch + 1, module.scores.compute())

    def on_exception(self, trainer: pl.Trainer, module: TaskModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and (self.run_dir / "checkpoints" / "last.ckpt").is_file():
            print(f"\nstopped; go on with: vmamba train --resume {self.run_dir}", flush=True)

    def teardown(self, trainer: pl.Trainer, module: TaskModule, stage: str) -> None:
        if self._events is not None:
            self._events.close()

    def _describe(self, epoch: int, metrics: dict[str, float]) -> dict[str, Any]:
        return {**self.about.as_dict(), "epoch": epoch, "metrics": metrics}

    def _look(self) -> None:
        if not self._pending:
            return
        losses = torch.stack([loss for _, _, loss in self._pending]).tolist()
        for (step, lr, _), loss in zip(self._pending, losses, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the training loss became {loss} at step {step} with learning rate {lr:.3g}; the checkpoints "
                    f"written before it are good. Try a smaller optim.lr, a longer schedule.warmup_epochs, or "
                    f"run.precision=fp32"
                )
            self._events.add_scalar("step/train_loss", loss, step)
            self._events.add_scalar("step/lr", lr, step)
            self._loss_sum += loss
            self._steps += 1
        self._pending.clear()


@dataclass(frozen=True)
class Machine:
    """Where and how precisely to compute, nothing "auto" left."""

    device: str
    precision: str


def choose_machine(device: str, precision: str) -> Machine:
    """Resolve "auto": a GPU where there is one, bf16 where a GPU has it in hardware.

    Raises:
        ValueError: the device asked for is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there[device]:
        raise ValueError(f"run.device={device}: this machine has only {', '.join(n for n, t in there.items() if t)}")
    if precision == "auto":
        has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    if precision == "fp16" and device == "cpu":
        raise ValueError("run.precision=fp16 needs a GPU; use bf16 or fp32 on the CPU")
    return Machine(device, precision)


def fit(
    module: TaskModule, recorder: Recorder, train: DataLoader, val: DataLoader, machine: Machine, resume: Path | None
) -> None:
    """Train ``module`` to the last epoch; ``resume`` is a last checkpoint to go on from.

    Raises:
        FloatingPointError: the loss became infinite or NaN.
        OSError: a file of the run could not be written; the checkpoints before it are intact.
    """
    with _quiet():
        trainer = pl.Trainer(
            accelerator=machine.device,
            devices=1,
            precision=PRECISIONS[machine.precision],
            max_epochs=module.config.schedule.epochs,
            gradient_clip_val=module.config.optim.clip_norm or None,
            callbacks=[recorder, *([RichProgressBar(leave=False)] if sys.stdout.isatty() else [])],
            plugins=[AtomicCheckpointIO()],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty(),
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=recorder.run_dir,
        )
        trainer.fit(module, train, val, ckpt_path=resume, weights_only=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's start-up notes and hints about data loader workers out of the output."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*does not have many workers")
            # Lightning 2.6 asks torch >= 2.14 about a class it is about to drop
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
            yield
    finally:
        logger.setLevel(level)
