"""What the checks of data sets report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """Something wrong with a data set; ``str`` of it is one line that names the file.

    Attributes:
        kind: what, in short. Any data: "unreadable image". Masks: "no mask", "no image", "same name", "empty part",
            "unreadable mask", "other size", "unknown label". Objects: "no image file", "other image size", "duplicate
            image id", "duplicate annotation id", "unknown image", "unknown category", "other category name",
            "degenerate box", "outside the image", "beyond the image", "no segmentation", "bad segmentation", "empty
            mask", "incomplete entry".
        file: the image or mask it is about (in an archive its name under the archive's); of an empty part the
            folder, of an annotation the JSON.
        message: the whole story, without the file.
        id: in a COCO file, of the image, annotation or category; None where it has none.
    """

    kind: str
    file: Path
    message: str
    id: int | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "file": str(self.file)}
