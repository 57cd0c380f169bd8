"""Runs of semantic segmentation: images with masks, a UPerNet, IoU by class and a sheet of overlays."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from ..data.loading import ordered_loader, resumable_loader
from ..data.segmentation import (
    MaskedImages,
    MasksInMemory,
    TransformedMasks,
    class_shares,
    open_segmentation,
    segmentation_evaluation_transform,
    segmentation_training_transform,
    without_unusable,
)
from ..pictures import draw_overlay
from ..tasks import Segmentation, SegmentationScores, segment
from .config import Config
from .job import PART_NAMES, SHOWN_FILES, Job, Known, Share, percent, spread
from .report import save_picture_rows

SHEET_IMAGES = 5
# the coarsest pool of the pyramid is a single pixel, and a batch norm needs two numbers for statistics
LEAST_BATCH = 2


class SegmentationJob(Job):
    """Training a UPerNet on any backbone."""

    command = "segment"
    known = Known("ADE20K", "ADEChallengeData2016", train=20_210, val=2_000, classes=150)

    def __init__(self, config: Config) -> None:
        data, chosen = config.data, config.segmentation
        splits = open_segmentation(data.source, val_fraction=data.val_fraction, split_seed=data.split_seed)
        self.config = config
        self.classes = self.display_names = splits.classes
        found = {"train": splits.train, "val": splits.val, "test": splits.test}
        self.files: dict[str, MaskedImages] = {
            name: without_unusable(samples, data.on_unreadable) for name, samples in found.items() if samples
        }
        self.parts = self.files
        weights = None
        if chosen.class_weights == "balanced":
            weights = tuple((1 / np.log(1.02 + class_shares(self.files["train"]))).tolist())
        self.task = Segmentation(len(splits.classes), chosen.auxiliary_weight, chosen.inference, weights)
        self.network = self.network_for(config, len(splits.classes))
        self._decoded: dict[str, MasksInMemory] = {}

    @staticmethod
    def network_for(config: Config, classes: int, **facts: Any) -> dict[str, Any]:
        chosen = config.segmentation
        drop_path = {} if config.model.drop_path is None else {"drop_path_rate": config.model.drop_path}
        heads = {name: getattr(chosen, name) for name in ("channels", "auxiliary_channels", "dropout", "out_norm")}
        return {"num_classes": classes, **heads, **config.model.kwargs, **drop_path}

    @property
    def size_in_words(self) -> str:
        return "crops of {} x {} px".format(*self.config.segmentation.augment.crop)

    def check(self, share: Share, device: str, processes: int) -> None:
        synchronised = device == "cuda" and share.world > 1
        if share.batch_size < LEAST_BATCH and not synchronised:
            raise ValueError(
                f"a UPerNet's batch norms need at least {LEAST_BATCH} images in a pass, and data.batch_size "
                f"{self.config.data.batch_size} leaves {share.batch_size}"
            )
        for part in self.files if self.config.data.in_memory else ():
            if part != "test" or share.rank == 0:  # the first process alone measures test images
                self._samples(part)

    def try_model(self, model: nn.Module) -> None:
        height, width = 64, 96
        try:
            with torch.inference_mode():
                model.eval()(torch.zeros(1, 3, height, width))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"{self.config.model.name} does not take images of any size, such as {height} x {width} px: {error}"
            ) from error

    def training_batches(self, share: Share, device: str, workers: int | None = None) -> Any:
        transform = segmentation_training_transform(self.config.segmentation.augment)
        return resumable_loader(
            TransformedMasks(self._samples("train"), transform),
            seed=self.config.run.seed,
            accumulate=self.config.run.accumulate,
            steps=self.config.schedule.steps_per_round,
            workers=self.config.data.workers if workers is None else workers,
            **vars(share),
        )

    def evaluation_batches(self, part: str, share: Share, device: str | None = None) -> Iterable[Any]:
        """One image at a time, since their sizes differ."""
        return ordered_loader(
            TransformedMasks(self._samples(part), segmentation_evaluation_transform()),
            batch_size=1,
            workers=self.config.data.workers,
            rank=share.rank,
            world=share.world,
        )

    def backbone_of(self, model: nn.Module) -> nn.Module:
        return model.backbone

    def about(self) -> dict[str, Any]:
        return {**super().about(), "preprocessing": None}

    def table(self, scores: SegmentationScores) -> list[str]:
        rows = zip(self.classes, scores.by_class(), strict=True)
        return [
            "| class | IoU % | accuracy % | pixels |",
            "|---|---|---|---|",
            *(
                f"| {name} | {percent(row['iou'])} | {percent(row['accuracy'])} | {row['pixels']:,} |"
                for name, row in rows
            ),
        ]

    def draw(self, part: str, scores: SegmentationScores, model: nn.Module, folder: Path) -> dict[str, Path]:
        path = folder / "predictions.png"
        samples, device = self._samples(part), next(model.parameters()).device
        normalise, rows = segmentation_evaluation_transform(), []
        for i in spread(range(len(samples)), SHEET_IMAGES):
            photo, truth = samples[i]
            pixels, labels = normalise(photo, truth)
            with torch.inference_mode():
                found = segment(model.eval(), pixels[None].to(device), self.task.inference)[0].cpu().numpy()
            photo = photo if isinstance(photo, Image.Image) else to_pil_image(photo)
            overlays = (draw_overlay(photo, mask, self.display_names) for mask in (labels.numpy(), found))
            rows.append([photo, *overlays])
        save_picture_rows(
            rows, ("image", "labelled", "found"), path, f"{len(rows)} of {len(samples)} {PART_NAMES[part]} images"
        )
        return {"Predictions": path}

    def image_files(self, part: str, run_dir: Path) -> tuple[Path, ...]:
        return tuple(spread(self.files[part].images, SHOWN_FILES))

    @staticmethod
    def dense_part(model: nn.Module, config: Config) -> tuple[nn.Module, tuple[int, int], int]:
        return model, config.segmentation.augment.crop, LEAST_BATCH

    def _samples(self, part: str) -> MaskedImages | MasksInMemory:
        if not self.config.data.in_memory:
            return self.files[part]
        if part not in self._decoded:
            self._decoded[part] = MasksInMemory(self.files[part])
        return self._decoded[part]
