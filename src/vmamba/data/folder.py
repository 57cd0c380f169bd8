"""Image folders: one sub-folder per class."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
ON_UNREADABLE = ("error", "skip")


@dataclass(frozen=True)
class Files:
    """Image files with their labels (indices into ``classes``); item ``i`` is (RGB image, label)."""

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.paths[index]), self.labels[index]

    def subset(self, indices: Sequence[int]) -> Files:
        """The files at ``indices``, in that order."""
        return Files(self.classes, tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices))


def read_image(path: str | Path) -> Image.Image:
    """The image at ``path``, decoded whole, as RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, or is damaged; names it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such image: {path}") from None
    # Pillow's plug-ins raise these, and no common class, for damaged files
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def image_folder(root: str | Path, on_unreadable: str = "error") -> Files:
    """The images under ``root/CLASS/``, at any depth, classes and files in alphabetical order.

    With ``on_unreadable="error"`` every file's header is read and the first bad file stops; with ``"skip"`` every
    file is decoded whole (slower) and bad ones are left out.

    Raises:
        FileNotFoundError: ``root`` is no directory.
        ValueError: no class folders, a class folder without images, or unreadable images; names them.
    """
    root = Path(root)
    if on_unreadable not in ON_UNREADABLE:
        raise ValueError(f"on_unreadable must be one of {ON_UNREADABLE}, not {on_unreadable!r}")
    classes = class_folders(root)
    if not classes:
        raise ValueError(f"{root} holds no class folders: put the images of each class into a folder of its own there")
    listed = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    _refuse_empty_classes(root, classes, {label for _, label in listed}, "holds no images")
    bad = _unreadable([path for path, _ in listed], whole=on_unreadable == "skip")
    if bad and on_unreadable == "error":
        shown = "; ".join(str(error) for error in list(bad.values())[:5])
        raise ValueError(
            f"{len(bad)} unreadable image(s) under {root}: {shown}. Remove them or set data.on_unreadable=skip"
        )
    kept = [(path, label) for path, label in listed if path not in bad]
    _refuse_empty_classes(root, classes, {label for _, label in kept}, "holds no readable images")
    return Files(classes, tuple(path for path, _ in kept), tuple(label for _, label in kept))


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
    held_out: list[int] = []
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        if len(members) < 2:
            raise ValueError(f"class {label} has a single image: at least two are needed to hold one out")
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out += rng.sample(members, count)
    held_out_set = set(held_out)
    return [i for i in range(len(labels)) if i not in held_out_set], sorted(held_out)


def _refuse_empty_classes(root: Path, classes: tuple[str, ...], present: set[int], why: str) -> None:
    empty = [name for label, name in enumerate(classes) if label not in present]
    if empty:
        raise ValueError(f"class folder(s) under {root} {why}: {', '.join(empty)}. Fill or remove them")


def _unreadable(paths: list[Path], whole: bool) -> dict[Path, Exception]:
    def check(path: Path) -> Exception | None:
        try:
            if whole:
                read_image(path)
            else:
                with Image.open(path):
                    pass
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return error
        return None

    with ThreadPoolExecutor() as pool:
        return {path: error for path, error in zip(paths, pool.map(check, paths), strict=True) if error is not None}
