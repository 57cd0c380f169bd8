"""Where the images and masks of a data set lie, and what its labels mean: found by the layout of its folder."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..reading import IMAGE_SUFFIXES
from .classes import ADE20K_CLASSES, CAMVID_CLASSES
from .masks import IGNORED, LabelMap, MaskedImages

# a part's name here -> the folders that data sets call it by
PART_NAMES = {"train": ("train", "training"), "val": ("val", "validation"), "test": ("test", "testing")}
WHOLE = "all"  # the only part of a data set without parts
MASK_FOLDERS = ("masks", "annotations", "labels")


@dataclass(frozen=True)
class Part:
    """One part of a data set: a folder of images, and a folder of masks with the same names."""

    images: Path
    masks: Path


@dataclass(frozen=True)
class SegmentationSource:
    """A data set on the disk. ``parts`` has "train", "val" and, where there is one, "test"; or "all" alone.

    ``partly_labelled``: the masks are of some of the images, and the others are left out.
    """

    root: Path
    classes: tuple[str, ...]
    labels: LabelMap
    parts: dict[str, Part]
    partly_labelled: bool = False


@dataclass(frozen=True)
class SegmentationSplits:
    """The data of one source. ``test`` is None where the source has none apart from the validation images."""

    classes: tuple[str, ...]
    train: MaskedImages
    val: MaskedImages
    test: MaskedImages | None = None


@dataclass(frozen=True)
class Pairs:
    """Files of one part: images with their masks, and what has no counterpart."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    without_mask: tuple[Path, ...]
    without_image: tuple[Path, ...]
    same_name: tuple[Path, ...]


