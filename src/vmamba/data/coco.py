"""Objects in images, as COCO writes them: one JSON of images, categories and annotations, and a folder of images.

Boxes, polygons, and run-length masks compressed or not. Category ids may be any integers; labels are 1, 2, ... in their
order, since a detector's class 0 is the background.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .._extras import require
from .decoded import DecodedImages
from .findings import Finding
from .packed_masks import PackedMasks, pack_run_lengths, unpack_masks
from .reading import DAMAGE, read_image, reason_of

__all__ = [
    "Category",
    "CocoAnnotations",
    "CocoDataset",
    "check_detection",
    "coco_categories",
    "decode_segmentation",
    "read_coco",
    "segmentation_run_lengths",
]

ON_FINDING = ("error", "skip")
_LEAST_SIDE = 1.0  # pixels of a box's side; the official data set leaves out what is below
_BEYOND = 1.0  # pixels that a box may reach beyond the image: annotation tools round
_SHOWN = 5  # findings in a message

logger = logging.getLogger("vmamba.data")


class Category(NamedTuple):
    """A class of objects: the id that annotations use, and its name."""

    id: int
    name: str


@dataclass(frozen=True)
class CocoAnnotations:
    """A COCO file as it is: nothing repaired, nothing left out. `read_coco` makes one.

    Attributes:
        file: where it came from. images, annotations: the file's own entries. categories: in the order of their ids.
    """

    file: Path
    images: tuple[dict[str, Any], ...]
    annotations: tuple[dict[str, Any], ...]
    categories: tuple[Category, ...]

    @property
    def has_masks(self) -> bool:
        """Whether any annotation has a segmentation."""
        return any(annotation.get("segmentation") for annotation in self.annotations)


def coco_categories() -> tuple[Category, ...]:
    """The 80 categories of COCO with their ids, 1 to 90, which leave out ten numbers."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return tuple(Category(i, name) for i, name in enumerate(names) if name not in ("__background__", "N/A"))


