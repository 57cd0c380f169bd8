"""Datasets, transforms and loaders."""

from .batches import check_batches, evaluation_batches, training_batches
from .coco import (
    Category,
    CocoAnnotations,
    CocoDataset,
    check_detection,
    coco_categories,
    decode_segmentation,
    read_coco,
    segmentation_run_lengths,
)
from .constants import IMAGENET_MEAN, IMAGENET_STD
from .detection import (
    MULTI_SCALE_CROPS,
    MULTI_SCALE_SIZES,
    DetectionAugmentation,
    collate_detection,
    detection_evaluation_transform,
    detection_training_transform,
)
from .detection_sources import AnnotatedImages, open_detection
from .findings import Finding
from .folder import image_folder, list_images, stratified_split
from .loading import evaluation_loader, training_loader
from .reading import Samples, read_image
from .sources import Splits, open_labelled, open_source
from .transforms import Augmentation, Preprocessing, evaluation_transform, training_transform

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MULTI_SCALE_CROPS",
    "MULTI_SCALE_SIZES",
    "AnnotatedImages",
    "Augmentation",
    "Category",
    "CocoAnnotations",
    "CocoDataset",
    "DetectionAugmentation",
    "Finding",
    "Preprocessing",
    "Samples",
    "Splits",
    "check_batches",
    "check_detection",
    "coco_categories",
    "collate_detection",
    "decode_segmentation",
    "detection_evaluation_transform",
    "detection_training_transform",
    "evaluation_batches",
    "evaluation_loader",
    "evaluation_transform",
    "image_folder",
    "list_images",
    "open_detection",
    "open_labelled",
    "open_source",
    "read_coco",
    "read_image",
    "segmentation_run_lengths",
    "stratified_split",
    "training_batches",
    "training_loader",
    "training_transform",
]
