"""What a run writes while it trains: metrics, events, checkpoints. A Lightning callback."""

from __future__ import annotations

import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from .._files import save_tensors
from ..models.checkpoint import file_state
from .checkpoints import ABOUT, WEIGHTS, About
from .distributed import World
from .lightning_module import WEIGHTS_PREFIX, TaskModule
from .machine import Machine, peak_memory
from .metrics_file import MetricsFile
from .progress import RunProgress

# a finished step's loss is looked at this many steps later at most: looking makes the CPU wait for a GPU
LOOK_EVERY = 20
# fp16 may overflow in a step, which is then skipped; so many in a row are no accident
OVERFLOWS_IN_A_ROW = 20


class Terminated(SystemExit):
    """The run was asked to stop (SIGTERM), wrote a checkpoint and stopped. The exit status is the signal's, 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Recorder(pl.Callback):
    """Keeps the run directory: metrics.csv, TensorBoard events, last and best checkpoint; prints a line an epoch.

    Only the first process writes and prints. Checkpoints are written at the end of every epoch that is evaluated,
    every ``checkpoint_every`` steps (0: never), and when SIGTERM asks the run to stop. What this object has gathered
    since the last evaluation is in them, so that a resumed run writes the same metrics.

    Stops the run with FloatingPointError at the first loss that is not finite, before it can reach a checkpoint. Under
    fp16 such a step does not change the weights; only many in a row stop the run.
    """

    def __init__(
        self, run_dir: Path, about: About, *, machine: Machine, world: World, images_per_step: int, finished_epochs: int
    ) -> None:
        self.run_dir = run_dir
        self.about = about
        self.machine = machine
        self.world = world
        self.images_per_step = images_per_step
        self.finished_epochs = finished_epochs
        self.metrics_file = MetricsFile(run_dir / "metrics.csv", keep=finished_epochs)
        self.best: dict[str, Any] = {}
        self.last_metrics: dict[str, float] = {}
        self._reset()
        self._pending: list[tuple[int, float, Tensor]] = []
        self._passes: list[Tensor] = []
        self._overflows = self._updates = 0
        self._loss = math.nan
        self._events: SummaryWriter | None = None
        self._stop_asked = False
        self._handler: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "last_metrics": self.last_metrics,
            "loss_sum": self._loss_sum,
            "steps": self._steps,
            "skipped": self._skipped,
            "seconds": self._seconds + time.perf_counter() - self._started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
        self.last_metrics = state["last_metrics"]
        self._loss_sum, self._steps = state["loss_sum"], state["steps"]
        self._skipped, self._seconds = state["skipped"], state["seconds"]

    def on_train_start(self, trainer: pl.Trainer, module: TaskModule) -> None:
        self._started = time.perf_counter()
        self._progress = RunProgress(
            module.schedule.steps, self.images_per_step, lambda: peak_memory(self.machine.device)
        )
        if self.world.is_first:
            purge = trainer.global_step + 1 if trainer.global_step else None
            self._events = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge)
            self._progress.start(trainer.global_step)
        # Lightning's own handler talks to the other processes in the middle of whatever they are doing
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._ask_to_stop)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: TaskModule) -> None:
        if trainer.current_epoch % trainer.check_val_every_n_epoch == 0:
            self._reset()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._passes.append(module.last_loss)
        if len(self._passes) < trainer.accumulate_grad_batches:
            return
        loss = self._passes[0] if len(self._passes) == 1 else torch.stack(self._passes).mean()
        self._passes.clear()
        self._skipped += module.updates == self._updates
        self._updates = module.updates
        self._lr = module.schedule.learning_rate(trainer.global_step - 1)
        self._pending.append((trainer.global_step, self._lr, loss))
        if len(self._pending) >= LOOK_EVERY or trainer.global_step == 1:
            self._look()
        if self.world.is_first:
            self._progress.update(trainer.global_step, trainer.current_epoch + 1, self._loss, self._lr)
        # after the last step of an epoch the checkpoint waits for its end, and for its validation if there is one
        if batch_idx + 1 < trainer.num_training_batches:
            self._save_when_due(trainer, module)

    def on_validation_start(self, trainer: pl.Trainer, module: TaskModule) -> None:
        self._look()
        self._training_seconds = self._seconds + time.perf_counter() - self._started

    def on_train_epoch_end(self, trainer: pl.Trainer, module: TaskModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % trainer.check_val_every_n_epoch:
            self.finished_epochs = epoch
            self._save_when_due(trainer, module)
            return
        scores = {prefix: self.world.merge(found) for prefix, found in module.scores.items()}
        metrics = {prefix: found.compute() for prefix, found in scores.items()}
        seconds = self._seconds + time.perf_counter() - self._started
        steps = trainer.global_step // epoch * trainer.check_val_every_n_epoch
        row = {
            "epoch": epoch,
            "step": trainer.global_step,
            "lr": self._lr,
            "train_loss": self._loss_sum / self._steps if self._steps else math.nan,
            **_flat(metrics),
            "seconds": seconds,
            "img/s": self.images_per_step * steps / self._training_seconds,
        }
        if self.machine.precision == "fp16":
            row["skipped_steps"] = self._skipped
        memory = peak_memory(self.machine.device)
        if memory is not None:
            row["memory_gib"] = memory
        self.last_metrics = {name: row[name] for name in _flat(metrics)}
        self.finished_epochs = epoch

        # small validation sets tie often; the lower loss decides then. A metric is NaN where there is nothing to find
        def rank(m: dict[str, float]) -> tuple[float, float]:
            ranks = (m[module.task.metric], -m.get("loss", 0.0))
            return tuple(value if math.isfinite(value) else -math.inf for value in ranks)

        prefix = max(metrics, key=lambda name: rank(metrics[name]))
        improved = not self.best or rank(metrics[prefix]) > rank(self.best["metrics"])
        if improved:
            self.best = {"epoch": epoch, "averaged": prefix == "ema_", "metrics": metrics[prefix]}
        self._write_epoch(trainer, row, improved)
        losses = [f"{name.replace('_', ' ')} {row[name]:.4f}" for name in ("train_loss", "val_loss") if name in row]
        own = set(module.task.chart.curves)
        shown = "  ".join(
            [*losses, *(f"{name} {row[name]:.2f}" for name in _flat(metrics) if name.removeprefix("ema_") in own)]
        )
        if self.world.is_first:
            self._progress.print(
                f"epoch {epoch:>3}/{trainer.max_epochs}  lr {row['lr']:.2e}  {shown}  {seconds:.1f} s"
                f"{'  best' if improved else ''}"
            )
        if self.world.any(self._stop_asked) and epoch < trainer.max_epochs:
            self._stop(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: TaskModule, checkpoint: dict[str, Any]) -> None:
        # shares its storage with Lightning's own copy, so it costs no space
        prefix = "" if module.averaged is None else "ema_"
        checkpoint[WEIGHTS] = _weights(module, checkpoint["state_dict"], prefix)
        metrics = {
            name.removeprefix(prefix).removeprefix("val_"): value
            for name, value in self.last_metrics.items()
            if name.startswith("ema_") == bool(prefix)
        }
        checkpoint[ABOUT] = self._describe(self.finished_epochs, metrics, averaged=bool(prefix))

    def on_train_end(self, trainer: pl.Trainer, module: TaskModule) -> None:
        # asked to stop since the last step: the report, another pass over the images, is for a resume
        if self.world.any(self._stop_asked):
            self._stop(trainer)

    def on_exception(self, trainer: pl.Trainer, module: TaskModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and self.world.is_first:
            print(f"\nstopped; go on with: vmamba train --resume {self.run_dir}", flush=True)

    def teardown(self, trainer: pl.Trainer, module: TaskModule, stage: str) -> None:
        if self._events is not None:
            self._events.close()
            self._progress.stop()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def _save_when_due(self, trainer: pl.Trainer, module: TaskModule) -> None:
        """Between evaluations: every ``checkpoint_every`` steps, and when the run is asked to stop."""
        stop = self.world.any(self._stop_asked)
        every = module.config.run.checkpoint_every
        if stop or (every and trainer.global_step % every == 0):
            self._look()
            self._save_last(trainer)
            if stop:
                self._stop(trainer)

    def _ask_to_stop(self, *_: Any) -> None:
        self._stop_asked = True

    def _stop(self, trainer: pl.Trainer) -> None:
        if self.world.is_first:
            self._progress.stop()
            print(
                f"stopped by SIGTERM after step {trainer.global_step}, checkpoint written; go on with: "
                f"vmamba train --resume {self.run_dir}",
                flush=True,
            )
        raise Terminated

    def _write_epoch(self, trainer: pl.Trainer, row: dict[str, float], improved: bool) -> None:
        """The row, the best checkpoint, then the last: killed in between, a resume from the last writes all again."""
        if self.world.is_first:
            self.metrics_file.append(row)
            for name, value in row.items():
                if name not in ("epoch", "step", "train_loss"):
                    self._events.add_scalar(f"epoch/{name}", value, trainer.global_step)
        if improved:
            state = trainer.strategy.lightning_module_state_dict()
            averaged = self.best["averaged"]
            best = {
                WEIGHTS: _weights(trainer.lightning_module, state, "ema_" if averaged else ""),
                ABOUT: self._describe(self.best["epoch"], self.best["metrics"], averaged),
            }
            if self.world.is_first:
                save_tensors(best, self.run_dir / "checkpoints" / "best.ckpt")
        self._save_last(trainer)

    def _save_last(self, trainer: pl.Trainer) -> None:
        if self._events is not None:
            self._events.flush()
        trainer.save_checkpoint(self.run_dir / "checkpoints" / "last.ckpt", weights_only=False)

    def _describe(self, epoch: int, metrics: dict[str, float], averaged: bool) -> dict[str, Any]:
        return {**self.about.as_dict(), "epoch": epoch, "metrics": metrics, "averaged": averaged}

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._seconds = self._loss_sum = 0.0
        self._steps = self._skipped = 0

    def _look(self) -> None:
        if not self._pending:
            return
        losses = self.world.mean(torch.stack([loss for _, _, loss in self._pending])).tolist()
        for (step, lr, _), loss in zip(self._pending, losses, strict=True):
            if self._events is not None:
                self._events.add_scalar("step/train_loss", loss, step)
                self._events.add_scalar("step/lr", lr, step)
            if math.isfinite(loss):
                self._overflows = 0
                self._loss = loss
                self._loss_sum += loss
                self._steps += 1
                continue
            self._overflows += 1
            if self.machine.precision != "fp16" or self._overflows >= OVERFLOWS_IN_A_ROW:
                raise FloatingPointError(
                    f"the training loss became {loss} at step {step} with learning rate {lr:.3g}; the checkpoints "
                    f"written before it are good. Try a smaller optim.lr, a longer schedule.warmup_epochs, or "
                    f"run.precision=fp32"
                )
        self._pending.clear()


def _weights(module: TaskModule, state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One of a module's sets of weights, under the names that files of weights have."""
    start = WEIGHTS_PREFIX[prefix]
    own = {name.removeprefix(start): tensor for name, tensor in state_dict.items() if name.startswith(start)}
    return file_state(module.model, own)


def _flat(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """``{"": {"loss": ..}, "ema_": ..}`` as ``{"val_loss": .., "ema_val_loss": ..}``, metrics other than loss plain."""
    return {
        f"{prefix}{'val_loss' if name == 'loss' else name}": value
        for prefix, found in metrics.items()
        for name, value in found.items()
    }