def read_coco(file: str | Path) -> CocoAnnotations:
    """Read a COCO file. Whether its entries make sense is for :func:`check_detection`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or not of COCO's form; names the file and the part.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no annotation file {file}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    parts = {}
    for name in ("images", "annotations", "categories"):
        part = content.get(name) if isinstance(content, dict) else None
        if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
            raise ValueError(f"{file} is no COCO annotation file: it has no list {name!r} of objects")
        parts[name] = tuple(part)
    categories = []
    for entry in parts["categories"]:
        if not _is_id(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise ValueError(f"{file}: a category needs an integer id and a name, got {entry}")
        categories.append(Category(entry["id"], entry["name"]))
    if not categories:
        raise ValueError(f"{file} has no categories")
    if twice := [i for i, n in Counter(category.id for category in categories).items() if n > 1]:
        raise ValueError(f"{file} has two categories of id {twice[0]}")
    return CocoAnnotations(file, parts["images"], parts["annotations"], tuple(sorted(categories)))


def check_detection(
    images: str | Path,
    annotations: str | Path | CocoAnnotations,
    *,
    categories: Sequence[Category] | None = None,
    masks: bool | None = None,
) -> list[Finding]:
    """Everything that is wrong with a COCO data set, in the order of the file: images first, then annotations.

    Image files are decoded, and segmentations rasterised, in memory.

    Args:
        images: the folder that `file_name` is relative to.
        annotations: the JSON, or what `read_coco` made of it.
        categories: the list that annotations must keep to; the file's own when None.
        masks: whether every annotation needs a segmentation; None: if any has one.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or the file is no COCO file; see `read_coco`.
    """
    coco = annotations if isinstance(annotations, CocoAnnotations) else read_coco(annotations)
    masks = coco.has_masks if masks is None else masks
    known = coco.categories if categories is None else categories
    return [finding for _, finding in _examine(Path(images), coco, known, masks, decode=True)]


class CocoDataset(Dataset):
    """Images with their objects; item ``i`` is (image, target), through ``transform`` where there is one.

    The image is a torchvision `Image` (3, H, W) uint8. The target is a dict of `boxes` (N, 4) x1 y1 x2 y2 fp32 in
    pixels, `labels` (N,) int64 from 1, `masks` (N, H, W) bool where asked for, and `image_id` () int64: torchvision's
    `tv_tensors`, which its v2 transforms move along with the image. Crowds are no objects and are left out, as in the
    official training.

    Args:
        images: the folder that `file_name` is relative to.
        annotations: the JSON, or what `read_coco` made of it.
        categories: what the labels 1, 2, ... stand for; the file's own when None.
        masks: whether targets have masks; None: if the file has any.
        keep_empty: keep images without objects (for evaluation); training leaves them out.
        on_finding: "error" refuses a data set that `check_detection` finds anything wrong with (of images only the
            headers are read here). "skip" leaves out what cannot be used, and logs it, and clips boxes to their images.
        transform: called with (image, target), gives both.

    Raises:
        FileNotFoundError, ValueError: folder or file are missing or damaged, the check found something, or no image is
            left. Names files and ids.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path | CocoAnnotations,
        *,
        categories: Sequence[Category] | None = None,
        masks: bool | None = None,
        keep_empty: bool = False,
        on_finding: str = "error",
        transform: Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]] | None = None,
    ):
        if on_finding not in ON_FINDING:
            raise ValueError(f"on_finding must be one of {ON_FINDING}, not {on_finding!r}")
        coco = annotations if isinstance(annotations, CocoAnnotations) else read_coco(annotations)
        self.images = Path(images)
        self.coco = coco
        self.categories = tuple(coco.categories if categories is None else categories)
        self.masks = coco.has_masks if masks is None else masks
        self.packed = False
        self.transform = transform
        if self.masks and not coco.has_masks:
            raise ValueError(f"{coco.file} has no segmentations: set masks=False to train on boxes alone")
        findings = list(_examine(self.images, coco, self.categories, self.masks))
        if findings:
            shown = "; ".join(str(finding) for _, finding in findings[:_SHOWN])
            more = f"; and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
            told = f"{len(findings)} finding(s) in {coco.file}: {shown}{more}"
            if on_finding == "error":
                raise ValueError(f"{told}. Repair them, or set on_finding='skip' (of a run: data.on_unreadable=skip)")
            logger.warning("%s. What cannot be used is left out; `vmamba data check --task detection` names all", told)
        unusable = {id(entry) for entry, finding in findings if finding.kind != "beyond the image"}
        self._decoded: DecodedImages | None = None
        self._objects: dict[int, list[dict[str, Any]]] = {}
        for entry in coco.annotations:
            if id(entry) not in unusable and not entry.get("iscrowd"):
                self._objects.setdefault(entry["image_id"], []).append(entry)
        self._entries = [
            entry for entry in coco.images if id(entry) not in unusable and (keep_empty or entry["id"] in self._objects)
        ]
        if not self._entries:
            raise ValueError(f"{coco.file} leaves no image to use: none has an object that can be learnt from")

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def image_ids(self) -> list[int]:
        """The ids of the images, in the order of the items."""
        return [entry["id"] for entry in self._entries]

    def file(self, index: int) -> Path:
        """The image file of an item."""
        return self.images / self._entries[index]["file_name"]

    def without_masks(self) -> CocoDataset:
        """The same items without masks: evaluation takes them from the annotations."""
        other = copy.copy(self)
        other.masks = False
        return other

    def with_packed_masks(self) -> CocoDataset:
        """The same items, for the detection task: in the place of `masks` targets have `packed_masks`.

        They are :class:`~.packed_masks.PackedMasks` (ceil(N / 8), H, W) uint8.
        """
        other = copy.copy(self)
        other.packed = True
        return other

    def load(self) -> None:
        """Decode all images, and compress all masks to run lengths, so that items come from memory from now on.

        Raises:
            ValueError: an image is damaged, or there is too little memory.
        """
        if self._decoded is not None:
            return
        shapes = []
        for i in range(len(self)):
            with Image.open(self.file(i)) as image:
                shapes.append((3, image.height, image.width))
        self._decoded = DecodedImages(shapes, lambda i: np.array(read_image(self.file(i))).transpose(2, 0, 1))
        if self.masks:
            for entry, (_, *size) in zip(self._entries, shapes, strict=True):
                objects = self._objects.get(entry["id"], [])
                self._objects[entry["id"]] = [
                    one | {"segmentation": segmentation_run_lengths(one["segmentation"], tuple(size))}
                    for one in objects
                ]

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        entry = self._entries[index]
        pixels = read_image(self.file(index)) if self._decoded is None else self._decoded[index]
        image = tv_tensors.Image(pixels)
        target = self._target(entry["id"], tuple(image.shape[-2:]))
        return (image, target) if self.transform is None else self.transform(image, target)

    def _target(self, image_id: int, size: tuple[int, int]) -> dict[str, Any]:
        objects = self._objects.get(image_id, [])
        label = {category.id: i for i, category in enumerate(self.categories, start=1)}
        boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, size[1])
        boxes[:, 1::2].clamp_(0, size[0])
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([label[entry["category_id"]] for entry in objects], dtype=torch.int64),
            "image_id": torch.tensor(image_id),
        }
        if self.masks:
            planes = pack_run_lengths([segmentation_run_lengths(one["segmentation"], size) for one in objects], size)
            if self.packed:
                target["packed_masks"] = PackedMasks(planes)
            else:
                target["masks"] = tv_tensors.Mask(unpack_masks(planes, len(objects)))
        return target


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> Tensor:
    """COCO's segmentation as a mask (H, W) bool: a list of polygons, or run lengths, compressed or not.

    Raises:
        ValueError: it is none of these, or its run lengths are for another size.
    """
    runs = segmentation_run_lengths(segmentation, size)
    try:
        return torch.from_numpy(require("faster_coco_eval.core.mask", "det").decode(runs) != 0)
    except RuntimeError as error:  # of a text that is no compressed run lengths
        raise ValueError(str(error)) from error


