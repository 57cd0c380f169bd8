"""A training run from its config to its report, in a directory of its own."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import __version__
from .._extras import require
from .._files import write_text
from ..data.loading import seed_generators
from ..tasks import Task
from .checkpoints import About, load_trained, read_checkpoint
from .config import Config, from_dict, read_yaml, to_yaml
from .distributed import World, join_world
from .evaluation import evaluate
from .job import PART_NAMES, Job, Share
from .jobs import open_job
from .machine import Machine, choose_machine, cpu_threads
from .report import save_resources

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    # a function, for a callback's class needs Lightning, which `train` says how to install
    MakeCallbacks = Callable[[], Sequence[Callback]]


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show.

    ``part`` says which images the metrics are of: "test" or "val". ``figures`` are the metrics in percent and what they
    are called, the most important first; ``pictures`` are files of the report by their titles; ``command`` of vmamba
    takes the checkpoint to other images, such as ``sample_images``.
    """

    run_dir: Path
    part: str
    images: int
    metrics: dict[str, float]
    figures: Mapping[str, str]
    best_epoch: int
    checkpoint: Path
    report: Path
    pictures: dict[str, Path]
    sample_images: tuple[Path, ...]
    command: str


def train(config: Config, run_dir: str | Path | None = None, *, callbacks: MakeCallbacks = tuple) -> Outcome:
    """Train a network as ``config`` says and write everything of the run under ``run_dir``.

    None is ``runs/DATA-MODEL``, numbered where that is taken. Under torchrun all its processes train one model, the
    first of them writes, and all return the same. ``callbacks`` makes further callbacks of Lightning; the trainer's
    ``default_root_dir`` is the run directory.

    Raises:
        FileExistsError: ``run_dir`` already holds something.
        FileNotFoundError, ValueError, TypeError: data, model or settings do not fit; nothing was written then.
        FloatingPointError: the loss became infinite or NaN.
        OSError: a file could not be written.
        ModuleNotFoundError: the extra ``train`` is not installed.
    """
    machine = _machine_to_train_on(config)
    with join_world(machine.device) as world:
        return _start(config, machine, world, _new_run_dir(world, config, run_dir), callbacks)


def resume(run_dir: str | Path, *, callbacks: MakeCallbacks = tuple) -> Outcome:
    """Go on with the run in ``run_dir`` from its last checkpoint; the result is that of an uninterrupted run.

    A run that was stopped before its first checkpoint starts again, one that was stopped before its report writes it.
    ``callbacks`` are those of :func:`train`.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the run is finished, or its data has changed since.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise FileNotFoundError(f"{run_dir} holds no run to resume: it has no config.yaml")
    config = from_dict(read_yaml(run_dir / "config.yaml"))
    last = run_dir / "checkpoints" / "last.ckpt"
    about = About.from_dict(read_checkpoint(last)["vmamba"]) if last.is_file() else None
    if _is_finished(config, about) and (run_dir / "report" / "summary.md").is_file():
        raise ValueError(f"the run in {run_dir} is finished: it has done its {config.schedule.rounds} epochs")
    machine = _machine_to_train_on(config)
    with join_world(machine.device) as world:
        return _go_on(config, machine, world, run_dir, about, callbacks)


@dataclass(frozen=True)
class StepParts:
    """What a training step of a run is made of; the batches are those of a pass, on the CPU or, with
    ``data.in_memory``, on the device that trains."""

    model: nn.Module
    task: Task
    batches: Iterable[Any]
    optimizer: torch.optim.Optimizer
    machine: Machine


def step_parts(config: Config) -> StepParts:
    """Make what :func:`train` would train with, in one process, and write nothing. The model is on its device.

    Raises:
        FileNotFoundError, ValueError, TypeError: data, model or settings do not fit.
    """
    from .lightning_module import optimizer_of

    machine = _machine_to_train_on(config)
    prepared = _prepare(config, machine, World(), weights=True)
    model = prepared.model.train().to(machine.device)
    if config.run.grad_checkpointing:
        model.set_grad_checkpointing(True)
    batches = prepared.job.training_batches(_share(config, World()), machine.device)
    return StepParts(model, prepared.job.task, batches, optimizer_of(model, config), machine)


def _start(config: Config, machine: Machine, world: World, run_dir: Path, callbacks: MakeCallbacks) -> Outcome:
    prepared = _prepare(config, machine, world, weights=True)
    if world.is_first:
        for folder in (run_dir, run_dir / "checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
        write_text("".join(f"{name}\n" for name in prepared.job.classes), run_dir / "classes.txt")
        # last: where it is, there is a run to resume
        write_text(to_yaml(config), run_dir / "config.yaml")
    return _fit_and_report(config, prepared, run_dir, callbacks, resume=None)


def _go_on(
    config: Config, machine: Machine, world: World, run_dir: Path, about: About | None, callbacks: MakeCallbacks
) -> Outcome:
    """``about`` is what the last checkpoint says; None where there is none."""
    prepared = _prepare(config, machine, world, weights=about is None)
    if about is not None and prepared.job.classes != about.classes:
        raise ValueError(
            f"{config.data.source} has other classes now than when the run in {run_dir} began: "
            f"{', '.join(sorted(set(prepared.job.classes) ^ set(about.classes)))}"
        )
    if world.is_first:
        for unfinished in run_dir.rglob(".*.writing-*"):  # of a process that was killed while it wrote
            unfinished.unlink()
    if _is_finished(config, about):
        return _report(config, prepared, run_dir)
    last = run_dir / "checkpoints" / "last.ckpt"
    return _fit_and_report(config, prepared, run_dir, callbacks, resume=last if about is not None else None)


def _is_finished(config: Config, about: About | None) -> bool:
    return about is not None and about.epoch >= config.schedule.rounds


def _machine_to_train_on(config: Config) -> Machine:
    for module in ("lightning.pytorch", "matplotlib.figure", "tensorboard", "rich"):
        require(module, "train")
    return choose_machine(config.run.device, config.run.precision)


def _new_run_dir(world: World, config: Config, wanted: str | Path | None) -> Path:
    """A directory that is still free, the same one in every process."""
    stem = Path("runs") / f"{Path(config.data.source).resolve().name}-{config.model.name}"
    run_dir = stem if wanted is None else Path(wanted)
    number = 1
    while wanted is None and run_dir.exists():
        number += 1
        run_dir = stem.with_name(f"{stem.name}-{number}")
    taken = run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir()))
    # the first process decides, since the directory may be on a disk that the others do not see
    run_dir, taken = world.from_first((run_dir, taken))
    if taken:
        raise FileExistsError(
            f"{run_dir} already exists: choose another directory with --out, or continue the run in it with "
            f"--resume {run_dir}"
        )
    return run_dir


@dataclass(frozen=True)
class _Prepared:
    """Everything that can fail because of a user's mistake, made before anything is written."""

    job: Job
    model: nn.Module
    machine: Machine
    world: World


