"""Encoded images: what every source of them offers, how one is decoded, and what becomes of the unreadable ones."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from PIL import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
ON_UNREADABLE = ("error", "skip")
# what Pillow's plug-ins raise, with no common class, for damaged files
DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# how many bad files a message names; `vmamba data check` lists them all
NAMED = 100

logger = logging.getLogger("vmamba.data")


class Samples(Protocol):
    """Labelled images; item ``i`` is (RGB image, label), a label an index into ``classes``."""

    classes: tuple[str, ...]

    @property
    def labels(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...

    def subset(self, indices: Sequence[int]) -> Samples:
        """The samples at ``indices``, in that order."""

    def name(self, index: int) -> str:
        """What to call sample ``index`` in a message: its file, for example."""


@runtime_checkable
class Encoded(Protocol):
    """Samples that are image files somewhere."""

    def encoded(self, index: int) -> bytes:
        """The file's bytes."""


SamplesT = TypeVar("SamplesT", bound=Samples)


def read_image(path: str | Path) -> Image.Image:
    """The image at ``path``, decoded whole, as RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, or is damaged; names it.
    """
    return _decode(path, str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """The image that the bytes ``data`` of the file ``name`` encode, decoded whole, as RGB.

    Raises:
        ValueError: the file is no image, or is damaged; names it.
    """
    return _decode(io.BytesIO(data), name)


def image_size(samples: Samples, index: int) -> tuple[int, int]:
    """(height, width) of a sample in pixels; of a file from its header alone.

    Raises:
        ValueError: the file is no image; names it.
    """
    if not isinstance(samples, Encoded):
        image, _ = samples[index]
        return image.height, image.width
    try:
        with Image.open(io.BytesIO(samples.encoded(index))) as image:
            return image.height, image.width
    except DAMAGE as error:
        raise ValueError(_cannot_read(samples.name(index), error)) from error


def without_unreadable(samples: SamplesT, where: str, on_unreadable: str) -> SamplesT:
    """``samples`` once their files are checked; ``where`` says in messages what they are.

    With ``on_unreadable="error"`` every header is read and a bad one is an error; with ``"skip"`` every file is
    decoded whole, and bad ones are left out and named in one logged warning.

    Raises:
        ValueError: unreadable images, or a class has no readable ones; names them.
    """
    if on_unreadable not in ON_UNREADABLE:
        raise ValueError(f"on_unreadable must be one of {ON_UNREADABLE}, not {on_unreadable!r}")
    if not isinstance(samples, Encoded):
        return samples

    def check(index: int) -> Exception | None:
        try:
            if on_unreadable == "skip":
                samples[index]
            else:
                image_size(samples, index)
        except DAMAGE as error:
            return error
        return None

    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(check, range(len(samples))))
    bad = [str(error) for error in errors if error is not None]
    if not bad:
        return samples
    if on_unreadable == "error":
        raise ValueError(
            f"{len(bad)} unreadable image(s) under {where}: {'; '.join(bad[:5])}. Remove them or set "
            f"data.on_unreadable=skip; `vmamba data check` lists all that cannot be decoded"
        )
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    logger.warning("%d unreadable image(s) under %s left out: %s%s", len(bad), where, "; ".join(bad[:NAMED]), more)
    kept = samples.subset([i for i, error in enumerate(errors) if error is None])
    refuse_empty_classes(kept.classes, kept.labels, where, "hold no readable images")
    return kept


def refuse_empty_classes(classes: tuple[str, ...], labels: Sequence[int], where: str, why: str) -> None:
    """Raise ValueError when a class has no sample."""
    present = set(labels)
    empty = [name for label, name in enumerate(classes) if label not in present]
    if empty:
        raise ValueError(f"class folder(s) under {where} {why}: {', '.join(empty)}. Fill or remove them")


def _decode(file: Any, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such image: {name}") from None
    except DAMAGE as error:
        raise ValueError(_cannot_read(name, error)) from error


def reason_of(error: BaseException) -> str:
    """Why an image cannot be read, without its name."""
    # Pillow names the file, and one that it got as bytes by the address of their buffer
    unknown = isinstance(error, Image.UnidentifiedImageError)
    return "no image file of a kind Pillow knows" if unknown else str(error)


def _cannot_read(name: str, error: BaseException) -> str:
    return f"cannot read the image {name}: {reason_of(error)}"