def segmentation_run_lengths(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's segmentation as compressed run lengths, {"size": [H, W], "counts": bytes}, for an image of `size` (H, W).

    Raises:
        ValueError: as `decode_segmentation`.
    """
    library = require("faster_coco_eval.core.mask", "det")
    if isinstance(segmentation, list):
        if not segmentation or not all(_is_polygon(polygon) for polygon in segmentation):
            raise ValueError("a polygon is a list of x1, y1, x2, y2, ... of at least three points")
        return library.merge(library.frPyObjects(segmentation, *size))
    if not isinstance(segmentation, Mapping) or not {"size", "counts"} <= set(segmentation):
        raise ValueError("a segmentation is a list of polygons, or run lengths with 'size' and 'counts'")
    stated = segmentation["size"]
    if not isinstance(stated, (list, tuple)) or tuple(stated) != tuple(size):
        raise ValueError(f"run lengths for height and width {stated} in an image of {list(size)}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if not all(_is_id(count) and count >= 0 for count in counts):
            raise ValueError("run lengths must be numbers of pixels, none of them negative")
        if sum(counts) != size[0] * size[1]:
            raise ValueError(f"run lengths of {sum(counts)} pixels in an image of {size[0] * size[1]}")
        return library.frPyObjects(dict(segmentation), *size)
    return {"size": list(size), "counts": counts.encode() if isinstance(counts, str) else counts}


def _examine(
    folder: Path, coco: CocoAnnotations, categories: Iterable[Category], masks: bool, *, decode: bool = False
) -> Iterator[tuple[Any, Finding]]:
    """Findings, each with the entry of the file that it is about; `decode`: read whole images, not headers alone."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder {folder}")
    names = {category.id: category.name for category in categories}
    for category in coco.categories:
        if category.name != names.get(category.id, category.name):
            message = f"category {category.id} is {category.name!r} here, but {names[category.id]!r} in the list"
            yield category, Finding("other category name", coco.file, message, category.id)
    paths = [folder / entry["file_name"] for entry in coco.images if isinstance(entry.get("file_name"), str)]
    with ThreadPoolExecutor() as pool:
        opened = dict(zip(paths, pool.map(partial(_size_in_file, decode=decode), paths), strict=True))
    sizes: dict[int, tuple[int, int]] = {}
    for entry in coco.images:
        for finding in _image_findings(folder, coco.file, entry, opened, sizes):
            yield entry, finding
    seen: set[int] = set()
    for entry in coco.annotations:
        for finding in _annotation_findings(coco.file, entry, sizes, set(names), seen, masks):
            yield entry, finding


def _size_in_file(path: Path, decode: bool) -> tuple[int, int] | Exception:
    """Height and width of an image file, or what is wrong with it."""
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            return image.height, image.width
    except DAMAGE as error:
        return error


