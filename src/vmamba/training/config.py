"""The configuration of a run: typed, nested, frozen; read from YAML and ``--set`` overrides; written back as YAML."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..data.detection import DetectionAugmentation
from ..data.segmentation import SegmentationAugmentation
from ..data.sources import DIGITS
from ..data.transforms import Augmentation
from ..tasks import ADE20K_SINGLE_SCALE, SegmentationInference

TASKS = ("classification", "segmentation", "detection")


@dataclass(frozen=True)
class ModelConfig:
    """Any model timm can make; in segmentation and detection it is the backbone.

    ``drop_path`` None is the model's own default; ``kwargs`` go to timm.create_model. ``weights`` is a checkpoint file
    to start from (the head may have another number of classes; a backbone's or a whole network's), or "pretrained" for
    the weights timm knows of.
    """

    name: str = "vmamba_nano"
    drop_path: float | None = None
    weights: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """``source`` is what :func:`~vmamba.data.open_source` takes; in segmentation and detection a folder that
    :func:`~vmamba.data.segmentation.find_segmentation` or :func:`~vmamba.data.open_detection` knows.

    ``batch_size`` is that of an optimiser step, over all processes and accumulated passes. ``workers`` is per process;
    0 loads in the main one. With ``in_memory`` every image is decoded once. In classification it is then reduced to
    ``memory_size`` pixels (None: not at all), and batches are augmented on the device that trains: ``workers`` has no
    meaning. In segmentation and detection ``workers`` go on augmenting.

    ``image_size``, ``interpolation``, ``crop_pct``, ``crop_mode`` and ``memory_size`` are of classification alone.
    """

    source: str = DIGITS
    image_size: int = 224
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    crop_pct: float = 0.875
    crop_mode: Literal["center", "squash", "border"] = "center"
    batch_size: int = 64
    workers: int = 2
    val_fraction: float = 0.1
    split_seed: int = 0
    on_unreadable: Literal["error", "skip"] = "error"
    in_memory: bool = False
    memory_size: int | None = None


@dataclass(frozen=True)
class LossConfig:
    """Training targets of classification: smoothing, and the alphas of mixup and CutMix (0: off).

    A batch is mixed with probability ``mix_prob``; where both are on, by CutMix with probability ``mix_switch``.
    """

    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch: float = 0.5


@dataclass(frozen=True)
class SegmentationConfig:
    """A UPerNet and how it is trained and looked at images with; the defaults are the published ones for ADE20K.

    ``channels``, ``auxiliary_channels``, ``dropout`` and ``out_norm``: see :func:`vmamba.create_upernet`.
    ``auxiliary_weight`` is the share of the auxiliary head's loss. ``class_weights``: "equal", a pixel counts in the
    loss whatever its class; "balanced", 1 / ln(1.02 + the class's share of the labelled training pixels) (Paszke et
    al., 2016, arXiv 1606.02147): 1.4 for a class that is everywhere, 50 for one that is hardly anywhere.
    """

    channels: int = 512
    auxiliary_channels: int = 256
    dropout: float = 0.1
    out_norm: bool = True
    auxiliary_weight: float = 0.4
    class_weights: Literal["equal", "balanced"] = "equal"
    augment: SegmentationAugmentation = field(default_factory=SegmentationAugmentation)
    inference: SegmentationInference = ADE20K_SINGLE_SCALE


@dataclass(frozen=True)
class DetectionConfig:
    """A Mask R-CNN and what it is shown; the defaults are the published ones for COCO.

    ``masks`` None: where the data has any; false trains a Faster R-CNN. ``max_detections`` an image are reported and
    evaluated. The others: see :func:`vmamba.models.detection.mask_rcnn`.
    """

    masks: bool | None = None
    channels: int = 256
    fc_channels: int = 1024
    out_norm: bool = True
    anchor_scale: float = 8.0
    min_size: tuple[int, ...] = (800,)
    max_size: int = 1333
    score_threshold: float = 0.05
    max_detections: int = 100
    augment: DetectionAugmentation = field(default_factory=DetectionAugmentation)


@dataclass(frozen=True)
class OptimConfig:
    """A timm optimiser. ``betas`` and ``eps`` None are its own; ``clip_norm`` 0 turns gradient clipping off.

    ``lr`` None scales with the batch: ``lr_base * data.batch_size / lr_base_size``. ``layer_decay`` multiplies the
    learning rate once for every layer away from the head. ``decay_ssm`` decays A_log and dt_bias too, as the official
    code does; ours leaves them alone, which is what their marks in that code ask for. ``decay_vectors`` decays biases
    and all other vectors but those of norms, as the official detection and segmentation do.
    """

    name: str = "adamw"
    lr: float | None = 1e-3
    lr_base: float = 5e-4
    lr_base_size: int = 512
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    eps: float | None = None
    clip_norm: float = 5.0
    layer_decay: float | None = None
    decay_ssm: bool = False
    decay_vectors: bool = False


@dataclass(frozen=True)
class ScheduleConfig:
    """The length of a run and its learning rate, a function of the optimiser step.

    A run has so many ``epochs``, or so many ``iterations`` (optimiser steps): the other one is None. With iterations
    the images come in an endless row of permutations, and what a run calls an epoch is ``validate_every`` iterations
    (None: all of them), after each of which it validates.

    The rate rises linearly from ``warmup_from * lr`` over ``warmup_epochs`` or ``warmup_iterations`` (the other one is
    None), and then falls to ``decay_to * lr``: "cosine", half a cosine; "poly", as what is left of the run to the power
    ``power``. With "steps" it is multiplied by ``gamma`` at each of ``drops``, in epochs or, where the run has them,
    iterations.
    """

    epochs: int | None = 30
    iterations: int | None = None
    validate_every: int | None = None
    warmup_epochs: float | None = 2.0
    warmup_iterations: int | None = None
    warmup_from: float = 5e-4
    shape: Literal["cosine", "poly", "steps"] = "cosine"
    decay_to: float = 5e-3
    power: float = 1.0
    drops: tuple[int, ...] = ()
    gamma: float = 0.1

    @property
    def rounds(self) -> int:
        """How many epochs a run has, in the run's own sense of the word."""
        return self.iterations // self.steps_per_round if self.iterations else self.epochs

    @property
    def steps_per_round(self) -> int | None:
        """Optimiser steps of an epoch where the run is counted in iterations; None where the data decides."""
        return (self.validate_every or self.iterations) if self.iterations else None


