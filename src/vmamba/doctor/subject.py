"""What is examined: a model, its loss and a batch, from a config, a run directory or somebody's own code."""

from __future__ import annotations

import contextlib
import importlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .stacks import is_users

__all__ = ["MISTAKES", "Subject", "leaves", "load", "to_device"]

# what is told in a line and no finding: the user named something that is not there or cannot be
MISTAKES = (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError)

CONFIG_SUFFIXES = (".yaml", ".yml")
# keys of a batch that is a mapping, and of the targets of detection
TARGET_KEYS = ("label", "labels", "target", "targets", "mask", "masks", "y")


@dataclass
class Subject:
    """A training step to examine.

    Attributes:
        model: any module, in the mode and on the device in which it is trained.
        loss: ``loss(output, target)`` of a batch that is a pair (inputs, target): ``nn.CrossEntropyLoss()``, say. The
            output is ``model(inputs)``; a tuple of inputs is given as arguments, a mapping as named arguments.
        batch: on the model's device. None: the first one that ``loader`` gives, which is moved there.
        training_loss: in the place of ``loss``, where a step is anything else: ``training_loss(model, batch)``.
        optimizer: over the model's parameters. None: what needs one is not examined.
        loader: gives batches. None: loading is not examined.
        precision: "fp32" (also for what the model does by itself), "bf16" or "fp16": the dtype of autocast.
        clip_norm: the norm to which the whole gradient is clipped before a step of the optimiser; 0: it is not.
        processes: with 2 or more the step is also made under DistributedDataParallel by so many processes of this
            machine (gloo, CPU), each on the whole batch.

    Raises:
        ValueError: both losses or none, neither batch nor loader, or a value that cannot be.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor] | None = None
    batch: Any = None
    training_loss: Callable[[nn.Module, Any], Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    loader: Iterable[Any] | None = None
    precision: str = "fp32"
    clip_norm: float = 0.0
    processes: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"a subject's model must be a torch.nn.Module, not {type(self.model).__name__}")
        if (self.loss is None) == (self.training_loss is None):
            raise ValueError("a subject needs either loss(output, target) or training_loss(model, batch)")
        if self.batch is None and self.loader is None:
            raise ValueError("a subject needs a batch, or a loader that gives one")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"a subject's precision must be 'fp32', 'bf16' or 'fp16', not {self.precision!r}")
        if self.loss is not None and self.batch is not None and not _is_pair(self.batch):
            raise ValueError(
                f"loss(output, target) needs a batch (inputs, target), not {_kind(self.batch)}: "
                "give training_loss(model, batch) instead"
            )

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is (a model without any: the batch's first tensor)."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *(tensor for _, tensor, _ in leaves(self.batch))]
        return tensors[0].device if tensors else torch.device("cpu")

    def compute_loss(self, precision: str | None = None) -> Tensor:
        """The loss of the batch under autocast to ``precision``; None: the subject's own, but fp32 where that is fp16,
        whose overflows are a matter of their own."""
        if precision is None:
            precision = "fp32" if self.precision == "fp16" else self.precision
        with autocast(self.device, precision):
            if self.training_loss is not None:
                return self.training_loss(self.model, self.batch)
            inputs, target = self.batch
            return self.loss(call(self.model, inputs), target)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Autocast to "bf16" or "fp16" on ``device``; nothing for "fp32"."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return contextlib.nullcontext() if half is None else torch.autocast(device.type, dtype=half)


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on the inputs of a batch: one value, a tuple of arguments or a mapping of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def leaves(batch: Any) -> Iterator[tuple[str, Tensor, str]]:
    """The tensors of a batch as (name to show, tensor, "input" or "target")."""
    if _is_pair(batch):
        yield from _leaves(batch[0], "inputs", "input")
        yield from _leaves(batch[1], "target", "target")
    else:
        yield from _leaves(batch, "batch", "input")


def _leaves(value: Any, name: str, role: str) -> Iterator[tuple[str, Tensor, str]]:
    if isinstance(value, Tensor):
        yield name, value, role
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}[{key!r}]", "target" if key in TARGET_KEYS else role)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}[{index}]", role)


def to_device(value: Any, device: torch.device | str) -> Any:
    """A batch with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    return type(value)(to_device(item, device) for item in value) if isinstance(value, list | tuple) else value


def load(target: str, overrides: Sequence[str] = (), device: str = "auto") -> Subject:
    """The subject that ``target`` names.

    Args:
        target: a config (RUN.yaml), a run directory (its config, and the weights of its last checkpoint where there is
            one), or "module:function" in the current directory or installed: the function takes nothing and returns a
            :class:`Subject` or (model, loss, batch).
        overrides: SECTION.FIELD=VALUE for a config.
        device: "auto" is the config's own choice, and for a function where it has put things.

    Raises:
        FileNotFoundError, ModuleNotFoundError: there is no such config, run or module.
        ValueError, TypeError: the config cannot be, or the function returns something else.
    """
    path = Path(target)
    if path.is_dir() or path.suffix in CONFIG_SUFFIXES:
        return _from_config(path, overrides, device)
    module, _, function = target.rpartition(":")
    if not (module and function):
        raise FileNotFoundError(f"{target!r} is no config (.yaml), run directory or MODULE:FUNCTION")
    if overrides:
        raise ValueError(f"--set belongs to a config; {target} is a function: {', '.join(overrides)}")
    return _from_function(module, function, device)


def _from_config(path: Path, overrides: Sequence[str], device: str) -> Subject:
    from ..models.checkpoint import load_state
    from ..training import read_checkpoint, resolve
    from ..training.config import parse_overrides, read_yaml
    from ..training.run import step_parts

    if path.is_dir() and not (path / "config.yaml").is_file():
        raise FileNotFoundError(f"{path} is no run directory: it has no config.yaml")
    chosen = [] if device == "auto" else [f"run.device={device}"]
    config = resolve(read_yaml(path / "config.yaml" if path.is_dir() else path), parse_overrides([*overrides, *chosen]))
    parts = step_parts(config)
    last = path / "checkpoints" / "last.ckpt"
    if path.is_dir() and last.is_file():
        load_state(parts.model, read_checkpoint(last)["model"], last)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    precision = parts.machine.precision
    return Subject(
        parts.model,
        training_loss=parts.task.training_loss,
        optimizer=parts.optimizer,
        loader=parts.batches,
        precision=precision if precision in ("bf16", "fp16") else "fp32",
        clip_norm=config.optim.clip_norm,
    )


def _from_function(module: str, name: str, device: str) -> Subject:
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise ValueError(f"the module {module} has no function {name!r}")
    try:
        made = function()
    except MISTAKES as error:
        kind = next(cls for cls in MISTAKES if isinstance(error, cls))
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
        line = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        raise kind(f"{module}:{name} raises {type(error).__name__}: {error}{line}") from error
    if not isinstance(made, Subject):
        if not isinstance(made, tuple) or len(made) != 3:
            raise ValueError(f"{module}:{name} must return a Subject or (model, loss, batch), not {_kind(made)}")
        model, loss, batch = made
        made = Subject(model, loss, batch)
    if device != "auto":
        made.model.to(device)
        made.batch = to_device(made.batch, device)
    return made


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, list | tuple) and len(batch) == 2


def _kind(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return f"a {type(value).__name__}{size}"
