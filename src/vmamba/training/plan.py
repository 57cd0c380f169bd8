"""A run on paper: its steps and learning rates, and about how much time and memory it takes. Nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..data import open_source
from .checkpoints import make_model
from .config import Config
from .layout import blocks_of
from .machine import choose_machine
from .progress import duration
from .recipes import imagenet
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

# fp32: the weight, its gradient, two moments of Adam
BYTES_PER_PARAMETER, EMA_BYTES_PER_PARAMETER = 16, 4


@dataclass(frozen=True)
class Data:
    """How many images of how many classes there are to train on."""

    train: int
    val: int
    classes: int
    known: bool = True


IMAGENET_1K = Data(train=1_281_167, val=50_000, classes=1000, known=False)


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
    """A planned run. Rates are images a second of one process, times in seconds, memory in bytes of one process."""

    config: Config
    data: Data
    processes: int
    precision: str
    schedule: Schedule
    needs: Needs
    rate: float
    rate_from: str

    @property
    def epoch_rates(self) -> list[float]:
        """The learning rate of the first step of every epoch."""
        steps = self.schedule.steps_per_epoch
        return [self.schedule.learning_rate(epoch * steps) for epoch in range(self.config.schedule.epochs)]

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
        return trained / speed + self.config.schedule.epochs * self.data.val * measured / (3 * speed)

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

    The images are counted in ``data.source``; where the recipe's own "imagenet" is not there, they are ImageNet-1K's.
    ``rate`` is a measured number of training images a second of one process.

    Raises:
        FileNotFoundError, ValueError: data, model and settings do not fit together.
    """
    data = _data(config)
    size, parts = config.data.batch_size, processes * config.run.accumulate
    if processes < 1 or size % parts:
        raise ValueError(
            f"data.batch_size {size} does not divide into {processes} processes times run.accumulate "
            f"{config.run.accumulate}"
        )
    kwargs = {**config.model.kwargs, "num_classes": data.classes}
    if config.model.drop_path is not None:
        kwargs["drop_path_rate"] = config.model.drop_path
    model = make_model(config.model.name, **kwargs)
    # "auto" is what a GPU would do, wherever this is worked out
    precision = choose_machine("cpu", config.run.precision).precision if config.run.precision != "auto" else "bf16"
    needs = measure(model, config.data.image_size, precision, checkpointing=config.run.grad_checkpointing)
    rate, rate_from = (rate, "as given") if rate is not None else _published_rate(config, needs)
    schedule = Schedule(config, max(1, data.train // size))
    return Plan(config, data, processes, precision, schedule, needs, rate, rate_from)


def measure(model: nn.Module, image_size: int, precision: str, *, checkpointing: bool = False) -> Needs:
    """What ``model`` needs to train on square images, from passes in which no number is computed (fake tensors).

    Raises:
        ValueError: the model does not take images of that size.
    """
    one, two = (_pass(model, images, image_size, precision, checkpointing) for images in (1, 2))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Needs(parameters, two[0] - one[0], two[1] - one[1], max(0, 2 * one[1] - two[1]))


def _pass(model: nn.Module, images: int, size: int, precision: str, checkpointing: bool) -> tuple[float, float]:
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
            model.train()(torch.empty(images, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"the model does not take images of {size} x {size} px: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    # a checkpointed block keeps its input, and one block at a time is computed again
    total = held() - sum(per_block) + inputs + max(per_block) if per_block else held()
    return counter.get_total_flops(), total


def _data(config: Config) -> Data:
    source = config.data.source
    if source == imagenet().data.source and not Path(source).exists():
        return IMAGENET_1K
    splits = open_source(
        source,
        val_fraction=config.data.val_fraction,
        split_seed=config.data.split_seed,
        on_unreadable=config.data.on_unreadable,
    )
    return Data(len(splits.train), len(splits.val), len(splits.classes))


def _published_rate(config: Config, needs: Needs) -> tuple[float, str]:
    name, size = config.model.name, config.data.image_size
    published = PUBLISHED_SPEED.get(name)
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
    peak, last = config.learning_rate, schedule.steps - 1
    where = config.data.source if data.known else "ImageNet-1K (not on this disk; its known size)"
    ema = f", moving average {config.run.ema_decay}" if config.run.ema_decay else ""
    kept = f"{needs.kept / 2**20:.1f} MiB kept an image"
    lines = [
        f"{config.model.name}, {needs.parameters:,} parameters, {config.data.image_size} px, "
        f"{needs.operations / 2e9:.2f} GMAC an image",
        f"data       {where}: {data.train:,} training and {data.val:,} validation images, {data.classes:,} classes",
        f"batch      {config.data.batch_size} a step = {planned.processes} processes x {config.run.accumulate} passes "
        f"x {planned.images_per_pass} images",
        f"steps      {schedule.steps_per_epoch:,} an epoch, {schedule.steps:,} in {config.schedule.epochs} epochs; "
        f"{data.train - schedule.steps_per_epoch * config.data.batch_size:,} images of every epoch do not fill a step",
        f"schedule   warm-up over {schedule.warmup:,} steps from {schedule.learning_rate(0):.3g} to {peak:.3g}, then a "
        f"cosine to {peak * config.schedule.decay_to:.3g}, every step",
        f"optimiser  {config.optim.name}, weight decay {config.optim.weight_decay}, gradient norm at most "
        f"{config.optim.clip_norm}, {planned.precision}{ema}",
        "",
        "learning rate at the first step of every epoch:",
    ]
    cells = [f"{epoch:>4} {rate:.4e}" for epoch, rate in enumerate(planned.epoch_rates, start=1)]
    lines += ["  ".join(cells[start : start + 6]) for start in range(0, len(cells), 6)]
    lines += [
        f"     {schedule.learning_rate(last):.4e} at the last step",
        "",
        f"time       about {duration(planned.seconds)}: {planned.rate:.0f} training images/s a process "
        f"({planned.rate_from}), validation at three times that; loading is assumed to keep up",
        f"memory     about {(planned.state_bytes + planned.activation_bytes) / 2**30:.1f} GiB a process: "
        f"{planned.state_bytes / 2**30:.2f} for weights, gradients, Adam's moments and the average, "
        f"{planned.activation_bytes / 2**30:.2f} for the backward pass ({kept}, counted in a pass without numbers); "
        f"working memory comes on top",
    ]
    return "\n".join(lines)
