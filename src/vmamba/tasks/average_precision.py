"""COCO's average precision of boxes and masks, through faster-coco-eval; and detections as COCO's results.

A result is a dict of `image_id`, `category_id`, `score`, and `bbox` (x, y, width, height) or `segmentation` (run
lengths).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._extras import require
from .._files import write_text
from ..data import Category, CocoAnnotations, read_coco, segmentation_run_lengths

__all__ = [
    "AveragePrecision",
    "as_coco",
    "average_precision",
    "box_results",
    "mask_results",
    "read_results",
    "write_results",
]

_IOU_TYPES = {"box": "bbox", "mask": "segm"}
_PIXELS_TOGETHER = 2**28  # of masks encoded at once on a GPU: 270 MB, and as much again for each of four steps


@dataclass(frozen=True)
class AveragePrecision:
    """In percent; NaN where there is nothing to find.

    Attributes:
        ap: over the ten IoU thresholds 0.50, 0.55, ..., 0.95. ap50, ap75: at one of them.
        small, medium, large: `ap` of objects of less than 32^2, up to 96^2, and more pixels.
        by_category: `ap` of each category, by name.
    """

    ap: float
    ap50: float
    ap75: float
    small: float
    medium: float
    large: float
    by_category: dict[str, float]

    def as_dict(self, prefix: str) -> dict[str, float]:
        """The six figures as `{prefix}_ap`, `_ap50`, `_ap75`, `_aps`, `_apm`, `_apl`."""
        figures = (self.ap, self.ap50, self.ap75, self.small, self.medium, self.large)
        names = ("ap", "ap50", "ap75", "aps", "apm", "apl")
        return {f"{prefix}_{name}": figure for name, figure in zip(names, figures, strict=True)}


def box_results(
    detections: Mapping[str, Tensor], image_id: int, categories: Sequence[Category]
) -> list[dict[str, Any]]:
    """An image's detections, as a detector gives them, as COCO's results for boxes."""
    boxes = detections["boxes"].detach().double().cpu().clone()
    boxes[:, 2:] -= boxes[:, :2]
    return [
        entry | {"bbox": box}
        for entry, box in zip(_entries(detections, image_id, categories), boxes.tolist(), strict=True)
    ]


def mask_results(
    detections: Mapping[str, Tensor], image_id: int, categories: Sequence[Category]
) -> list[dict[str, Any]]:
    """An image's detections with `masks` (N, 1, H, W) bool as COCO's results for masks.

    They have no boxes: COCO's tools would then take an object's size from its box, not from its mask.
    """
    return [
        entry | {"segmentation": runs}
        for entry, runs in zip(
            _entries(detections, image_id, categories), _run_lengths(detections["masks"][:, 0]), strict=True
        )
    ]


def as_coco(
    images: Sequence[tuple[str, tuple[int, int]]],
    detections: Sequence[Mapping[str, Tensor]],
    categories: Sequence[Category],
) -> dict[str, Any]:
    """Detections as a COCO file that stands alone: images numbered from 1, categories, annotations with a `score`.

    Args:
        images: name and size (H, W) of each. detections: of each, as a detector gives them.
    """
    annotations = []
    for image_id, found in enumerate(detections, start=1):
        entries = box_results(found, image_id, categories)
        if "masks" in found:
            runs = mask_results(found, image_id, categories)
            entries = [box | mask for box, mask in zip(entries, runs, strict=True)]
        areas = found["masks"].flatten(1).sum(1).tolist() if "masks" in found else None
        for i, entry in enumerate(entries):
            area = entry["bbox"][2] * entry["bbox"][3] if areas is None else areas[i]
            annotations.append({"id": len(annotations) + 1, **entry, "area": area, "iscrowd": 0})
    return {
        "images": [
            {"id": i, "file_name": name, "height": height, "width": width}
            for i, (name, (height, width)) in enumerate(images, start=1)
        ],
        "categories": [category._asdict() for category in categories],
        "annotations": annotations,
    }


def write_results(results: Iterable[Mapping[str, Any]], file: str | Path) -> None:
    """Write results as the JSON that COCO's tools and servers take."""
    write_text(json.dumps(list(results)), file)


