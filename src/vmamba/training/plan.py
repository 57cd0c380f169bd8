"""A run on paper: its steps and learning rates, and about how much time and memory it takes. Nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .checkpoints import make_network
from .config import Config
from .job import Known
from .jobs import JOBS, open_job
from .layout import blocks_of
from .machine import choose_machine
from .progress import duration
from .schedule import Schedule

# Training images a second of one A100, batch 128, 224 px, as the VMamba authors publish them for their code
PUBLISHED_SPEED = {
    "vanilla_vmamba_tiny": 195.0,
    "vanilla_vmamba_small": 111.0,
    "vanilla_vmamba_base": 84.0,
    "vmamba_tiny_s2l5": 464.0,
    "vmamba_small_s2l15": 314.0,
    "vmamba_base_s2l15": 247.0,
    "vmamba_tiny_s1l8": 571.0,
    "vmamba_small_s1l20": 390.0,
    "vmamba_base_s1l20": 313.0,
}
PUBLISHED_SIZE = 224
# the same figure of VMamba-T[s1l8] in operations: 571 images/s, 9.7e9 a forward pass, a step being three of them
PUBLISHED_OPERATIONS = 3 * 9.69e9 * PUBLISHED_SPEED["vmamba_tiny_s1l8"]

# fp32: the weight, its gradient, two moments of Adam (Muon has one, and needs as much for the step itself)
BYTES_PER_PARAMETER, EMA_BYTES_PER_PARAMETER = 16, 4


@dataclass(frozen=True)
class Needs:
    """What one image asks of a model in training: operations of a forward pass (two per multiply-accumulate), and bytes
    kept for the backward pass, with ``constant`` bytes that do not depend on the number of images."""

    parameters: int
    operations: float
    kept: float
    constant: float


@dataclass(frozen=True)
class Plan:
    """A planned run. Rates are images a second of one process, times in seconds, memory in bytes of one process.

    ``whole``: ``needs`` are of the whole network; otherwise of its dense part, in front of heads whose work depends on
    what is in an image.
    """

    config: Config
    data: Known
    processes: int
    precision: str
    schedule: Schedule
    needs: Needs
    image_size: tuple[int, int]
    whole: bool
    rate: float
    rate_from: str

    @property
    def epoch_rates(self) -> list[float]:
        """The learning rate of the first step of every epoch."""
        steps = self.schedule.steps_per_epoch
        return [self.schedule.learning_rate(epoch * steps) for epoch in range(self.config.schedule.rounds)]

    @property
    def images_per_pass(self) -> int:
        """Images in memory at once."""
        return self.config.data.batch_size // (self.processes * self.config.run.accumulate)

    @property
    def seconds(self) -> float:
        """Training, and validation of all weights that are measured, as a third of a training step an image."""
        speed = self.processes * self.rate
        measured = 2 if self.config.run.ema_decay else 1
        trained = self.schedule.steps * self.config.data.batch_size
        return trained / speed + self.config.schedule.rounds * self.data.val * measured / (3 * speed)

    @property
    def state_bytes(self) -> int:
        """Weights, gradients, moments and moving average."""
        per_parameter = BYTES_PER_PARAMETER + (EMA_BYTES_PER_PARAMETER if self.config.run.ema_decay else 0)
        share = self.processes if self.config.run.strategy == "fsdp" else 1
        return per_parameter * self.needs.parameters // share

    @property
    def activation_bytes(self) -> float:
        """What a pass keeps for its backward."""
        return self.needs.constant + self.needs.kept * self.images_per_pass


def plan(config: Config, *, processes: int = 1, rate: float | None = None) -> Plan:
    """Work out the run that ``config`` describes on ``processes`` processes.

    The images are counted in ``data.source``; where that is the published recipe's own ("imagenet") and is not there,
    they are those of the public data set.
    ``rate`` is a measured number of training images a second of one process.

    Raises:
        FileNotFoundError, ValueError: data, model and settings do not fit together.
    """
    data, network = _data(config)
    size, parts = config.data.batch_size, processes * config.run.accumulate
    if processes < 1 or size % parts:
        raise ValueError(
            f"data.batch_size {size} does not divide into {processes} processes times run.accumulate "
            f"{config.run.accumulate}"
        )
    model = make_network(config.task, config.model.name, **network)
    # "auto" is what a GPU would do, wherever this is worked out
    precision = choose_machine("cpu", config.run.precision).precision if config.run.precision != "auto" else "bf16"
    part, image_size, least = JOBS[config.task].dense_part(model, config)
    needs = measure(part, image_size, precision, checkpointing=config.run.grad_checkpointing, least=least)
    needs = replace(needs, parameters=sum(parameter.numel() for parameter in model.parameters()))
    rate, rate_from = (rate, "as given") if rate is not None else _published_rate(config, needs)
    schedule = Schedule(config, config.schedule.steps_per_round or max(1, data.train // size))
    return Plan(config, data, processes, precision, schedule, needs, image_size, part is model, rate, rate_from)


def measure(
    model: nn.Module, image_size: int | tuple[int, int], precision: str, *, checkpointing: bool = False, least: int = 1
) -> Needs:
    """What ``model`` needs to train on images, from passes in which no number is computed (fake tensors).

    ``image_size`` is the side, or height and width; ``least`` the smallest batch that the model takes.

    Raises:
        ValueError: the model does not take images of that size.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    one, two = (_pass(model, images, size, precision, checkpointing) for images in (least, 2 * least))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Needs(parameters, (two[0] - one[0]) / least, (two[1] - one[1]) / least, max(0, 2 * one[1] - two[1]))