@dataclass(frozen=True)
class RunConfig:
    """``precision`` and ``device`` "auto": what the machine is good at. "tf32" is fp32 with TF32 matrix products.

    ``ema_decay`` 0 is off. ``accumulate`` is how many passes make up an optimiser step. ``grad_checkpointing`` computes
    activations again in the backward pass instead of keeping them. ``mode`` is how training steps run: "eager";
    "compile", through torch.compile; "graphs", compiled and replayed as CUDA graphs, which leaves the CPU next to
    nothing to do. ``strategy`` is for several processes: "fsdp" splits weights and optimiser state between them.

    After every ``evaluate_every`` epochs, which must divide ``schedule.epochs``, the model is evaluated and a
    checkpoint written, and every ``checkpoint_every`` steps another checkpoint (0: none). ``threads`` is how many CPU
    threads one operation may use; None leaves it to torch.
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    ema_decay: float = 0.0
    accumulate: int = 1
    grad_checkpointing: bool = False
    mode: Literal["eager", "compile", "graphs"] = "eager"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    evaluate_every: int = 1
    checkpoint_every: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class Config:
    """Everything that decides what a training run computes. Where it is written is no part of it.

    ``augment`` and ``loss`` are of classification; ``segmentation`` and ``detection`` of the task of that name.
    """

    task: Literal["classification", "segmentation", "detection"] = "classification"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: Augmentation = field(default_factory=Augmentation)
    loss: LossConfig = LossConfig()
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        for section, name, holds, condition in _RANGES:
            value = getattr(getattr(self, section), name)
            if value is not None and not holds(value):
                raise ValueError(f"{section}.{name} must be {condition}, not {value}")
        _check_schedule(self.schedule)
        if self.task != "classification":
            plain = DataConfig()
            for name, instead in _OF_CLASSIFICATION.items():
                if getattr(self.data, name) != getattr(plain, name):
                    raise ValueError(f"data.{name} is of classification, and this is {self.task}: {instead}")
        if self.data.batch_size % self.run.accumulate:
            raise ValueError(
                f"data.batch_size is the batch of a whole step, so run.accumulate ({self.run.accumulate}) must divide "
                f"it, and it does not divide {self.data.batch_size}"
            )
        if self.schedule.rounds % self.run.evaluate_every:
            raise ValueError(
                f"run.evaluate_every ({self.run.evaluate_every}) must divide schedule.epochs, so that the last epoch "
                f"is evaluated, and it does not divide {self.schedule.rounds}"
            )
        if self.run.mode == "graphs" and self.run.accumulate > 1:
            raise ValueError(
                f"run.mode=graphs does not go with run.accumulate={self.run.accumulate}: a graph writes its gradients "
                f"to the same place in every pass. Set run.mode=compile"
            )

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: ``optim.lr``, or the base rate scaled with the batch."""
        optim = self.optim
        return optim.lr_base * self.data.batch_size / optim.lr_base_size if optim.lr is None else optim.lr