def read_results(file: str | Path) -> list[dict[str, Any]]:
    """The results of a JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no list of results.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no result file {file}")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(results, list) or not all(isinstance(entry, dict) for entry in results):
        raise ValueError(f"{file} is no result file of COCO: it must be a list of results")
    return results


def average_precision(
    ground_truth: CocoAnnotations | str | Path,
    results: Sequence[Mapping[str, Any]] | str | Path,
    kind: str = "box",
    *,
    max_dets: int = 100,
    categories: Sequence[Category] | None = None,
    image_ids: Iterable[int] | None = None,
) -> AveragePrecision:
    """How well results find the objects of a COCO file. Crowds count neither way, as COCO has it.

    Annotations without a box, a usable segmentation (for masks), a listed image or category are left out:
    `vmamba.data.check_detection` names them.

    Args:
        ground_truth, results: as read, or the files.
        kind: "box" or "mask".
        max_dets: detections an image that count, the best ones; COCO's own figure is 100, crowded images need more.
        categories: those to average over; the file's own when None.
        image_ids: the images that were looked at; all of the file when None.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not of COCO's form, or a result is of an image or category
            that is not there, or lacks what `kind` needs; names it.
    """
    if kind not in _IOU_TYPES:
        raise ValueError(f"kind must be one of {tuple(_IOU_TYPES)}, not {kind!r}")
    if max_dets < 1:
        raise ValueError(f"max_dets must be at least 1, got {max_dets}")
    coco = ground_truth if isinstance(ground_truth, CocoAnnotations) else read_coco(ground_truth)
    results = read_results(results) if isinstance(results, (str, Path)) else results
    categories = tuple(coco.categories if categories is None else categories)
    wanted = {entry["id"] for entry in coco.images} if image_ids is None else set(image_ids)
    truth = _truth(coco, categories, wanted, masks=kind == "mask")
    key = "bbox" if kind == "box" else "segmentation"
    found = [_checked(entry, key, wanted, {category.id for category in categories}) for entry in results]

    library = require("faster_coco_eval", "det")
    nothing = library.COCO(truth | {"annotations": []})  # loadRes of older versions stumbles over an empty list
    truth = library.COCO(truth)
    evaluation = library.COCOeval_faster(truth, truth.loadRes(found) if found else nothing, _IOU_TYPES[kind])
    evaluation.params.imgIds = sorted(wanted)
    evaluation.params.catIds = [category.id for category in categories]
    evaluation.params.maxDets = [max_dets]
    evaluation.evaluate()
    evaluation.accumulate()
    return _summary(np.asarray(evaluation.eval["precision"]), [category.name for category in sorted(categories)])


def _summary(precision: np.ndarray, names: Sequence[str]) -> AveragePrecision:
    """From the precision (IoU thresholds, recalls, categories, areas, numbers of detections); -1: nothing to find."""

    def mean(part: np.ndarray) -> float:
        part = part[part > -1]
        return 100 * float(part.mean()) if part.size else float("nan")

    precision = precision[..., -1]
    every = precision[..., 0]
    return AveragePrecision(
        mean(every),
        mean(every[0]),
        mean(every[5]),
        *(mean(precision[..., area]) for area in (1, 2, 3)),
        by_category={name: mean(every[:, :, k]) for k, name in enumerate(names)},
    )


def _truth(coco: CocoAnnotations, categories: Sequence[Category], images: set[int], masks: bool) -> dict[str, Any]:
    """The part of a file that can be evaluated, with areas where it has none, and annotations numbered from 1.

    COCO's tools need areas, and take an annotation of id 0 for none at all.
    """
    known = {category.id for category in categories}
    sizes = {
        entry["id"]: (entry.get("height"), entry.get("width")) for entry in coco.images if entry.get("id") in images
    }
    annotations = []
    for entry in coco.annotations:
        box = entry.get("bbox")
        is_box = isinstance(box, list) and len(box) == 4
        if not is_box or entry.get("image_id") not in sizes or entry.get("category_id") not in known:
            continue
        kept = {name: entry[name] for name in ("image_id", "category_id", "bbox")}
        area = box[2] * box[3]
        if masks:
            if None in sizes[entry["image_id"]]:
                raise ValueError(f"{coco.file}: image {entry['image_id']} has no height and width, which masks need")
            try:
                kept["segmentation"] = segmentation_run_lengths(entry.get("segmentation"), sizes[entry["image_id"]])
            except (ValueError, TypeError):
                continue
            area = int(require("faster_coco_eval.core.mask", "det").area(kept["segmentation"]))
        kept |= {
            "area": entry.get("area", area),
            "iscrowd": int(bool(entry.get("iscrowd"))),
            "id": len(annotations) + 1,
        }
        annotations.append(kept)
    return {
        "images": [entry for entry in coco.images if entry.get("id") in images],
        "annotations": annotations,
        "categories": [category._asdict() for category in categories],
    }


def _checked(entry: Mapping[str, Any], key: str, images: set[int], categories: set[int]) -> dict[str, Any]:
    """The part of a result that is evaluated."""
    if missing := sorted({"image_id", "category_id", "score", key} - set(entry)):
        raise ValueError(f"a result without {', '.join(missing)}: {dict(entry)}")
    if entry["image_id"] not in images:
        raise ValueError(f"a result for image {entry['image_id']}, which is not among the images to evaluate")
    if entry["category_id"] not in categories:
        raise ValueError(f"a result of category {entry['category_id']}, which is not in the list of categories")
    return {name: entry[name] for name in ("image_id", "category_id", "score", key)}


def _run_lengths(masks: Tensor) -> list[dict[str, Any]]:
    """COCO's compressed run lengths of masks (N, H, W) bool.

    Of 500 cells in 1024 x 1024 pixels, 520 MB, only the places where runs begin and end leave a GPU, and on a CPU only
    the part of a mask that has something in it is looked at: COCO's own encoder, which looks at all of them, took two
    seconds.
    """
    library = require("faster_coco_eval.core.mask", "det")
    count, height, width = masks.shape
    if not count:
        return []
    starts, ends = (_runs_in_parts if masks.device.type == "cpu" else _runs_everywhere)(masks)
    # a run that reaches the bottom may go on at the top of the next column
    going_on = np.flatnonzero(starts[1:] == ends[:-1])
    starts, ends = np.delete(starts, going_on + 1), np.delete(ends, going_on)
    each = height * width + 1
    firsts = np.arange(count + 1) * each
    edges = np.sort(np.concatenate([starts, ends, firsts[:-1], firsts[1:] - 1]))
    lengths, bounds = np.diff(edges).tolist(), np.searchsorted(edges, firsts).tolist()
    encoded = []
    for first, after in itertools.pairwise(bounds):
        counts = lengths[first : after - 1]
        if len(counts) > 1 and not counts[-1]:
            counts.pop()
        runs = library.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        encoded.append({"size": [height, width], "counts": runs["counts"].decode("ascii")})
    return encoded


def _runs_in_parts(masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Where in masks (N, H, W) bool runs of True begin, and the places after their ends, within columns; in order.

    Pixels are numbered down the columns, and through all masks, with one number after each mask that is no pixel's.
    """
    height, width = masks.shape[1:]
    # the largest byte: `any` takes five times as long on a CPU
    (tops, bottoms), (lefts, rights) = (
        _extents(masks.view(torch.uint8).amax(dim).numpy().view(bool)) for dim in (2, 1)
    )
    edges = []
    for i, mask in enumerate(masks.numpy()):
        top, bottom, left, right = tops[i], bottoms[i], lefts[i], rights[i]
        # columns first, each between two zeros, so that edges are a run's start and end by turns
        part = np.zeros((right - left, bottom - top + 2), dtype=bool)
        part[:, 1:-1] = mask[top:bottom, left:right].T
        column, row = np.divmod(np.flatnonzero(part[:, 1:] != part[:, :-1]), bottom - top + 1)
        edges.append((i * (height * width + 1) + left * height + top) + column * height + row)
    edges = np.concatenate(edges)
    return edges[::2], edges[1::2]