def _prepare(config: Config, machine: Machine, world: World, *, weights: bool) -> _Prepared:
    from .lightning_module import optimizer_of

    job = open_job(config)
    _check_batch_size(config, world, job)
    _check_strategy(config, machine, world, job)
    job.check(_share(config, world), machine.device, world.local_size)
    seed_generators(config.run.seed)
    model = job.make_model(weights)
    if config.run.grad_checkpointing and not hasattr(model, "set_grad_checkpointing"):
        raise ValueError(f"{config.model.name} cannot do gradient checkpointing: set run.grad_checkpointing=false")
    job.try_model(model)
    optimizer_of(model, config)
    return _Prepared(job, model, machine, world)


def _share(config: Config, world: World) -> Share:
    """How many images a process takes at once, and its place."""
    return Share(config.data.batch_size // (world.size * config.run.accumulate), world.rank, world.size)


def _check_strategy(config: Config, machine: Machine, world: World, job: Job) -> None:
    if config.run.mode != "eager" and not job.task.trains_at_one_size:
        raise ValueError(
            f"run.mode={config.run.mode} needs training images of one size, which {config.task} has not: set "
            f"run.mode=eager"
        )
    if config.run.mode == "graphs" and (machine.device != "cuda" or world.size > 1):
        raise ValueError(
            f"run.mode=graphs needs CUDA and a single process, not {machine.device} with {world.size}: "
            f"set run.mode=compile"
        )
    if config.run.strategy == "fsdp" and machine.precision == "fp16":
        raise ValueError("run.strategy=fsdp does not go with fp16, whose scaler looks at whole gradients: use bf16")


def _check_batch_size(config: Config, world: World, job: Job) -> None:
    size, parts = config.data.batch_size, world.size * config.run.accumulate
    if size % parts:
        raise ValueError(
            f"data.batch_size is that of a whole step: {world.size} processes times run.accumulate "
            f"{config.run.accumulate} must divide it, and {parts} does not divide {size}"
        )
    images, val = len(job.parts["train"]), len(job.parts["val"])
    # an endless row of images fills any step
    if parts > 1 and images < size and config.schedule.iterations is None:
        raise ValueError(f"data.batch_size {size} is more than the {images} training images: make it smaller")
    if val < world.size:
        raise ValueError(f"{val} validation images are too few for {world.size} processes")


def _fit_and_report(
    config: Config, prepared: _Prepared, run_dir: Path, callbacks: MakeCallbacks, resume: Path | None
) -> Outcome:
    from .lightning_engine import fit
    from .lightning_module import TaskModule
    from .recorder import Recorder

    job, world, device = prepared.job, prepared.world, prepared.machine.device
    share = _share(config, world)
    train_batches = job.training_batches(share, device)
    val_batches = job.evaluation_batches("val", share, device)
    finished = step = 0
    if resume is not None:
        checkpoint = read_checkpoint(resume)
        finished, step = About.from_dict(checkpoint["vmamba"]).epoch, checkpoint["global_step"]
    if world.is_first:
        print(_describe(config, prepared, finished, step), f"run directory: {run_dir}", sep="\n", flush=True)
    with cpu_threads(config.run.threads):
        steps_per_epoch = len(train_batches) // config.run.accumulate
        module = TaskModule(prepared.model.train(), job.task, config, steps_per_epoch, world)
        images_per_step = config.data.batch_size
        if config.schedule.iterations is None:
            images_per_step = min(images_per_step, len(job.parts["train"]))
        recorder = Recorder(
            run_dir,
            job.fresh_about(),
            machine=prepared.machine,
            world=world,
            images_per_step=images_per_step,
            finished_epochs=finished,
        )
        fit(module, recorder, train_batches, val_batches, prepared.machine, resume, callbacks())
        return _report(config, prepared, run_dir)


def _describe(config: Config, prepared: _Prepared, finished: int, step: int) -> str:
    job, world = prepared.job, prepared.world
    parameters = sum(p.numel() for p in prepared.model.parameters())
    test = f", {len(job.parts['test'])} test images" if "test" in job.parts else ""
    processes = f" x {world.size} processes" if world.size > 1 else ""
    resumed = f", resumed in epoch {finished + 1} after step {step}" if step else ""
    schedule = config.schedule
    length = f"{schedule.iterations:,} iterations" if schedule.iterations else f"{schedule.epochs} epochs"
    return (
        f"vmamba {__version__}: {config.model.name} ({parameters / 1e6:.2f} M parameters) on {config.data.source}, "
        f"{len(job.classes)} classes, {len(job.parts['train'])} training and {len(job.parts['val'])} validation "
        f"images{test}; {job.size_in_words}, {length}, {prepared.machine.device}{processes}, "
        f"{prepared.machine.precision}{resumed}"
    )


def _report(config: Config, prepared: _Prepared, run_dir: Path) -> Outcome:
    """The first process measures the best weights and writes the report; the others wait for it."""
    outcome = _write_report(config, prepared, run_dir) if prepared.world.is_first else None
    return prepared.world.from_first(outcome)


def _write_report(config: Config, prepared: _Prepared, run_dir: Path) -> Outcome:
    from .summary import write_report

    job, machine = prepared.job, prepared.machine
    part = "test" if "test" in job.parts else "val"
    checkpoint = run_dir / "checkpoints" / "best.ckpt"
    model, about = load_trained(checkpoint)
    task = job.task_of(part)
    batches = job.evaluation_batches(part, Share(_share(config, prepared.world).batch_size))
    scores = evaluate(model, task, batches, machine.device, machine.precision)
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    pictures = job.draw(part, scores, model, folder)
    resources = folder / "resources.png"
    if save_resources(run_dir / "resources.csv", resources):  # of a watchdog
        pictures["Memory and utilisation"] = resources
    metrics = scores.compute()
    report = write_report(
        folder,
        config,
        task,
        metrics_csv=run_dir / "metrics.csv",
        result=metrics,
        result_of=PART_NAMES[part],
        images=len(job.parts[part]),
        best_epoch=about.epoch,
        averaged=about.averaged,
        hardware=_hardware(machine, prepared.world),
        pictures={path.name: title for title, path in pictures.items()},
        table=job.table(scores),
    )
    return Outcome(
        run_dir=run_dir,
        part=part,
        images=len(job.parts[part]),
        metrics=metrics,
        figures=task.figures,
        best_epoch=about.epoch,
        checkpoint=checkpoint,
        report=report,
        pictures=pictures,
        sample_images=job.image_files(part, run_dir),
        command=job.command,
    )


def _hardware(machine: Machine, world: World) -> str:
    if machine.device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        where = f"{machine.device} ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
    return f"{f'{world.size} x ' if world.size > 1 else ''}{where}, {machine.precision}"
