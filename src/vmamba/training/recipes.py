"""Recipes: functions that return a complete config. A variant is a recipe and the fields that differ from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ..data.detection import MULTI_SCALE_CROPS, MULTI_SCALE_SIZES
from ..data.sources import DIGITS
from ..data.transforms import Augmentation
from .config import (
    Config,
    DataConfig,
    DetectionConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    SegmentationConfig,
    as_dict,
    from_dict,
    merge,
)


def digits() -> Config:
    """vmamba_nano on the handwritten digits, a few minutes on two CPU cores."""
    return Config(
        data=DataConfig(image_size=32, crop_pct=1.0, batch_size=32, workers=0),
        # a digit stays the same digit when shifted and scaled a little, not when mirrored
        augment=Augmentation(scale=(0.7, 1.0), ratio=(0.85, 1.18), horizontal_flip=0.0, color_jitter=0.0),
        optim=OptimConfig(lr=2e-3),
        schedule=ScheduleConfig(epochs=30),
        # images this small keep no second core busy: two threads took 70 ms a step where one took 45, and where
        # other programs ran beside them they waited for each other ten times as long
        run=RunConfig(threads=1),
    )


def photos() -> Config:
    """A first model of photos in class folders, from scratch, with little augmentation and few epochs."""
    return Config(model=ModelConfig(name="vmamba_micro"), data=DataConfig(source="photos"))


def imagenet() -> Config:
    """ImageNet-1K as the paper trains it (arXiv 2401.10166, appendix; the official configs), 8 x 128 images a step.

    Differences: bf16 where the hardware has it instead of fp16; A_log, D and dt_bias are not decayed (optim.decay_ssm).
    Drop path is the variant's own.
    """
    return Config(
        model=ModelConfig(name="vmamba_tiny_s1l8"),
        data=DataConfig(source="imagenet", image_size=224, crop_pct=0.875, batch_size=1024, workers=8),
        augment=Augmentation(
            scale=(0.08, 1.0),
            ratio=(3 / 4, 4 / 3),
            horizontal_flip=0.5,
            color_jitter=0.4,
            rand_augment="rand-m9-mstd0.5-inc1",
            random_erase=0.25,
        ),
        loss=LossConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0, mix_prob=1.0, mix_switch=0.5),
        optim=OptimConfig(
            lr=None,
            lr_base=5e-4,
            lr_base_size=512,
            weight_decay=0.05,
            betas=(0.9, 0.999),
            eps=1e-8,
            clip_norm=5.0,
        ),
        # 5e-7 and 5e-6 where the peak is 5e-4
        schedule=ScheduleConfig(epochs=300, warmup_epochs=20, warmup_from=1e-3, decay_to=1e-2),
        run=RunConfig(ema_decay=0.9999, checkpoint_every=250),
    )


def small() -> Config:
    """From scratch on a small set of photos (thousands, not a million): Muon, wider crops, half of the batches mixed.

    With ten thousand images there are few steps, and Muon makes more of each: on Imagenette VMamba-T is at 94 % after
    120 epochs, with AdamW at 89 % after 150 (docs/results/imagenette.md). The moving average is ten times shorter than
    ImageNet's: 1,000 steps of 128 images are 13 epochs.
    """
    values = {
        "data": {"source": "photos", "image_size": 160, "batch_size": 128},
        "augment": {"scale": [0.35, 1.0], "random_erase": 0.0},
        "loss": {"mix_prob": 0.5},
        "optim": {"name": "nmuon", "lr_base": 1.2e-2},
        "schedule": {"epochs": 100, "warmup_epochs": 5},
        "run": {"ema_decay": 0.999, "checkpoint_every": 0},
    }
    return from_dict(merge(as_dict(imagenet()), values))


def finetune() -> Config:
    """From released or own weights to another set of photos: small steps, smaller the farther from the new head."""
    values = {
        "model": {"weights": "pretrained"},
        "data": {"source": "photos", "batch_size": 64, "workers": 2},
        "augment": {"scale": [0.35, 1.0], "random_erase": 0.1},
        "loss": {"mixup": 0.0, "cutmix": 0.0},
        "optim": {"lr_base": 1e-3, "layer_decay": 0.8},
        "schedule": {"epochs": 20, "warmup_epochs": 2},
        "run": {"ema_decay": 0.0, "checkpoint_every": 0},
    }
    return from_dict(merge(as_dict(imagenet()), values))


def ade20k() -> Config:
    """UPerNet on ADE20K as published with VMamba (mmsegmentation 1.2.2 and the official configs), 8 x 2 images a step.

    Differences: bf16 where the hardware has it instead of fp32; A_log, D and dt_bias are not decayed. Drop path is the
    variant's own; the vanilla ones were trained with 0.3.
    """
    return Config(
        task="segmentation",
        model=ModelConfig(name="vmamba_tiny_s1l8", weights="pretrained"),
        data=DataConfig(source="ADEChallengeData2016", batch_size=16, workers=4),
        segmentation=SegmentationConfig(),
        optim=OptimConfig(lr=6e-5, weight_decay=0.01, betas=(0.9, 0.999), clip_norm=0.0, decay_vectors=True),
        schedule=ScheduleConfig(
            epochs=None,
            iterations=160_000,
            validate_every=16_000,
            warmup_epochs=None,
            warmup_iterations=1_500,
            warmup_from=1e-6,
            shape="poly",
            power=1.0,
            decay_to=0.0,
        ),
        run=RunConfig(checkpoint_every=2_000),
    )


def small_segmentation() -> Config:
    """A UPerNet from scratch on a small set (hundreds of images): narrower heads, larger steps, images at their size.

    At 512 channels the heads cost nine times what the backbone does; at 256 three times. Muon as in :func:`small`: a
    network of 1.5 million parameters has 35 % mIoU on CamVid after 400 steps of 8 images, with AdamW 20 %.
    """
    values = {
        "model": {"weights": None},
        "data": {"source": "street", "in_memory": True},
        "segmentation": {
            "channels": 256,
            "auxiliary_channels": 128,
            "augment": {"crop": [384, 384], "base_size": None, "antialias": True},
            "inference": {"size": None, "antialias": True},
        },
        "optim": {"name": "nmuon", "lr": 2e-3, "weight_decay": 0.05, "clip_norm": 5.0, "decay_vectors": False},
        "schedule": {"iterations": 4_000, "validate_every": 400, "warmup_iterations": 400, "warmup_from": 1e-3},
        "run": {"ema_decay": 0.998, "checkpoint_every": 0},
    }
    return from_dict(merge(as_dict(ade20k()), values))


def coco_1x() -> Config:
    """Mask R-CNN on COCO, 12 epochs, as published with VMamba (mmdetection 3.3 and the official configs), 8 x 2 images.

    Differences: bf16 where the hardware has it instead of fp32; A_log, D and dt_bias are not decayed. The paper says
    that the rate drops after 9 and 11 epochs, the configs after 8 and 11. Drop path is the variant's own; the vanilla
    ones were trained with 0.2. Annotations that cannot be used are left out, as the official data set does.
    """
    return Config(
        task="detection",
        model=ModelConfig(name="vmamba_tiny_s1l8", weights="pretrained"),
        data=DataConfig(source="coco", batch_size=16, workers=4, on_unreadable="skip"),
        detection=DetectionConfig(),
        optim=OptimConfig(lr=1e-4, weight_decay=0.05, betas=(0.9, 0.999), clip_norm=0.0, decay_vectors=True),
        schedule=ScheduleConfig(
            epochs=12,
            warmup_epochs=None,
            warmup_iterations=1_000,
            warmup_from=1e-3,
            shape="steps",
            drops=(8, 11),
            gamma=0.1,
        ),
        run=RunConfig(checkpoint_every=1_000),
    )


def coco_3x() -> Config:
    """As :func:`coco_1x`, 36 epochs of images at many scales."""
    values = {
        "detection": {"min_size": list(MULTI_SCALE_SIZES), "augment": asdict(MULTI_SCALE_CROPS)},
        "schedule": {"epochs": 36, "drops": [27, 33]},
    }
    return from_dict(merge(as_dict(coco_1x()), values))


def small_detection() -> Config:
    """A detector from scratch on a small set (hundreds of images): larger steps, clipping, averaged weights.

    The sides of 512 pixels and the small anchors are for objects of tens of pixels, such as cells. Muon as in
    :func:`small`: a network on vmamba_nano finds nuclei with 34 % mask AP after 300 steps of 2 images, with AdamW 21 %.
    """
    values = {
        "model": {"weights": None},
        "data": {"source": "cells", "in_memory": True, "on_unreadable": "error"},
        "detection": {"min_size": [416, 480, 544, 608, 512], "anchor_scale": 4.0},
        "optim": {"name": "nmuon", "lr": 1e-3, "clip_norm": 5.0, "decay_vectors": False},
        "schedule": {
            "epochs": None,
            "iterations": 2_000,
            "validate_every": 500,
            "warmup_iterations": 200,
            "shape": "poly",
            "drops": [],
            "decay_to": 0.0,
        },
        "run": {"ema_decay": 0.998, "checkpoint_every": 0},
    }
    return from_dict(merge(as_dict(coco_1x()), values))


RECIPES: dict[str, Callable[[], Config]] = {
    f.__name__: f
    for f in (
        digits,
        photos,
        small,
        finetune,
        imagenet,
        ade20k,
        small_segmentation,
        coco_1x,
        coco_3x,
        small_detection,
    )
}
# GPUs that the published recipes were run on
PUBLISHED_PROCESSES = {"imagenet": 8, "ade20k": 8, "coco_1x": 8, "coco_3x": 8}
# the recipe of a config that names its task alone
OF_TASK = {"segmentation": "small_segmentation", "detection": "small_detection"}


def resolve(*layers: Mapping[str, Any], recipe: str | None = None) -> Config:
    """A recipe with ``layers`` of nested mappings laid over it, the last one strongest.

    Without a name the recipe is that for the task and the data: "digits", or "photos" for a folder.

    Raises:
        ValueError: no such recipe, an unknown field (names the closest one) or a value out of range.
        TypeError: a value of the wrong type.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    if recipe is None:
        recipe = OF_TASK.get(merged.get("task", ""))
    if recipe is None:
        source = merged["data"].get("source", DIGITS) if isinstance(merged.get("data"), Mapping) else DIGITS
        recipe = "digits" if source == DIGITS else "photos"
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r}; there are: {', '.join(RECIPES)}")
    return from_dict(merge(as_dict(RECIPES[recipe]()), merged))
