"""A data source by name: what ``data.source`` in a config may say, split into training, validation and test."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from . import hub
from .archives import SPLITS, archives_of, open_archives
from .arrays import Arrays, is_mosaic, load_digits, load_mosaic
from .folder import class_folders, list_folder, stratified_split
from .reading import Samples, without_unreadable

__all__ = ["DIGITS", "Samples", "Splits", "open_labelled", "open_source"]

DIGITS = "digits"
# the test digits are the same ones for everybody, whatever the seed of a run
DIGITS_SPLIT_SEED = 0
# the split of a source that has none
WHOLE = ""


@dataclass(frozen=True)
class Splits:
    """Samples of one source. ``test`` is None where the source has none apart from the validation images.

    ``display_names[i]`` is what to show for class ``i``: its folder's name, or what ``classes.txt`` says.
    """

    classes: tuple[str, ...]
    display_names: tuple[str, ...]
    train: Samples
    val: Samples
    test: Samples | None = None


def open_source(source: str, *, val_fraction: float, split_seed: int, on_unreadable: str = "error") -> Splits:
    """Open a source of labelled images and check it. ``source`` is

    * ``"digits"``, scikit-learn's handwritten digits: 20 % are the test set and 10 % validation, always the same ones;
    * an image folder: ``train/CLASS/`` and ``val/CLASS/`` (and ``test/CLASS/`` where there is one), or just ``CLASS/``;
    * a zip or tar file, or a folder of them: see :func:`~.archives.open_archives`;
    * a zip file of mosaics, such as CIFAR-10's: see :func:`~.arrays.load_mosaic`;
    * ``"hfds/NAME"``, a data set of the Hugging Face library: see :func:`~.hub.open_hub`.

    Where there is no ``val`` part, ``val_fraction`` of every class of the training images is held out, chosen by
    ``split_seed``. An optional file ``classes.txt``
    (folder TAB name on each line) gives classes readable names. What becomes of unreadable images: see
    :func:`~.reading.without_unreadable`.

    Raises:
        FileNotFoundError, ValueError: something is missing or does not fit.
    """
    parts, listing = list_parts(source)
    if source == DIGITS:
        return Splits(parts["train"].classes, parts["train"].classes, **parts)
    parts = {
        name: without_unreadable(samples, f"{source} ({name})" if name else source, on_unreadable)
        for name, samples in parts.items()
    }
    if set(parts) == {WHOLE}:
        parts = {"train": parts[WHOLE]}
    if "train" not in parts or WHOLE in parts:
        found = ", ".join(name or "images in no split" for name in parts)
        raise ValueError(f"{source} must have a part train, or no parts at all; found {found}")
    if "val" not in parts:
        everything = parts["train"]
        train, val = stratified_split(everything.labels, val_fraction, split_seed)
        parts |= {"train": everything.subset(train), "val": everything.subset(val)}
    classes = parts["train"].classes
    difference = class_difference(parts)
    if difference:
        raise ValueError(f"{source}: {difference}")
    if len(classes) < 2:
        raise ValueError(f"{source} has one class only ({classes[0]}): classification needs at least two")
    return Splits(classes, _display_names(source, classes, listing), **parts)


def open_labelled(source: str, classes: tuple[str, ...], on_unreadable: str = "error") -> Samples:
    """Images to evaluate a model with the classes ``classes`` on.

    Of a source with a test or validation part that is taken (in this order), otherwise all images. Labels are indices
    into ``classes``; the source need not hold all of them.

    Raises:
        FileNotFoundError, ValueError: something is missing, or the source holds classes the model does not know.
    """
    parts, _ = list_parts(source)
    part = next(name for name in ("test", "val", WHOLE, "train") if name in parts)
    samples = parts[part]
    where = f"{source} ({part})" if part else source
    unknown = sorted(set(samples.classes) - set(classes))
    if unknown:
        raise ValueError(
            f"{where} holds classes the model was not trained on: {', '.join(unknown[:10])}; "
            f"it knows {', '.join(classes[:10])}{' ...' if len(classes) > 10 else ''}"
        )
    index = {name: i for i, name in enumerate(classes)}
    samples = without_unreadable(samples, where, on_unreadable)
    labels = tuple(index[samples.classes[label]] for label in samples.labels)
    return replace(samples, classes=classes, labels=labels)


def list_parts(source: str) -> tuple[dict[str, Samples], str | None]:
    """What ``source`` holds by split ("", for images in none, "train", "val", "test"), no image opened yet.

    The second result is the text of its ``classes.txt``, None where it has none.

    Raises:
        FileNotFoundError, ValueError: there is no such source, or it is of no kind that :func:`open_source` knows.
    """
    parts, text = _list(source)
    return {name: parts[name] for name in (WHOLE, *SPLITS) if name in parts}, text


def class_difference(parts: Mapping[str, Samples]) -> str | None:
    """How the classes of the parts differ from those of the first, in words; None where they are the same."""
    (first, reference), *others = parts.items()
    for name, samples in others:
        if samples.classes != reference.classes:
            return (
                f"{first} and {name} have different classes; "
                f"only in {first}: {sorted(set(reference.classes) - set(samples.classes))}, "
                f"only in {name}: {sorted(set(samples.classes) - set(reference.classes))}"
            )
    return None


def _list(source: str) -> tuple[Mapping[str, Samples], str | None]:
    if source == DIGITS:
        return _digits(), None
    if source.startswith(hub.PREFIX):
        return hub.open_hub(source), None
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no such data folder: {source}")
    archives = archives_of(path)
    if path.is_file() and not archives:
        raise ValueError(f"{source} is no folder of images and no zip or tar file")
    if len(archives) == 1 and archives[0].suffix.lower() == ".zip" and _holds_mosaics(archives[0]):
        return load_mosaic(archives[0]), None
    if archives:
        return open_archives(path)
    names = class_folders(path)
    listing = path / "classes.txt"
    text = listing.read_text(encoding="utf-8") if listing.is_file() else None
    # a class may be called "val", but then its folder holds images
    parts = [name for name in SPLITS if name in names and (name == "train" or class_folders(path / name))]
    return {name: list_folder(path / name if name else path) for name in parts or [WHOLE]}, text


def _digits() -> dict[str, Arrays]:
    digits = load_digits()
    rest, test = stratified_split(digits.labels, 0.2, DIGITS_SPLIT_SEED)
    remaining = digits.subset(rest)
    train, val = stratified_split(remaining.labels, 0.125, DIGITS_SPLIT_SEED)
    return {"train": remaining.subset(train), "val": remaining.subset(val), "test": digits.subset(test)}


def _holds_mosaics(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return is_mosaic(archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False  # open_archives says what is wrong


def _display_names(source: str, classes: tuple[str, ...], listing: str | None) -> tuple[str, ...]:
    rows = [line.split("\t") for line in (listing or "").splitlines() if line.strip()]
    if tuple(row[0].strip() for row in rows) == classes and all(len(row) == 1 for row in rows):
        return classes
    if any(len(row) != 2 for row in rows):
        raise ValueError(
            f"{source}: every line of classes.txt must be a class folder's name, a TAB and the name to show"
        )
    shown = dict(rows)
    return tuple(shown.get(name, name) for name in classes)
