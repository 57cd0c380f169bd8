"""Checkpoints of our runs: weights-only safe files that say which model they hold and what it knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo
from torch import nn

from ..data import Preprocessing
from ..models import create_upernet, load_checkpoint
from ..models.checkpoint import load_state
from ..models.detection import mask_rcnn
from ..models.variants import check_name

# the entries of a checkpoint file: the weights to use, and what they belong to. The checkpoint of the last epoch
# holds the state of optimiser and loops beside them.
WEIGHTS, ABOUT = "model", "vmamba"
FORMAT = 1


@dataclass(frozen=True)
class About:
    """What a checkpoint says of its weights.

    ``model_kwargs`` are what :func:`make_network` takes beside task and name. ``preprocessing`` is a classifier's, None
    for other networks, which take images of any size. ``averaged``: they are the moving average of training's.
    ``category_ids`` are what a detector's classes are called in COCO files.
    """

    model: str
    model_kwargs: dict[str, Any]
    classes: tuple[str, ...]
    display_names: tuple[str, ...]
    preprocessing: Preprocessing | None
    config: dict[str, Any]
    epoch: int
    metrics: dict[str, float]
    averaged: bool = False
    task: str = "classification"
    category_ids: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **vars(self),
            "classes": list(self.classes),
            "display_names": list(self.display_names),
            "preprocessing": self.preprocessing and self.preprocessing.as_dict(),
            "category_ids": list(self.category_ids),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> About:
        values = dict(values)
        found = values.pop("format", None)
        if found != FORMAT:
            raise ValueError(f"checkpoint format {found!r} is not {FORMAT}: written by another version of vmamba")
        values["classes"] = tuple(values["classes"])
        values["display_names"] = tuple(values["display_names"])
        values["category_ids"] = tuple(values.get("category_ids", ()))
        if values["preprocessing"] is not None:
            values["preprocessing"] = Preprocessing.from_dict(values["preprocessing"])
        return cls(**values)


def make_model(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` with errors that say what to do.

    Raises:
        ValueError: no model of that name, or it does not take these arguments.
    """
    check_name(name)
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be made with {kwargs}: {error}") from error


def expected_preprocessing(model: nn.Module) -> Preprocessing:
    """What timm says that a model of its registry was trained with."""
    expected = model.pretrained_cfg
    return Preprocessing(
        tuple(expected["input_size"][1:]),
        expected["interpolation"],
        expected["crop_pct"],
        expected["mean"],
        expected["std"],
    )


def make_network(task: str, name: str, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The network that ``task`` trains on model or backbone ``name``.

    ``kwargs`` are those of :func:`make_model`, :func:`vmamba.create_upernet` or
    :func:`~vmamba.models.detection.mask_rcnn`.

    Raises:
        ValueError: no model of that name, or it does not take these arguments.
    """
    if task == "detection":
        backbone = {**kwargs.pop("backbone_kwargs", {}), **({"pretrained": True} if pretrained else {})}
        return mask_rcnn(name, backbone_kwargs=backbone, **kwargs)
    make = create_upernet if task == "segmentation" else make_model
    return make(name, **kwargs, **({"pretrained": True} if pretrained else {}))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint file on the CPU; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make the unpickler raise nearly anything
        # its kind, not its text: torch's advises to switch the protection off
        raise ValueError(
            f"{path} is damaged or no checkpoint of this package ({type(error).__name__}): take another file, such as "
            f"checkpoints/last.ckpt of the run"
        ) from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a checkpoint")
    return contents


def checkpoint_file(run_or_file: str | Path) -> Path:
    """The checkpoint meant by a run directory (its best one) or a file.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(run_or_file)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no such run or checkpoint: {path}")
    for name in ("best.ckpt", "last.ckpt"):
        if (path / "checkpoints" / name).is_file():
            return path / "checkpoints" / name
    raise FileNotFoundError(f"{path} is no run directory: it has no checkpoints/best.ckpt")


def load_trained(
    run_or_file: str | Path, model_name: str | None = None, task: str | None = None, **changes: Any
) -> tuple[nn.Module, About]:
    """The trained model of a run directory or checkpoint file, in evaluation mode on the CPU, and what it knows.

    ``model_name`` is for files that hold a classifier's bare weights, such as the released ones: they are read with
    :func:`vmamba.load_checkpoint`, and classes and preprocessing are those timm has for the model. ``task`` is the one
    it must be for; None takes any. ``changes`` replace keyword arguments of the network that its weights do not depend
    on, such as a detector's ``min_size``.

    Raises:
        FileNotFoundError: there is no such run or file.
        ValueError: the file is damaged, holds bare weights and ``model_name`` is None, or is of another model or task.
    """
    path = checkpoint_file(run_or_file)
    if model_name is not None:
        return _load_bare_weights(path, model_name)
    contents = read_checkpoint(path)
    if ABOUT not in contents or WEIGHTS not in contents:
        raise ValueError(
            f"{path} does not say which model it holds (no run of this package wrote it): add --model NAME"
        )
    about = About.from_dict(contents[ABOUT])
    if task not in (None, about.task):
        raise ValueError(f"{path} is of {about.task}, not of {task}")
    model = make_network(about.task, about.model, **(about.model_kwargs | changes))
    try:
        load_state(model, contents[WEIGHTS], path)
    except ValueError as error:
        raise ValueError(f"the weights in {path} do not fit {about.model}: {error}") from error
    return model.eval(), about


def about_of(run_or_file: str | Path) -> About | None:
    """What a run directory or its checkpoint says of itself; None for any other file.

    Raises:
        FileNotFoundError: there is no such run or file.
    """
    path = checkpoint_file(run_or_file)
    if path.suffix != ".ckpt":
        return None
    contents = read_checkpoint(path)
    return About.from_dict(contents[ABOUT]) if ABOUT in contents else None


def _load_bare_weights(path: Path, model_name: str) -> tuple[nn.Module, About]:
    model = make_model(model_name)
    load_checkpoint(model, path)
    classes = names = tuple(str(index) for index in range(model.num_classes))
    if model.num_classes == 1000:
        imagenet = ImageNetInfo()
        classes = tuple(imagenet.index_to_label_name(index) for index in range(1000))
        names = tuple(imagenet.index_to_description(index) for index in range(1000))
    expected = expected_preprocessing(model)
    return model.eval(), About(model_name, {}, classes, names, expected, config={}, epoch=0, metrics={})
