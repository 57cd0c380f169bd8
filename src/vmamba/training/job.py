"""What a run has to know of its task beside loss and scores: the data, the network, the pictures. One class a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import timm
from torch import nn

from ..models.checkpoint import load_state, read_checkpoint
from ..tasks import Scores, Task
from .checkpoints import About, make_network
from .config import Config, as_dict

__all__ = ["PART_NAMES", "Job", "Known", "Share", "percent", "spread"]

PRETRAINED = "pretrained"
SHOWN_FILES = 5  # image files that a finished run names, to try it on
PART_NAMES = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Share:
    """What a process takes of the batches: so many images at once, and its place among the processes."""

    batch_size: int
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Known:
    """How many images of how many classes a public data set has, for planning where it is not on the disk."""

    name: str
    source: str
    train: int
    val: int
    classes: int


class Job(ABC):
    """A config's task with its data found and checked. Making one reads no more than it must.

    Attributes:
        known: the public data set of the published recipe. command: of vmamba, for a trained network's use on images.
        task: loss and scores; `task_of` for a part other than the validation images.
        classes, display_names: what checkpoints and pictures call the classes.
        parts: the data by part: "train", "val" and perhaps "test".
        network: keyword arguments, beside its name, that make the network; plain values, for checkpoints.

    Raises:
        FileNotFoundError, ValueError: data and config do not fit together.
    """

    known: ClassVar[Known]
    command: ClassVar[str]
    config: Config
    task: Task
    classes: tuple[str, ...]
    display_names: tuple[str, ...]
    parts: Mapping[str, Sized]
    network: dict[str, Any]

    @abstractmethod
    def __init__(self, config: Config) -> None:
        """Find the data and check it."""

    @staticmethod
    @abstractmethod
    def network_for(config: Config, classes: int, **facts: Any) -> dict[str, Any]:
        """`network` for so many classes."""

    @abstractmethod
    def check(self, share: Share, device: str, processes: int) -> None:
        """Refuse what cannot be trained so, by so many processes on this machine. ValueError says what to change."""

    @abstractmethod
    def try_model(self, model: nn.Module) -> None:
        """Run it once on a small image, where it may refuse one. ValueError."""

    @abstractmethod
    def training_batches(self, share: Share, device: str, workers: int | None = None) -> Any:
        """Shuffled, augmented batches, resumable, of the run's own epochs; ``workers`` None: as the config says."""

    @abstractmethod
    def evaluation_batches(self, part: str, share: Share, device: str | None = None) -> Iterable[Any]:
        """All images of a part in their order; a device where they may be kept there."""

    @abstractmethod
    def draw(self, part: str, scores: Scores, model: nn.Module, folder: Path) -> dict[str, Path]:
        """Write pictures (and files) of a finished evaluation into ``folder``; title -> picture."""

    @abstractmethod
    def image_files(self, part: str, run_dir: Path) -> tuple[Path, ...]:
        """A few image files of a part, to try the model on."""

    @staticmethod
    @abstractmethod
    def dense_part(model: nn.Module, config: Config) -> tuple[nn.Module, tuple[int, int], int]:
        """What of the network costs the same for every image, the size of its input, and the least batch it takes."""

    @property
    def size_in_words(self) -> str:
        """How large images are in training."""
        return f"{self.config.data.image_size} px"

    def task_of(self, part: str) -> Task:
        """The task with what the scores of a part need."""
        return self.task

    def table(self, scores: Scores) -> list[str]:
        """Lines of Markdown about the single classes."""
        return []

    def backbone_of(self, model: nn.Module) -> nn.Module | None:
        """The part of the network that classification weights fit; None for a classifier."""
        return None

    def about(self) -> dict[str, Any]:
        """What a checkpoint says beside the weights, as arguments of :class:`About`."""
        return {
            "task": self.config.task,
            "model": self.config.model.name,
            "model_kwargs": self.network,
            "classes": self.classes,
            "display_names": self.display_names,
            "config": as_dict(self.config),
        }

    def fresh_about(self) -> About:
        """The same before anything is learnt."""
        return About(**self.about(), epoch=0, metrics={})

    def make_model(self, weights: bool) -> nn.Module:
        """The network, with the weights that the config starts from where ``weights``.

        Raises:
            FileNotFoundError, ValueError: there is no such model or file, or they do not fit.
        """
        name, source = self.config.model.name, self.config.model.weights if weights else None
        if source == PRETRAINED:
            if timm.is_model(name) and not timm.models.is_model_pretrained(name):
                raise ValueError(f"there are no pretrained weights of {name}: name a file in model.weights (--weights)")
            return make_network(self.config.task, name, pretrained=True, **self.network)
        model = make_network(self.config.task, name, **self.network)
        if source is not None:
            self._start_from(model, source)
        return model

    def _start_from(self, model: nn.Module, file: str) -> None:
        state = read_checkpoint(file)
        backbone = self.backbone_of(model)
        if backbone is not None and not any(name.startswith("backbone.") for name in state):
            load_state(backbone, state, file, new_head=True, new_out_norms=True)
        else:
            load_state(model, state, file, new_head=True)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def percent(value: float) -> str:
    """A figure in percent for a table; a dash where there is none."""
    return f"{value:.2f}" if value == value else "-"