def find_segmentation(
    root: str | Path, *, classes: Sequence[str] | None = None, ignored: Sequence[int] = (IGNORED,)
) -> SegmentationSource:
    """Recognise a data set by its folder. Nothing but names is looked at.

    * ADE20K: ``images/training`` and ``annotations/training`` (150 classes numbered from 1; 0 is ignored), ``root``
      being ``ADEChallengeData2016`` or the folder that holds it.
    * CamVid with 11 classes (11 is ignored): ``train`` and ``trainannot`` side by side; or ``images/train`` and
      ``annotations/train`` with its class names in ``classes.txt``.
    * ``images`` and ``masks`` (or ``annotations``, ``labels``), with ``train``, ``val`` and perhaps ``test`` inside
      both, or without: a mask has its image's name and holds class numbers from 0. ``classes.txt`` names the
      classes, one a line.
    * ``train``, ``val`` and ``semseg/train``, ``semseg/val`` with ``semseg/classes.json`` (a list of objects with a
      ``name``), as above; images without mask are left out.

    Args:
        classes, ignored: of a folder of the third kind: class names in place of ``classes.txt``, and numbers in the
            masks that stand for no class.

    Raises:
        FileNotFoundError: there is no such folder, or none of these layouts in it.
        ValueError: the class names are missing or unreadable.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no such data folder: {root}")
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    if (root / "trainannot").is_dir():
        parts = {
            name: Part(root / name, root / f"{name}annot") for name in PART_NAMES if (root / f"{name}annot").is_dir()
        }
        return _camvid(root, parts)
    if (root / "semseg").is_dir():
        parts = _parts(root, root / "semseg")
        names = _json_classes(root / "semseg" / "classes.json")
        return _from_zero(root, names, ignored, parts, partly_labelled=True)
    masks = next((root / name for name in MASK_FOLDERS if (root / name).is_dir()), None)
    if masks is None or not (root / "images").is_dir():
        raise FileNotFoundError(
            f"{root} is no segmentation data set: put the pictures under {root / 'images'} and index masks of the same "
            f"names under {root / 'masks'}, both with train/ and val/ inside or neither"
        )
    parts = _parts(root / "images", masks)
    if classes is None and (root / "images" / "training").is_dir() and masks.name == "annotations":
        labels = LabelMap(tuple(range(1, len(ADE20K_CLASSES) + 1)), ignored=(0,))
        return SegmentationSource(root, ADE20K_CLASSES, labels, parts)
    names = tuple(classes) if classes is not None else _text_classes(root)
    if names[: len(CAMVID_CLASSES)] == CAMVID_CLASSES and len(names) <= len(CAMVID_CLASSES) + 1:
        return _camvid(root, parts)
    return _from_zero(root, names, ignored, parts)


def open_segmentation(
    source: str | Path | SegmentationSource, *, val_fraction: float = 0.1, split_seed: int = 0
) -> SegmentationSplits:
    """The data of a source. Of one without parts, ``val_fraction`` is held out, chosen by ``split_seed``.

    Files are paired by name and not read; `check_segmentation` reads them.

    Raises:
        FileNotFoundError, ValueError: as `find_segmentation`; a part is missing or has no images; an image has no mask
            or a mask no image, naming the files.
    """
    if not isinstance(source, SegmentationSource):
        source = find_segmentation(source)
    opened = {name: _open_part(source, part) for name, part in source.parts.items()}
    if WHOLE in opened:
        everything = opened[WHOLE]
        if not 0 < val_fraction < 1:
            raise ValueError(f"the held-out fraction must lie between 0 and 1, not {val_fraction}")
        if len(everything) < 2:
            raise ValueError(f"{source.root} holds a single image: at least two are needed to hold one out")
        count = min(max(1, round(val_fraction * len(everything))), len(everything) - 1)
        held_out = sorted(random.Random(split_seed).sample(range(len(everything)), count))
        rest = sorted(set(range(len(everything))) - set(held_out))
        return SegmentationSplits(source.classes, everything.subset(rest), everything.subset(held_out))
    missing = [name for name in ("train", "val") if name not in opened]
    if missing:
        raise ValueError(f"{source.root} has no part {missing[0]!r}: it has {', '.join(opened)}")
    return SegmentationSplits(source.classes, opened["train"], opened["val"], opened.get("test"))


def pair_files(part: Part) -> Pairs:
    """Pair the images and masks of a part by their path inside their folders, without the ending.

    Raises:
        FileNotFoundError: a folder is missing.
    """
    images, twice = _by_name(part.images)
    masks, masks_twice = _by_name(part.masks)
    both = [name for name in images if name in masks]
    return Pairs(
        images=tuple(images[name] for name in both),
        masks=tuple(masks[name] for name in both),
        without_mask=tuple(path for name, path in images.items() if name not in masks),
        without_image=tuple(path for name, path in masks.items() if name not in images),
        same_name=(*twice, *masks_twice),
    )


def _open_part(source: SegmentationSource, part: Part) -> MaskedImages:
    pairs = pair_files(part)
    if not pairs.images:
        raise ValueError(f"no image under {part.images} has a mask of its name under {part.masks}")
    for files, what in (
        (() if source.partly_labelled else pairs.without_mask, f"image(s) without a mask under {part.masks}"),
        (pairs.without_image, f"mask(s) without an image under {part.images}"),
        (pairs.same_name, "file(s) with the name of another, apart from the ending"),
    ):
        if files:
            shown = ", ".join(map(str, files[:5])) + (" ..." if len(files) > 5 else "")
            raise ValueError(f"{len(files)} {what}: {shown}")
    return MaskedImages(source.classes, source.labels, pairs.images, pairs.masks)


def _by_name(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no such data folder: {folder}")
    found: dict[str, Path] = {}
    twice = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith("."):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                twice.append(path)
            found.setdefault(name, path)
    return found, twice


def _parts(images: Path, masks: Path) -> dict[str, Part]:
    parts = {}
    for name, folders in PART_NAMES.items():
        folder = next((f for f in folders if (masks / f).is_dir() and (images / f).is_dir()), None)
        if folder is not None:
            parts[name] = Part(images / folder, masks / folder)
    return parts or {WHOLE: Part(images, masks)}


def _camvid(root: Path, parts: dict[str, Part]) -> SegmentationSource:
    classes = len(CAMVID_CLASSES)
    return SegmentationSource(root, CAMVID_CLASSES, LabelMap(tuple(range(classes)), ignored=(classes,)), parts)


def _from_zero(
    root: Path, names: tuple[str, ...], ignored: Sequence[int], parts: dict[str, Part], partly_labelled: bool = False
) -> SegmentationSource:
    """Labels 0, 1, ... in the order of the names; an ignored one among them is no class."""
    values = tuple(i for i in range(len(names)) if i not in ignored)
    classes = tuple(names[i] for i in values)
    return SegmentationSource(root, classes, LabelMap(values, tuple(ignored)), parts, partly_labelled)


def _text_classes(root: Path) -> tuple[str, ...]:
    listing = root / "classes.txt"
    if not listing.is_file():
        raise FileNotFoundError(f"{root} does not name its classes: write {listing}, one name a line, class 0 first")
    names = tuple(line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip())
    if not names:
        raise ValueError(f"{listing} is empty: write one class name a line, class 0 first")
    return names


def _json_classes(listing: Path) -> tuple[str, ...]:
    try:
        return tuple(entry["name"] for entry in json.loads(listing.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FileNotFoundError(f"the classes are not named: there is no {listing}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{listing} must be a list of objects with a name, class 0 first: {error!r}") from error
