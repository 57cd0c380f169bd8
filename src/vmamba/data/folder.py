"""Image folders: one sub-folder per class."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .reading import IMAGE_SUFFIXES, read_image, refuse_empty_classes, without_unreadable


@dataclass(frozen=True, eq=False)
class Files:
    """Image files ``names`` under ``root`` with labels (indices into ``classes``); item ``i`` is (RGB image, label).

    The names are one block of bytes. A million Python objects would be copied into every worker bit by bit, as each
    look at one writes its reference count: 0.4 GB a worker for ImageNet, where this is 0.04.
    """

    classes: tuple[str, ...]
    root: Path
    names: np.ndarray
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.path(index)), self.labels[index]

    def subset(self, indices: Sequence[int]) -> Files:
        """The files at ``indices``, in that order."""
        names = self.names[np.asarray(indices, dtype=np.int64)]
        return Files(self.classes, self.root, names, tuple(self.labels[i] for i in indices))

    def path(self, index: int) -> Path:
        """Where file ``index`` is."""
        return self.root / os.fsdecode(self.names[index])

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where all files are."""
        return tuple(self.path(i) for i in range(len(self)))

    def name(self, index: int) -> str:
        return str(self.path(index))

    def encoded(self, index: int) -> bytes:
        """The bytes of file ``index``."""
        return self.path(index).read_bytes()


def image_folder(root: str | Path, on_unreadable: str = "error") -> Files:
    """The images under ``root/CLASS/``, at any depth, classes and files in alphabetical order.

    What becomes of unreadable images: see :func:`~.reading.without_unreadable`.

    Raises:
        FileNotFoundError: ``root`` is no directory.
        ValueError: no class folders, a class folder without images, or unreadable images; names them.
    """
    return without_unreadable(list_folder(root), str(root), on_unreadable)


def list_folder(root: str | Path) -> Files:
    """As :func:`image_folder`, without opening a file."""
    root = Path(root)
    classes = class_folders(root)
    if not classes:
        raise ValueError(f"{root} holds no class folders: put the images of each class into a folder of its own there")
    names: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        names += [os.fsencode(path.relative_to(root)) for path in found]
        labels += [label] * len(found)
    refuse_empty_classes(classes, labels, str(root), "hold no images")
    return Files(classes, root, np.array(names), tuple(labels))


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the sub-folders of ``root``, sorted; hidden ones do not count.

    Raises:
        FileNotFoundError: ``root`` is no directory.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no such data folder: {root}")
    return tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))


def list_images(paths: Sequence[str | Path]) -> list[Path]:
    """Image files among ``paths``; a folder stands for the images directly in it, in alphabetical order.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder holds no images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not inside:
                raise ValueError(f"the folder {path} holds no images")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"no such image: {path}")
    return files


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices (rest, held out): of every class the rounded ``fraction``, at least one and never all, is held out.

    A pure function of its arguments (Python's Mersenne Twister); both lists are sorted.

    Raises:
        ValueError: ``fraction`` is not inside (0, 1), or a class has a single image.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, not {fraction}")
    rng = random.Random(seed)
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    held_out: list[int] = []
    for label in sorted(members):
        if len(members[label]) < 2:
            raise ValueError(f"class {label} has a single image: at least two are needed to hold one out")
        count = min(max(1, round(fraction * len(members[label]))), len(members[label]) - 1)
        held_out += rng.sample(members[label], count)
    held_out_set = set(held_out)
    return [i for i in range(len(labels)) if i not in held_out_set], sorted(held_out)
