"""Every file of a segmentation data set, read and compared before training starts."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ..findings import Finding
from ..reading import DAMAGE, read_image, reason_of
from .masks import LabelMap, MaskedImages, mask_problem, read_index_mask
from .sources import SegmentationSource, find_segmentation, pair_files

NAMED = 20  # findings in a message

logger = logging.getLogger("vmamba.data")


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


def without_unusable(samples: MaskedImages, on_unreadable: str) -> MaskedImages:
    """The samples that training can use, once they are checked before it starts.

    With "error" all masks are read, and of the images the headers: a photo with a damaged end is for
    :func:`check_segmentation`. With "skip" everything is read, and what is of no use is left out and logged.

    Raises:
        ValueError: with "error", files that cannot be read, masks of another size than their image or with unknown
            labels; with "skip", nothing is left. Names the files.
    """
    check = _check_pair if on_unreadable == "skip" else _check_mask
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(check, samples.images, samples.masks, [samples.labels] * len(samples)))
    findings = [finding for finding in found if finding is not None]
    if not findings:
        return samples
    shown = "; ".join(map(str, findings[:NAMED])) + ("; ..." if len(findings) > NAMED else "")
    kept = [i for i, finding in enumerate(found) if finding is None]
    if on_unreadable == "error" or not kept:
        raise ValueError(
            f"{len(findings)} image(s) or mask(s) cannot be used: {shown}. `vmamba data check --task segmentation` "
            f"names all; data.on_unreadable=skip leaves them out"
        )
    logger.warning("%d image(s) or mask(s) cannot be used and are left out: %s", len(findings), shown)
    return samples.subset(kept)


def _check_pair(image: Path, mask: Path, labels: LabelMap) -> Finding | None:
    try:
        read_image(image)
    except (OSError, ValueError) as error:
        return _unreadable("image", image, error)
    return _check_mask(image, mask, labels)


def _check_mask(image: Path, mask: Path, labels: LabelMap) -> Finding | None:
    """What is wrong with a mask; of the image the header is read."""
    try:
        with Image.open(image) as opened:
            size = opened.size
    except DAMAGE as error:
        return _unreadable("image", image, error)
    try:
        raw = read_index_mask(mask)
    except (OSError, ValueError) as error:
        return _unreadable("mask", mask, error)
    problem = mask_problem(raw, labels, size, image)
    return Finding(problem[0], mask, problem[1]) if problem else None


def _unreadable(what: str, path: Path, error: BaseException) -> Finding:
    # what reading says names the file, as a finding does itself
    return Finding(f"unreadable {what}", path, f"cannot be read: {reason_of(error.__cause__ or error)}")