def _runs_everywhere(masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """As `_runs_in_parts`, of all pixels of many masks at once: for a GPU, where a mask by itself is waited for."""
    height, width = masks.shape[1:]
    found = [], []
    for first in range(0, len(masks), together := max(1, _PIXELS_TOGETHER // (height * width))):
        part = masks[first : first + together]
        above, below = F.pad(part[:, :-1], (0, 0, 1, 0)), F.pad(part[:, 1:], (0, 0, 0, 1))
        for places, edge, beyond in zip(found, (part > above, part > below), (0, 1), strict=True):
            mask, row, column = edge.nonzero().unbind(1)
            places.append((mask + first) * (height * width + 1) + column * height + row + beyond)
    starts, ends = (torch.cat(places).sort().values.cpu().numpy() for places in found)
    return starts, ends


def _extents(there: np.ndarray) -> tuple[list[int], list[int]]:
    """Of each row of (N, L) bool the place of the first True, and the one after the last; 0 and 0 where there is none.

    In numpy, whose `argmax` of bools stops at the first: torch's took a quarter of the encoding.
    """
    after = there.shape[1] - there[:, ::-1].argmax(1)
    return there.argmax(1).tolist(), (after * there.any(1)).tolist()


def _entries(
    detections: Mapping[str, Tensor], image_id: int, categories: Sequence[Category]
) -> Iterable[dict[str, Any]]:
    scores = detections["scores"].tolist()
    for label, score in zip(detections["labels"].tolist(), scores, strict=True):
        yield {"image_id": image_id, "category_id": categories[label - 1].id, "score": score}
