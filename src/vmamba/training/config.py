"""The configuration of a run: typed, nested, frozen; read from YAML and ``--set`` overrides; written back as YAML."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..data.sources import DIGITS
from ..data.transforms import Augmentation


@dataclass(frozen=True)
class ModelConfig:
    """Any model timm can make. ``drop_path`` None is the model's own default; ``kwargs`` go to timm.create_model.

    ``weights`` is a checkpoint file to start from (the head may have another number of classes).
    """

    name: str = "vmamba_nano"
    drop_path: float | None = None
    weights: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """``source`` is what :func:`~vmamba.data.open_source` takes. ``workers`` 0 loads in the main process.

    With ``in_memory`` every image is decoded once, reduced to ``memory_size`` pixels (None: not at all), and batches
    are augmented on the device that trains; ``workers`` then has no meaning.
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
    """Training targets: smoothing, and the alphas of mixup and CutMix (0: off)."""

    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0


@dataclass(frozen=True)
class OptimConfig:
    """A timm optimiser; ``clip_norm`` 0 turns gradient clipping off."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    clip_norm: float = 5.0


@dataclass(frozen=True)
class ScheduleConfig:
    """Per step: linear warm-up from ``warmup_from * lr``, then half a cosine down to ``decay_to * lr``."""

    epochs: int = 30
    warmup_epochs: float = 2.0
    warmup_from: float = 5e-4
    decay_to: float = 5e-3


@dataclass(frozen=True)
class RunConfig:
    """``ema_decay`` 0 is off. ``precision`` and ``device`` "auto": what the machine is good at.

    ``threads`` is how many CPU threads one operation may use; None leaves it to torch.
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ema_decay: float = 0.0
    threads: int | None = None


@dataclass(frozen=True)
class Config:
    """Everything that decides what a training run computes. Where it is written is no part of it."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: Augmentation = field(default_factory=Augmentation)
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        _require(self.data.image_size >= 32, "data.image_size", self.data.image_size, "at least 32")
        _require(self.data.batch_size >= 1, "data.batch_size", self.data.batch_size, "at least 1")
        _require(self.data.workers >= 0, "data.workers", self.data.workers, "at least 0")
        memory_size = self.data.memory_size
        _require(memory_size is None or memory_size >= 1, "data.memory_size", memory_size, "at least 1")
        _require(0 < self.data.crop_pct <= 1, "data.crop_pct", self.data.crop_pct, "in (0, 1]")
        _require(self.optim.lr > 0, "optim.lr", self.optim.lr, "positive")
        _require(self.optim.clip_norm >= 0, "optim.clip_norm", self.optim.clip_norm, "at least 0")
        _require(self.optim.weight_decay >= 0, "optim.weight_decay", self.optim.weight_decay, "at least 0")
        _require(self.schedule.epochs >= 1, "schedule.epochs", self.schedule.epochs, "at least 1")
        _require(self.schedule.warmup_epochs >= 0, "schedule.warmup_epochs", self.schedule.warmup_epochs, "at least 0")
        _require(0 <= self.run.ema_decay < 1, "run.ema_decay", self.run.ema_decay, "in [0, 1)")
        _require(self.run.threads is None or self.run.threads >= 1, "run.threads", self.run.threads, "at least 1")
        _require(self.run.seed >= 0, "run.seed", self.run.seed, "at least 0")


def digits_config() -> Config:
    """The default run: vmamba_nano on the handwritten digits, a few minutes on two CPU cores."""
    return Config(
        data=DataConfig(image_size=32, crop_pct=1.0, batch_size=32, workers=0),
        # a digit stays the same digit when shifted and scaled a little, not when mirrored
        augment=Augmentation(scale=(0.7, 1.0), ratio=(0.85, 1.18), horizontal_flip=0.0, color_jitter=0.0),
        optim=OptimConfig(lr=2e-3),
        schedule=ScheduleConfig(epochs=30),
        # images this small keep no second core busy: two threads took 70 ms a step where one took 45, and where
        # other programs ran beside them they waited for each other ten times as long
        run=RunConfig(threads=1),
    )


def folder_config(source: str) -> Config:
    """Photos in class folders, trained from scratch."""
    return Config(model=ModelConfig(name="vmamba_micro"), data=DataConfig(source=source))


def resolve(*layers: Mapping[str, Any]) -> Config:
    """The preset for the named data source, with ``layers`` of nested mappings laid over it, the last one strongest.

    Raises:
        ValueError: an unknown field (names the closest one) or a value out of range.
        TypeError: a value of the wrong type.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    source = merged["data"].get("source", DIGITS) if isinstance(merged.get("data"), Mapping) else DIGITS
    preset = digits_config() if source == DIGITS else folder_config(str(source))
    return from_dict(_merge(as_dict(preset), merged))


def from_dict(values: Mapping[str, Any]) -> Config:
    """A config from nested mappings; what they leave out takes the defaults of the dataclasses."""
    return _build(Config, values, "")


def as_dict(config: Config) -> dict[str, Any]:
    """Nested plain dicts, lists and numbers: ``from_dict(as_dict(c)) == c``."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


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
        if not equals or "." not in name:
            raise ValueError(f"--set takes SECTION.FIELD=VALUE such as optim.lr=1e-3, not {assignment!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {assignment!r}: the value is not valid YAML") from error
        for key in reversed(name.split(".")):
            value = {key: value}
        merged = _merge(merged, value)
    return merged


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
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


def _require(holds: bool, name: str, value: object, condition: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {condition}, not {value}")
