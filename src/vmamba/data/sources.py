"""A data source by name: what ``data.source`` in a config may say, split into training, validation and test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .digits import Arrays, load_digits
from .folder import Files, class_folders, image_folder, stratified_split

DIGITS = "digits"
# the test digits are the same ones for everybody, whatever the seed of a run
DIGITS_SPLIT_SEED = 0

Samples = Files | Arrays


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
    """Open ``"digits"`` or an image folder and check it.

    A folder holds ``train/CLASS/`` and ``val/CLASS/`` (and ``test/CLASS/`` where there is one), or just ``CLASS/``:
    then ``val_fraction`` of every class is held out for validation, chosen by ``split_seed``. An optional file
    ``classes.txt`` (folder TAB name on each line) gives classes readable names. Of the digits 20 % are the test set
    and 10 % validation, always the same ones.

    Raises:
        FileNotFoundError, ValueError: something is missing or does not fit; see :func:`~.folder.image_folder`.
    """
    if source == DIGITS:
        return _digits()
    root = Path(source)
    names = class_folders(root)
    if "train" not in names:
        everything = image_folder(root, on_unreadable)
        train, val = stratified_split(everything.labels, val_fraction, split_seed)
        splits = {"train": everything.subset(train), "val": everything.subset(val)}
    else:
        if "val" not in names:
            raise ValueError(f"{root} has a folder train but no folder val beside it; found {', '.join(names)}")
        splits = {name: image_folder(root / name, on_unreadable) for name in ("train", "val", "test") if name in names}
    classes = splits["train"].classes
    for name, files in splits.items():
        if files.classes != classes:
            only_train = sorted(set(classes) - set(files.classes))
            only_here = sorted(set(files.classes) - set(classes))
            raise ValueError(
                f"{root}: train and {name} have different classes; "
                f"only in train: {only_train}, only in {name}: {only_here}"
            )
    if len(classes) < 2:
        raise ValueError(f"{root} has one class only ({classes[0]}): classification needs at least two class folders")
    return Splits(classes, _display_names(root, classes), **splits)


def open_labelled(source: str, classes: tuple[str, ...], on_unreadable: str = "error") -> Samples:
    """Images to evaluate a model with the classes ``classes`` on: the test digits, or a folder's images.

    Of a folder with ``test/`` or ``val/`` that part is taken (in this order), otherwise its class folders. Labels
    are indices into ``classes``; a folder need not hold all of them.

    Raises:
        FileNotFoundError, ValueError: something is missing, or the folder holds classes the model does not know.
    """
    if source == DIGITS:
        splits = _digits()
        if splits.classes != classes:
            raise ValueError(f"the model was trained on other classes than the digits: {', '.join(classes[:5])} ...")
        return splits.test
    root = Path(source)
    part = next((root / name for name in ("test", "val") if (root / name).is_dir()), root)
    files = image_folder(part, on_unreadable)
    unknown = sorted(set(files.classes) - set(classes))
    if unknown:
        raise ValueError(
            f"{part} holds class folders the model was not trained on: {', '.join(unknown[:10])}; "
            f"it knows {', '.join(classes[:10])}{' ...' if len(classes) > 10 else ''}"
        )
    index = {name: i for i, name in enumerate(classes)}
    return Files(classes, files.paths, tuple(index[files.classes[label]] for label in files.labels))


def _digits() -> Splits:
    digits = load_digits()
    rest, test = stratified_split(digits.labels, 0.2, DIGITS_SPLIT_SEED)
    remaining = digits.subset(rest)
    train, val = stratified_split(remaining.labels, 0.125, DIGITS_SPLIT_SEED)
    return Splits(digits.classes, digits.classes, remaining.subset(train), remaining.subset(val), digits.subset(test))


def _display_names(root: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    listing = root / "classes.txt"
    if not listing.is_file():
        return classes
    rows = [line.split("\t") for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(row) != 2 for row in rows):
        raise ValueError(f"{listing}: every line must be a class folder's name, a TAB and the name to show")
    shown = dict(rows)
    return tuple(shown.get(name, name) for name in classes)
