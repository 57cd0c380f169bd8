"""Every file of a segmentation data set, read and compared before training starts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..findings import Finding
from ..reading import read_image
from .masks import LabelMap, mask_problem, read_index_mask
from .sources import SegmentationSource, find_segmentation, pair_files


def check_segmentation(source: str | Path | SegmentationSource) -> list[Finding]:
    """Read all images and masks of a source; an empty list is a data set that training can use.

    Findings: images without mask, masks without image, two files of one name, parts without images, files that cannot
    be read, masks that are colour pictures, masks of another size than their image, labels that are no class.

    Raises:
        FileNotFoundError, ValueError: there is no data set to check; as :func:`~.sources.find_segmentation`.
    """
    if not isinstance(source, SegmentationSource):
        source = find_segmentation(source)
    findings = []
    for part in source.parts.values():
        pairs = pair_files(part)
        if not pairs.images:
            message = f"no image here has a mask of its name under {part.masks}"
            findings.append(Finding("empty part", part.images, message))
        for kind, files, message in (
            ("no mask", () if source.partly_labelled else pairs.without_mask, f"has no mask under {part.masks}"),
            ("no image", pairs.without_image, f"has no image under {part.images}"),
            ("same name", pairs.same_name, "has the name of another file, apart from the ending"),
        ):
            findings += [Finding(kind, file, message) for file in files]
        with ThreadPoolExecutor() as pool:
            checked = pool.map(_check_pair, pairs.images, pairs.masks, [source.labels] * len(pairs.images))
            findings += [finding for finding in checked if finding is not None]
    return findings


def _check_pair(image: Path, mask: Path, labels: LabelMap) -> Finding | None:
    try:
        size = read_image(image).size
    except (OSError, ValueError) as error:
        return Finding("unreadable image", image, str(error))
    try:
        raw = read_index_mask(mask)
    except (OSError, ValueError) as error:
        return Finding("unreadable mask", mask, str(error))
    problem = mask_problem(raw, labels, size, image)
    return Finding(problem[0], mask, problem[1]) if problem else None
