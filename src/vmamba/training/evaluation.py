"""Using a trained model: scores on a data set, predictions for image files. Plain torch, no framework."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Preprocessing, evaluation_transform, read_image
from ..tasks import Scores, Task
from .machine import autocast, matrix_precision


def evaluate(
    model: nn.Module, task: Task, batches: Iterable[Any], device: str = "cpu", precision: str = "fp32"
) -> Scores:
    """The scores of ``model`` on all ``batches``, in evaluation mode.

    ``precision`` is "fp32", "tf32", or the half precision of autocast: "bf16", "fp16".
    """
    model.eval().to(device)
    scores = task.scores()
    with torch.inference_mode(), matrix_precision(precision), autocast(device, precision):
        for batch in batches:
            scores.update(model, to_device(batch, device))
    return scores


def to_device(batch: Any, device: str | torch.device) -> Any:
    """A batch with all its tensors on a device, whatever lists, tuples and dicts they are in."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(part, device) for part in batch)
    return batch


def check_image_size(model: nn.Module, name: str, image_size: tuple[int, int], remedy: str = "") -> None:
    """Try a model, on the CPU, on an image of that height and width.

    Raises:
        ValueError: it does not take such images; says ``name`` and ``remedy``.
    """
    height, width = image_size
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, height, width))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"{name} does not take images of {height} x {width} px{remedy}: {error}") from error


def predict(
    model: nn.Module,
    preprocessing: Preprocessing,
    images: Sequence[str | Path],
    *,
    top_k: int = 5,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> list[list[tuple[int, float]]]:
    """For every image file its ``top_k`` classes as (index, probability), the most probable first.

    Raises:
        FileNotFoundError, ValueError: an image is missing or unreadable.
    """
    transform = evaluation_transform(preprocessing)
    model.eval().to(device)
    ranked: list[list[tuple[int, float]]] = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = torch.stack([transform(read_image(path)) for path in images[start : start + batch_size]])
            probabilities = model(batch.to(device)).float().softmax(dim=1)
            best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
            ranked += [
                list(zip(index, value, strict=True))
                for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
    return ranked
