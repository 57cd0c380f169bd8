"""A model, its task and its optimiser as Lightning trains them. Imports Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..data.loading import STEP_STREAM, derive_seed, seed_generators
from ..models import VMamba
from ..tasks import Scores, Task, make_optimizer
from ..tasks.optimisation import fuse
from .averaging import MovingAverage
from .config import Config
from .distributed import World
from .layout import blocks_of
from .schedule import Schedule

# the prefixes of the two sets of weights in a module's state dict, and of their metrics
WEIGHTS_PREFIX = {"": "model.", "ema_": "averaged.module."}


class TaskModule(pl.LightningModule):
    """A model, the task it learns, and how it is optimised.

    The learning rate is a function of the step alone. Randomness inside a step (drop path, dropout, mixup) is seeded by
    the run's seed, the step and the process, so that a resumed run draws what the uninterrupted one would have drawn.
    """

    def __init__(self, model: nn.Module, task: Task, config: Config, steps_per_epoch: int, world: World) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.config = config
        self.world = world
        self.schedule = Schedule(config, steps_per_epoch)
        self.updates = 0
        self.averaged = MovingAverage(model, config.run.ema_decay) if config.run.ema_decay else None
        if config.run.grad_checkpointing:
            model.set_grad_checkpointing(True)
        # in a tuple, since a module here would be in the state dict a second time; evaluation, whose batches have other
        # sizes, stays as it is
        self._trained = (compiled(model, config.run.mode),)
        self._kernels_ready = config.run.mode == "eager"

    def candidates(self) -> Iterator[tuple[str, nn.Module]]:
        """The models to evaluate, each after the prefix of its metrics: the raw one, and the average of its weights."""
        yield "", self.model
        if self.averaged is not None:
            yield "ema_", self.averaged.module

    def configure_model(self) -> None:
        if self.config.run.strategy == "fsdp" and self.world.control is not None:
            for _, model in self.candidates():
                shard(model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = optimizer_of(self.model, self.config)
        # gradients scaled for fp16 are clipped between the backward pass and the step, which a fused step is not told
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            fuse(optimizer)
        self._peak_rates = [group["lr"] for group in optimizer.param_groups]
        # a step that fp16 skips because of an overflow never gets here
        optimizer.register_step_post_hook(self._after_update)
        return optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        factor = self.schedule.factor(self.global_step)
        for group, rate in zip(self.optimizers(use_pl_optimizer=False).param_groups, self._peak_rates, strict=True):
            group["lr"] = rate * factor
        passes = self.config.run.accumulate
        number = self.global_step * passes + batch_idx % passes
        seed_generators(derive_seed(self.config.run.seed, STEP_STREAM, number, self.world.rank))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self._kernels_ready:
            self._kernels_ready = True
            self._compile_kernels(batch[0])
        loss = self.task.training_loss(self._trained[0], batch)
        self.last_loss = loss.detach()
        return loss

    def _compile_kernels(self, images: Any) -> None:
        # those of a compiled step are compiled one after another, half a minute of them
        for module in self.model.modules():
            if isinstance(module, VMamba) and isinstance(images, Tensor):
                module.compile_ahead(images)

    def fresh_scores(self) -> dict[str, Scores]:
        """Empty scores for every model to evaluate."""
        return {prefix: self.task.scores() for prefix, _ in self.candidates()}

    def on_validation_epoch_start(self) -> None:
        self.scores = self.fresh_scores()
        self._benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self._benchmark and self.task.evaluates_at_one_size
        # statistics that every process gathered for itself (batch norms on CPUs): all measure, and keep, the first's
        for _, model in self.candidates():
            self.world.copy_from_first(model.buffers())
        batches = self.trainer.num_val_batches[0]
        self._missing = self.world.most(batches) - batches

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for prefix, model in self.candidates():
            self.scores[prefix].update(model, batch)
        self._last_batch = batch

    def on_validation_epoch_end(self) -> None:
        torch.backends.cudnn.benchmark = self._benchmark
        if self.config.run.strategy == "fsdp":
            # the others have so many batches more, and to put together the weights they need every process
            for _ in range(self._missing):
                for _, model in self.candidates():
                    self.task.scores().update(model, self._last_batch)

    def _after_update(self, *_: Any) -> None:
        self.updates += 1
        if self.averaged is not None:
            self.averaged.update(self.model)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split every block's weights, and then what is left of the model, over the processes of ``mesh`` (FSDP)."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def compiled(model: nn.Module, mode: str) -> nn.Module:
    """``model`` as the training steps of ``mode`` (see :class:`~.config.RunConfig`) call it."""
    if mode == "eager":
        return model
    return torch.compile(model, dynamic=False, mode="reduce-overhead" if mode == "graphs" else None)


def optimizer_of(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimiser that ``config`` asks for, over ``model``."""
    optim = config.optim
    return make_optimizer(
        model,
        optim.name,
        lr=config.learning_rate,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        layer_decay=optim.layer_decay,
        decay_ssm=optim.decay_ssm,
        decay_vectors=optim.decay_vectors,
    )
