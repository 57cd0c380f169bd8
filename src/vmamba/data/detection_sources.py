"""Where the images and the COCO files of a data set lie: found by the layout of its folder."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .coco import CocoAnnotations, read_coco

__all__ = ["AnnotatedImages", "open_detection"]

# a part's name here -> what data sets call it
PART_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
WHOLE = ("annotations.json", "instances.json", "_annotations.coco.json")


class AnnotatedImages(NamedTuple):
    """One part of a data set: the folder that file names are relative to, and the annotations."""

    images: Path
    coco: CocoAnnotations


def open_detection(root: str | Path, *, val_fraction: float = 0.1, split_seed: int = 0) -> dict[str, AnnotatedImages]:
    """The parts of a data set, "train", "val" and perhaps "test", recognised by the names of its files.

    Annotations of a part are ``instances_train.json`` (also ``instances_train2017.json``) or ``train.json``, in
    ``annotations`` or in ``root``, or ``train/_annotations.coco.json``. Its images lie in a folder of the part's name
    (with the year where the file has one), in one of that name inside ``images``, in ``images``, or in ``root``:
    wherever the first image of the file is. A single ``annotations.json`` is for all images, of which ``val_fraction``
    is held out, chosen by ``split_seed``.

    Raises:
        FileNotFoundError: there is no such folder, no annotations in it, or no images for them; says what was tried.
        ValueError: a part has two files, a part is missing, or a file is no COCO file.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no such data folder: {root}")
    files = {name: file for name in PART_NAMES if (file := _annotations_of(root, name)) is not None}
    if not files:
        whole = next((f for folder in (root / "annotations", root) for n in WHOLE if (f := folder / n).is_file()), None)
        if whole is None:
            raise FileNotFoundError(
                f"{root} is no detection data set: there is no annotations/instances_train.json, train.json or "
                f"annotations.json in it (COCO files), docs/detection.md shows the layouts"
            )
        return _held_out(_with_images(root, whole), val_fraction, split_seed)
    if missing := [name for name in ("train", "val") if name not in files]:
        found = ", ".join(str(file.relative_to(root)) for file in files.values())
        raise ValueError(f"{root} has no annotations of the part {missing[0]!r}: it has {found}")
    return {name: _with_images(root, file) for name, file in files.items()}


def _annotations_of(root: Path, part: str) -> Path | None:
    for name in PART_NAMES[part]:
        for folder in (root / "annotations", root):
            # a year may follow, but "train" is not "training"
            found = [
                file
                for file in sorted(folder.glob(f"instances_{name}*.json"))
                if not file.stem.removeprefix(f"instances_{name}").strip("0123456789_-")
            ]
            if len(found) > 1:
                raise ValueError(f"two files of the part {part!r}: {found[0]} and {found[1]}; keep one of them there")
            for file in (*found, folder / f"{name}.json"):
                if file.is_file():
                    return file
        if (file := root / name / "_annotations.coco.json").is_file():
            return file
    return None


def _with_images(root: Path, file: Path) -> AnnotatedImages:
    coco = read_coco(file)
    names = [entry["file_name"] for entry in coco.images if isinstance(entry.get("file_name"), str)]
    folders = list(dict.fromkeys(_image_folders(root, file)))
    # a few, in case that the first one is missing
    for name in names[:10]:
        for folder in folders:
            if (folder / name).is_file():
                return AnnotatedImages(folder, coco)
    shown = names[0] if names else "any image"
    raise FileNotFoundError(f"{shown} of {file} is in none of {', '.join(map(str, folders))}")


def _image_folders(root: Path, file: Path) -> Iterator[Path]:
    name = file.stem.removeprefix("instances_")
    if file.name == "_annotations.coco.json":
        yield file.parent
    for folder in (root, root / "images"):
        yield folder / name
    yield root / "images"
    yield root


def _held_out(whole: AnnotatedImages, val_fraction: float, split_seed: int) -> dict[str, AnnotatedImages]:
    images = whole.coco.images
    if not 0 < val_fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, not {val_fraction}")
    if len(images) < 2:
        raise ValueError(f"{whole.coco.file} has a single image: at least two are needed to hold one out")
    count = min(max(1, round(val_fraction * len(images))), len(images) - 1)
    chosen = set(random.Random(split_seed).sample(range(len(images)), count))
    parts = {}
    for name, val in (("train", False), ("val", True)):
        kept = tuple(entry for i, entry in enumerate(images) if (i in chosen) == val)
        ids = {entry.get("id") for entry in kept}
        annotations = tuple(entry for entry in whole.coco.annotations if entry.get("image_id") in ids)
        parts[name] = AnnotatedImages(whole.images, replace(whole.coco, images=kept, annotations=annotations))
    return parts