def _pass(
    model: nn.Module, images: int, size: tuple[int, int], precision: str, checkpointing: bool
) -> tuple[float, float]:
    """Operations, and bytes kept besides the parameters, of a forward pass."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # parameters, and the fakes that the mode puts in their places; what keeps those is counted with the weights
    parameters = list(model.parameters())
    parameters += [mode.from_tensor(parameter) for parameter in parameters]
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, torch.UntypedStorage] = {}  # storages, not tensors: a view keeps nothing more
    per_block: list[float] = []
    inputs = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    def held() -> float:
        return sum(storage.nbytes() for storage in kept.values())

    def before(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal inputs
        inputs += arguments[0].nbytes
        per_block.append(-held())

    def after(*_: object) -> None:
        per_block[-1] += held()

    hooks = (
        [
            hook
            for block in blocks_of(model)
            for hook in (block.register_forward_pre_hook(before), block.register_forward_hook(after))
        ]
        if checkpointing
        else []
    )
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    try:
        with (
            mode,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None),
            FlopCounterMode(display=False) as counter,
        ):
            model.train()(torch.empty(images, 3, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"the model does not take images of {size[0]} x {size[1]} px: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    # a checkpointed block keeps its input, and one block at a time is computed again
    total = held() - sum(per_block) + inputs + max(per_block) if per_block else held()
    return counter.get_total_flops(), total


def _data(config: Config) -> tuple[Known, dict[str, Any]]:
    """How much data there is, and the network that it takes."""
    job_class, source = JOBS[config.task], config.data.source
    known = job_class.known
    if source == known.source and not Path(source).exists():
        return known, job_class.network_for(config, known.classes)
    job = open_job(config)
    counts = {name: len(job.parts[name]) for name in ("train", "val")}
    return Known(source, source, **counts, classes=len(job.classes)), job.network


def _published_rate(config: Config, needs: Needs) -> tuple[float, str]:
    name, size = config.model.name, config.data.image_size
    published = PUBLISHED_SPEED.get(name) if config.task == "classification" else None
    if published is None or config.model.kwargs:
        rate = PUBLISHED_OPERATIONS / (3 * needs.operations)
        return rate, (
            f"guessed: {needs.operations / 1e9:.2f}e9 operations a forward pass, at the operations a second of "
            f"VMamba-T[s1l8]'s published training on an A100"
        )
    scale = (PUBLISHED_SIZE / size) ** 2
    pixels = "" if size == PUBLISHED_SIZE else f", scaled to {size} px by the number of pixels"
    return published * scale, f"published for an A100, batch 128, {PUBLISHED_SIZE} px{pixels}"


def describe(planned: Plan) -> str:
    """The plan as text: settings of the schedule, the learning rate of every epoch, time and memory and their basis."""
    config, data, schedule, needs = planned.config, planned.data, planned.schedule, planned.needs
    last = schedule.steps - 1
    where = data.name if data.name == data.source else f"{data.name} (not on this disk; its known size)"
    ema = f", moving average {config.run.ema_decay}" if config.run.ema_decay else ""
    kept = f"{needs.kept / 2**20:.1f} MiB kept an image"
    clip = f"gradient norm at most {config.optim.clip_norm}" if config.optim.clip_norm else "gradients not clipped"
    height, width = planned.image_size
    size = f"{height} px" if height == width else f"{height} x {width} px"
    rounds = f" (of {schedule.steps_per_epoch:,} steps)" if config.schedule.iterations else ""
    heads = "" if planned.whole else " before the heads"
    lines = [
        f"{config.model.name}, {needs.parameters:,} parameters, {size}, {needs.operations / 2e9:.2f} GMAC an image"
        f"{heads}",
        f"data       {where}: {data.train:,} training and {data.val:,} validation images, {data.classes:,} classes",
        f"batch      {config.data.batch_size} a step = {planned.processes} processes x {config.run.accumulate} passes "
        f"x {planned.images_per_pass} images",
        f"steps      {_steps_in_words(planned)}",
        f"schedule   warm-up over {schedule.warmup:,} steps from {schedule.learning_rate(0):.3g} to "
        f"{config.learning_rate:.3g}, then {_decay_in_words(planned)}, every step",
        f"optimiser  {config.optim.name}, weight decay {config.optim.weight_decay}, {clip}, {planned.precision}{ema}",
        "",
        f"learning rate at the first step of every epoch{rounds}:",
    ]
    cells = [f"{epoch:>4} {rate:.4e}" for epoch, rate in enumerate(planned.epoch_rates, start=1)]
    lines += ["  ".join(cells[start : start + 6]) for start in range(0, len(cells), 6)]
    lines += [
        f"     {schedule.learning_rate(last):.4e} at the last step",
        "",
        f"time       {'about' if planned.whole else 'more than'} {duration(planned.seconds)}: {planned.rate:.0f} "
        f"training images/s a process ({planned.rate_from}), validation at three times that; loading is assumed to "
        f"keep up{'' if planned.whole else ', and the heads come on top'}",
        f"memory     about {(planned.state_bytes + planned.activation_bytes) / 2**30:.1f} GiB a process: "
        f"{planned.state_bytes / 2**30:.2f} for weights, gradients, the optimiser's moments and the average, "
        f"{planned.activation_bytes / 2**30:.2f} for the backward pass ({kept}{heads}, counted in a pass without "
        f"numbers); {'working memory comes' if planned.whole else 'heads and working memory come'} on top",
    ]
    return "\n".join(lines)


def _steps_in_words(planned: Plan) -> str:
    config, schedule, images = planned.config, planned.schedule, planned.data.train
    size, epochs = config.data.batch_size, config.schedule.rounds
    if config.schedule.iterations:
        return (
            f"{schedule.steps:,}, which is {schedule.steps * size / images:.1f} times all images; validation after "
            f"every {schedule.steps_per_epoch:,}"
        )
    return (
        f"{schedule.steps_per_epoch:,} an epoch, {schedule.steps:,} in {epochs} epochs; "
        f"{images - schedule.steps_per_epoch * size:,} images of every epoch do not fill a step"
    )


def _decay_in_words(planned: Plan) -> str:
    config, schedule = planned.config.schedule, planned.schedule
    if config.shape == "steps":
        unit = "iterations" if config.iterations else "epochs"
        drops = " and ".join(str(drop) for drop in config.drops)
        return f"times {config.gamma:g} after {drops} {unit} (steps {', '.join(f'{d:,}' for d in schedule.drops)})"
    end = f"{planned.config.learning_rate * config.decay_to:.3g}"
    return f"a cosine to {end}" if config.shape == "cosine" else f"a polynomial of power {config.power:g} to {end}"
