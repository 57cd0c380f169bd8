"""Data for semantic segmentation: images with a mask each, found, checked, augmented."""

from ..findings import Finding
from .check import check_segmentation, without_unusable
from .classes import ADE20K_CLASSES, CAMVID_CLASSES
from .masks import IGNORED, LabelMap, MaskedImages, MasksInMemory, class_shares, read_index_mask
from .sources import Part, SegmentationSource, SegmentationSplits, find_segmentation, open_segmentation
from .transforms import (
    SegmentationAugmentation,
    TransformedMasks,
    fitted_size,
    segmentation_evaluation_transform,
    segmentation_training_transform,
)

__all__ = [
    "ADE20K_CLASSES",
    "CAMVID_CLASSES",
    "IGNORED",
    "Finding",
    "LabelMap",
    "MaskedImages",
    "MasksInMemory",
    "Part",
    "SegmentationAugmentation",
    "SegmentationSource",
    "SegmentationSplits",
    "TransformedMasks",
    "check_segmentation",
    "class_shares",
    "find_segmentation",
    "fitted_size",
    "open_segmentation",
    "read_index_mask",
    "segmentation_evaluation_transform",
    "segmentation_training_transform",
    "without_unusable",
]
