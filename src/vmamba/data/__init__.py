"""Datasets, transforms and loaders."""

from .batches import check_batches, evaluation_batches, training_batches
from .constants import IMAGENET_MEAN, IMAGENET_STD
from .folder import image_folder, stratified_split
from .loading import evaluation_loader, training_loader
from .reading import Samples, read_image
from .sources import Splits, open_labelled, open_source
from .transforms import Augmentation, Preprocessing, evaluation_transform, training_transform

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augmentation",
    "Preprocessing",
    "Samples",
    "Splits",
    "check_batches",
    "evaluation_batches",
    "evaluation_loader",
    "evaluation_transform",
    "image_folder",
    "open_labelled",
    "open_source",
    "read_image",
    "stratified_split",
    "training_batches",
    "training_loader",
    "training_transform",
]