def _image_findings(
    folder: Path,
    file: Path,
    entry: Mapping[str, Any],
    opened: Mapping[Path, tuple[int, int] | Exception],
    sizes: dict[int, tuple[int, int]],
) -> Iterator[Finding]:
    """What is wrong with an image's entry; notes the size of a usable one in `sizes`."""
    number, name = entry.get("id"), entry.get("file_name")
    if not _is_id(number) or not isinstance(name, str):
        message = f"an image needs an integer id and a file_name, got {_short(entry)}"
        yield Finding("incomplete entry", file, message)
        return
    if number in sizes:
        yield Finding("duplicate image id", file, f"two images of id {number}, the second is {name}", number)
        return
    path = folder / name
    stated = (entry.get("height"), entry.get("width"))
    if all(isinstance(side, int) and side > 0 for side in stated):
        sizes[number] = stated
    size = opened[path]
    if isinstance(size, FileNotFoundError):
        yield Finding("no image file", path, f"image {number} is not there", number)
        return
    if isinstance(size, Exception):
        yield Finding("unreadable image", path, f"image {number} cannot be read: {reason_of(size)}", number)
        return
    if number in sizes and sizes[number] != size:
        message = f"image {number} is {size} pixels high and wide, {file.name} says {stated}"
        yield Finding("other image size", path, message, number)
    sizes[number] = size


def _annotation_findings(
    file: Path,
    entry: Mapping[str, Any],
    sizes: Mapping[int, tuple[int, int]],
    known: set[int],
    seen: set[int],
    masks: bool,
) -> Iterator[Finding]:
    """What is wrong with an annotation; notes its id in `seen`. Ends with the first thing that makes it unusable."""
    number = entry.get("id")

    def finding(kind: str, message: str) -> Finding:
        return Finding(kind, file, f"annotation {number}: {message}", number if _is_id(number) else None)

    if not _is_id(number):
        yield finding("incomplete entry", f"an annotation needs an integer id, got {_short(entry)}")
        return
    if number in seen:
        yield finding("duplicate annotation id", "another one has this id")
        return
    seen.add(number)
    if not _is_id(entry.get("image_id")) or entry["image_id"] not in sizes:
        yield finding("unknown image", f"there is no image of id {entry.get('image_id')}")
        return
    if not _is_id(entry.get("category_id")) or entry["category_id"] not in known:
        yield finding("unknown category", f"category id {entry.get('category_id')} is not in the list of categories")
        return
    size = sizes[entry["image_id"]]
    box = entry.get("bbox")
    if not _is_box(box):
        yield finding("degenerate box", f"bbox must be four numbers x, y, width, height, got {_short(box)}")
        return
    x, y, width, height = box
    if width < _LEAST_SIDE or height < _LEAST_SIDE:
        yield finding("degenerate box", f"bbox {box} (x, y, width, height) has a side of less than a pixel")
        return
    inside = (min(x + width, size[1]) - max(x, 0), min(y + height, size[0]) - max(y, 0))
    where = f"image {entry['image_id']} of {size[1]} x {size[0]} pixels (width x height)"
    if min(inside) < _LEAST_SIDE:
        yield finding("outside the image", f"bbox {box} lies outside {where}")
        return
    if x < -_BEYOND or y < -_BEYOND or x + width > size[1] + _BEYOND or y + height > size[0] + _BEYOND:
        yield finding("beyond the image", f"bbox {box} reaches beyond {where}")
    segmentation = entry.get("segmentation")
    if not segmentation:
        if masks and not entry.get("iscrowd"):
            yield finding("no segmentation", "it has no segmentation, others have")
        return
    try:
        if isinstance(segmentation, list):
            library = require("faster_coco_eval.core.mask", "det")
            area = int(library.area(segmentation_run_lengths(segmentation, size)))
        else:  # whether compressed run lengths are of this size shows when they are decoded
            area = int(decode_segmentation(segmentation, size).sum())
    except (ValueError, TypeError) as error:
        yield finding("bad segmentation", str(error))
        return
    if area == 0:
        yield finding("empty mask", "its segmentation covers no pixel")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(_is_number(number) for number in value)


def _is_polygon(value: Any) -> bool:
    if not isinstance(value, list) or len(value) < 6 or len(value) % 2:
        return False
    numbers = np.array(value)
    return numbers.dtype.kind in "iuf" and bool(np.isfinite(numbers).all())


def _short(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
