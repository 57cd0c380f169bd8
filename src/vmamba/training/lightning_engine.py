"""The training loop: any Task on Lightning. Imports Lightning, so import it only where training starts."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from .._files import save_tensors
from .distributed import World
from .lightning_module import TaskModule
from .machine import Machine, matrix_precision
from .recorder import Recorder


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes aside and renames; reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_tensors(checkpoint, path)


def fit(
    module: TaskModule,
    recorder: Recorder,
    train: Iterable[Any],
    val: Iterable[Any],
    machine: Machine,
    resume: Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> None:
    """Train ``module`` to the last epoch; ``resume`` is a last checkpoint to go on from.

    ``train`` and ``val`` are what :func:`~vmamba.data.training_batches` and ``evaluation_batches`` make; ``callbacks``
    are called before ``recorder``.

    Raises:
        FloatingPointError: the loss became infinite or NaN.
        OSError: a file of the run could not be written; the checkpoints before it are intact.
        Terminated: SIGTERM asked the run to stop, and a checkpoint was written.
    """
    world, config = module.world, module.config
    with _quiet(), matrix_precision(machine.precision):
        trainer = pl.Trainer(
            accelerator=machine.device,
            devices=world.local_size,
            num_nodes=world.size // world.local_size,
            strategy=_strategy(world, config.run.strategy),
            max_epochs=config.schedule.rounds,
            check_val_every_n_epoch=config.run.evaluate_every,
            # cuDNN tries its convolutions and takes the fastest, for every new size of the images
            benchmark=machine.device == "cuda" and module.task.trains_at_one_size,
            accumulate_grad_batches=config.run.accumulate,
            gradient_clip_val=config.optim.clip_norm or None,
            callbacks=[*callbacks, recorder],
            plugins=[
                AtomicCheckpointIO(),
                _precision(machine),
                # named, so that nothing else in the environment (an interactive SLURM shell) is taken for a cluster
                LightningEnvironment() if world.control is None else TorchElasticEnvironment(),
            ],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            # batch norms of the statistics of a whole step; torch has none for CPUs
            sync_batchnorm=world.control is not None and machine.device == "cuda",
            default_root_dir=recorder.run_dir,
        )
        # at every step Lightning tells all GPUs whether SIGTERM came, and waits for them; the recorder uses the CPU
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        trainer.fit(module, train, val, ckpt_path=resume, weights_only=True)


def _strategy(world: World, name: str) -> str | Strategy:
    if world.control is None:
        return "auto"
    if name == "fsdp":
        return ModelParallelStrategy(world.size, 1, save_distributed_checkpoint=False)
    return DDPStrategy(gradient_as_bucket_view=True)


def _precision(machine: Machine) -> Precision:
    name = {"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(machine.precision)
    return Precision() if name is None else MixedPrecision(name, machine.device)


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