def _at_least(least: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= least, f"at least {least}"


# sections that only one task has, and fields of `data` that only classification has
_SECTIONS = {"augment": "classification", "loss": "classification", "segmentation": TASKS[1], "detection": TASKS[2]}
_SIZES = "segmentation.augment.crop and detection.min_size say how large images are"
_OF_CLASSIFICATION = {
    "image_size": _SIZES,
    "interpolation": "images are resized bilinearly",
    "crop_pct": _SIZES,
    "crop_mode": _SIZES,
    "memory_size": "images are kept as they are",
}


def _check_schedule(schedule: ScheduleConfig) -> None:
    for one, other in (("epochs", "iterations"), ("warmup_epochs", "warmup_iterations")):
        if (getattr(schedule, one) is None) == (getattr(schedule, other) is None):
            raise ValueError(f"of schedule.{one} and schedule.{other} one must be a number and the other null")
    if schedule.iterations is None:
        if schedule.validate_every is not None:
            raise ValueError("schedule.validate_every counts iterations: it needs schedule.iterations")
    else:
        if schedule.warmup_epochs is not None:
            raise ValueError("a run of so many schedule.iterations warms up over schedule.warmup_iterations")
        if schedule.iterations % schedule.steps_per_round:
            raise ValueError(
                f"schedule.validate_every must divide schedule.iterations, and {schedule.validate_every} does not "
                f"divide {schedule.iterations}"
            )
    if schedule.drops and (min(schedule.drops) < 1 or list(schedule.drops) != sorted(set(schedule.drops))):
        raise ValueError(f"schedule.drops must be positive and rise, not {schedule.drops}")
    if bool(schedule.drops) != (schedule.shape == "steps"):
        raise ValueError(
            f"schedule.drops and schedule.shape=steps go together, not {schedule.drops} and {schedule.shape}"
        )


_POSITIVE = (lambda value: value > 0, "positive")
_SHARE = (lambda value: 0 <= value <= 1, "in [0, 1]")
_BELOW_1 = (lambda value: 0 <= value < 1, "in [0, 1)")
_UP_TO_1 = (lambda value: 0 < value <= 1, "in (0, 1]")

_RANGES = (
    ("data", "image_size", *_at_least(32)),
    ("data", "batch_size", *_at_least(1)),
    ("data", "workers", *_at_least(0)),
    ("data", "crop_pct", *_UP_TO_1),
    ("data", "memory_size", *_at_least(1)),
    ("loss", "mix_prob", *_SHARE),
    ("loss", "mix_switch", *_SHARE),
    ("optim", "lr", *_POSITIVE),
    ("optim", "lr_base", *_POSITIVE),
    ("optim", "lr_base_size", *_at_least(1)),
    ("optim", "eps", *_POSITIVE),
    ("optim", "clip_norm", *_at_least(0)),
    ("optim", "weight_decay", *_at_least(0)),
    ("optim", "layer_decay", *_UP_TO_1),
    ("segmentation", "channels", *_at_least(1)),
    ("segmentation", "auxiliary_channels", *_at_least(1)),
    ("segmentation", "dropout", *_BELOW_1),
    ("segmentation", "auxiliary_weight", *_at_least(0)),
    ("detection", "channels", *_at_least(1)),
    ("detection", "fc_channels", *_at_least(1)),
    ("detection", "anchor_scale", *_POSITIVE),
    ("detection", "score_threshold", *_BELOW_1),
    ("detection", "max_detections", *_at_least(1)),
    ("schedule", "epochs", *_at_least(1)),
    ("schedule", "iterations", *_at_least(1)),
    ("schedule", "validate_every", *_at_least(1)),
    ("schedule", "warmup_epochs", *_at_least(0)),
    ("schedule", "warmup_iterations", *_at_least(0)),
    ("schedule", "power", *_POSITIVE),
    ("schedule", "gamma", *_UP_TO_1),
    ("schedule", "warmup_from", *_SHARE),
    ("schedule", "decay_to", *_SHARE),
    ("run", "ema_decay", *_BELOW_1),
    ("run", "accumulate", *_at_least(1)),
    ("run", "evaluate_every", *_at_least(1)),
    ("run", "checkpoint_every", *_at_least(0)),
    ("run", "threads", *_at_least(1)),
    ("run", "seed", *_at_least(0)),
)


def from_dict(values: Mapping[str, Any]) -> Config:
    """A config from nested mappings; what they leave out takes the defaults of the dataclasses.

    Raises:
        ValueError: an unknown field, one of another task, or a value out of range.
        TypeError: a value of the wrong type.
    """
    task = values.get("task", "classification")
    for name in values:
        if name in _SECTIONS and _SECTIONS[name] != task:
            raise ValueError(f"{name} is a section of {_SECTIONS[name]}, and this is {task}: leave it out")
    return _build(Config, values, "")


def as_dict(config: Config) -> dict[str, Any]:
    """Nested plain dicts, lists and numbers, without the sections of other tasks: ``from_dict(as_dict(c)) == c``."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    sections = plain(dataclasses.asdict(config))
    return {name: section for name, section in sections.items() if _SECTIONS.get(name, config.task) == config.task}


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(as_dict(config), sort_keys=False)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file ``path``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no such config file: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping such as 'optim: {{lr: 0.001}}', not {values!r}")
    return values


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """``["optim.lr=1e-3", ...]`` as nested mappings; values are read as YAML.

    Raises:
        ValueError: an item is not of the form SECTION.FIELD=VALUE.
    """
    merged: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or ("." not in name and name != "task"):
            raise ValueError(f"--set takes SECTION.FIELD=VALUE such as optim.lr=1e-3, not {assignment!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {assignment!r}: the value is not valid YAML") from error
        for key in reversed(name.split(".")):
            value = {key: value}
        merged = merge(merged, value)
    return merged


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, field by field."""
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise TypeError(f"{where or 'the config'} must be a mapping of fields, not {values!r}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"did you mean {_join(where, close[0])!r}?" if close else f"there are: {', '.join(hints)}"
            raise ValueError(f"unknown config field {_join(where, name)!r}; {hint}")
    return cls(**{name: _convert(value, hints[name], _join(where, name)) for name, value in values.items()})


def _convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotation ``hint`` wants it: YAML knows neither tuples nor ``1e-3``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, args))}, not {value!r}")
        return value
    if origin is types.UnionType:
        if value is None:
            return None
        return _convert(value, next(arg for arg in args if arg is not type(None)), where)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis and isinstance(value, list | tuple):
            args = (args[0],) * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise TypeError(f"{where} must be a list of {len(args)} values, not {value!r}")
        return tuple(_convert(v, arg, where) for v, arg in zip(value, args, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{where} must be a mapping, not {value!r}")
        return dict(value)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if type(value) is not hint:
        raise TypeError(f"{where} must be {hint.__name__}, not {value!r}")
    return value


def _join(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)
