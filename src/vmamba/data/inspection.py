"""What is in a data set and what is wrong with it: every image decoded whole, everything that fails named."""

from __future__ import annotations

import hashlib
import io
import statistics
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from .findings import Finding
from .reading import DAMAGE, Encoded, Samples, decode_image
from .sources import class_difference, list_parts

# a line of progress after so many images
PROGRESS_EVERY = 10_000


@dataclass(frozen=True)
class SizeRange:
    """Of all readable images the least, the median and the greatest, in pixels."""

    least: int
    median: float
    most: int

    @classmethod
    def of(cls, values: list[int]) -> SizeRange:
        return cls(min(values), statistics.median(values), max(values))


@dataclass
class PartReport:
    """One part of a source ("train", "val", "test", "" where there are none).

    ``formats`` and ``modes`` count the readable images as Pillow names them ("JPEG"; "RGB", "L", "CMYK"); all are
    converted to RGB when they are used. ``several_frames`` counts animations, of which the first frame is used.
    """

    images: int
    images_of_class: dict[str, int]
    unreadable: list[Finding] = field(default_factory=list)
    height: SizeRange | None = None
    width: SizeRange | None = None
    formats: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    several_frames: int = 0


@dataclass
class DataReport:
    """``same_file`` are images whose files are equal byte for byte, in different parts or under different classes."""

    source: str
    parts: dict[str, PartReport]
    class_difference: str | None
    same_file: list[tuple[str, str]] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether training could use everything as it is: all images readable, the same classes in all parts."""
        return self.class_difference is None and not any(part.unreadable for part in self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = {"usable": self.usable, **asdict(self)}
        for name, part in self.parts.items():
            plain["parts"][name]["unreadable"] = [finding.as_dict() for finding in part.unreadable]
        return plain


@dataclass(frozen=True)
class _Seen:
    digest: bytes | None
    finding: Finding | None = None
    height: int = 0
    width: int = 0
    format: str = "array"
    mode: str = "RGB"
    frames: int = 1


def inspect(source: str, progress: Callable[[str], None] = lambda message: None) -> DataReport:
    """Decode every image of ``source`` (see :func:`~.sources.open_source`) and say what there is.

    Args:
        progress: told how far it is, a line each time.

    Raises:
        FileNotFoundError, ValueError: there is no such source, or it cannot be listed; names what is wrong.
    """
    parts, _ = list_parts(source)
    report = DataReport(source, {}, class_difference(parts))
    first_with: dict[bytes, tuple[str, str, str]] = {}
    for name, samples in parts.items():
        report.parts[name], seen = _inspect_part(name, samples, progress)
        for index, one in enumerate(seen):
            if one.digest is None:
                continue
            here = (name, samples.classes[samples.labels[index]], samples.name(index))
            earlier = first_with.setdefault(one.digest, here)
            if earlier[:2] != here[:2]:
                report.same_file.append((earlier[2], here[2]))
    return report


def _inspect_part(name: str, samples: Samples, progress: Callable[[str], None]) -> tuple[PartReport, list[_Seen]]:
    counts = Counter(samples.labels)
    part = PartReport(len(samples), {title: counts[label] for label, title in enumerate(samples.classes)})
    seen: list[_Seen] = []
    with ThreadPoolExecutor() as pool:
        for one in pool.map(lambda index: _look_at(samples, index), range(len(samples))):
            seen.append(one)
            if len(seen) % PROGRESS_EVERY == 0:
                progress(f"{name or 'images'}: {len(seen):,} of {len(samples):,}")
    good = [one for one in seen if one.finding is None]
    part.unreadable = [one.finding for one in seen if one.finding is not None]
    if good:
        part.height, part.width = (SizeRange.of([getattr(one, side) for one in good]) for side in ("height", "width"))
    part.formats = dict(Counter(one.format for one in good).most_common())
    part.modes = dict(Counter(one.mode for one in good).most_common())
    part.several_frames = sum(one.frames > 1 for one in good)
    return part, seen


def _look_at(samples: Samples, index: int) -> _Seen:
    if not isinstance(samples, Encoded):
        image, _ = samples[index]
        return _Seen(None, height=image.height, width=image.width)
    name = samples.name(index)
    try:
        data = samples.encoded(index)
        decode_image(data, name)
        with Image.open(io.BytesIO(data)) as image:
            digest = hashlib.blake2b(data, digest_size=16).digest()
            frames = getattr(image, "n_frames", 1)
            return _Seen(digest, None, image.height, image.width, image.format or "?", image.mode, frames)
    except DAMAGE as error:
        return _Seen(None, Finding("unreadable image", Path(name), str(error)))
