"""Data sets of the Hugging Face library, through timm's reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .._extras import require
from .reading import decode_image

PREFIX = "hfds/"
# the names that data sets give to our splits, the usual one first
SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}


@dataclass(frozen=True, eq=False)
class HubImages:
    """Rows ``rows`` of a data set behind timm's reader; item ``i`` is (RGB image, label)."""

    classes: tuple[str, ...]
    reader: Any
    rows: np.ndarray
    labels: tuple[int, ...]
    where: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode_image(self.encoded(index), self.name(index)), self.labels[index]

    def subset(self, indices: Sequence[int]) -> HubImages:
        """The rows at ``indices``, in that order."""
        labels = tuple(self.labels[i] for i in indices)
        return HubImages(self.classes, self.reader, self.rows[list(indices)], labels, self.where)

    def name(self, index: int) -> str:
        return f"{self.where}, row {self.rows[index]}"

    def encoded(self, index: int) -> bytes:
        """The bytes of the image in row ``index``."""
        file, _ = self.reader[int(self.rows[index])]
        with file:
            return file.read()


def open_hub(source: str) -> dict[str, HubImages]:
    """The splits of ``hfds/NAME``: a data set of the Hugging Face hub, or a folder in a form its library reads.

    It must have the columns ``image`` and ``label``. What is on the disk already is not downloaded again.

    Raises:
        ModuleNotFoundError: the library ``datasets`` is not installed.
        ValueError: there is no such data set, or its columns are others.
    """
    library = require("datasets", "hf")
    from timm.data.readers import create_reader

    name = source.removeprefix(PREFIX)
    if not name:
        raise ValueError(f"name a data set after {PREFIX}, such as {PREFIX}uoft-cs/cifar10")
    try:
        there = library.get_dataset_split_names(name)
        splits = {}
        for split, names in SPLIT_NAMES.items():
            found = next((name for name in names if name in there), None)
            if found is not None:
                splits[split] = _open_split(create_reader(source, split=found), f"{source} ({found})")
    # its library has an exception of its own for nearly every mishap
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{source} cannot be opened as labelled images: {' '.join(str(error).split())}") from error
    if "train" not in splits:
        raise ValueError(f"{source} has no split train; it has {', '.join(there)}")
    return splits


def _open_split(reader: Any, where: str) -> HubImages:
    by_label = sorted((label, name) for name, label in reader.class_to_idx.items())
    if not by_label:
        raise ValueError("its column label is no class label with names")
    # the column alone, which decodes no image; the reader of timm 1.0.29 has no method for it
    labels = tuple(int(label) for label in reader.dataset[reader.label_key])
    return HubImages(tuple(name for _, name in by_label), reader, np.arange(len(labels)), labels, where)
