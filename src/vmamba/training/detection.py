"""Runs of detection: COCO data, a Mask R-CNN or, of boxes alone, a Faster R-CNN; AP, result files, drawn detections."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import (
    CocoDataset,
    collate_detection,
    detection_evaluation_transform,
    detection_training_transform,
    open_detection,
    read_image,
)
from ..data.loading import ordered_loader, resumable_loader
from ..pictures import draw_detections
from ..tasks import Detection, DetectionScores, detect, write_results
from .config import Config
from .job import PART_NAMES, SHOWN_FILES, Job, Known, Share, percent, spread
from .report import save_picture_rows

SHEET_IMAGES = 4
SHOWN_SCORE = 0.3  # of a detection that is drawn
# of what the papers count operations at, 1280 x 800 pixels
ASPECT = 1.6
DIVISOR = 32


class DetectionJob(Job):
    """Training a detector of torchvision on any backbone."""

    command = "detect"
    # the images of COCO 2017 that have an object; the others are not trained on
    known = Known("COCO 2017", "coco", train=117_266, val=5_000, classes=80)

    def __init__(self, config: Config) -> None:
        data, chosen = config.data, config.detection
        found = open_detection(data.source, val_fraction=data.val_fraction, split_seed=data.split_seed)
        train = found["train"].coco
        self.config = config
        self.categories = train.categories
        self.classes = self.display_names = tuple(category.name for category in train.categories)
        masks = train.has_masks if chosen.masks is None else chosen.masks
        self.parts: dict[str, CocoDataset] = {
            name: CocoDataset(
                part.images,
                part.coco,
                categories=self.categories,
                masks=masks,
                keep_empty=name != "train",
                on_finding=data.on_unreadable,
                transform=detection_training_transform(chosen.augment)
                if name == "train"
                else detection_evaluation_transform(),
            )
            for name, part in found.items()
        }
        self.masks = masks
        self.task = self.task_of("val")
        self.network = self.network_for(config, len(self.classes), masks=masks)

    @staticmethod
    def network_for(config: Config, classes: int, *, masks: bool = True, **facts: Any) -> dict[str, Any]:
        chosen = config.detection
        names = ("channels", "fc_channels", "anchor_scale", "min_size", "max_size")
        names += ("score_threshold", "max_detections", "out_norm")
        drop_path = {} if config.model.drop_path is None else {"drop_path_rate": config.model.drop_path}
        return {
            "classes": classes,
            "masks": masks,
            **{name: getattr(chosen, name) for name in names},
            "backbone_kwargs": {**config.model.kwargs, **drop_path},
        }

    @property
    def size_in_words(self) -> str:
        sizes, longest = self.config.detection.min_size, self.config.detection.max_size
        short = f"{sizes[0]}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
        return f"short side {short} px, long side at most {longest}"

    def task_of(self, part: str) -> Detection:
        return Detection(
            self.parts[part].coco, self.categories, masks=self.masks, max_dets=self.config.detection.max_detections
        )

    def check(self, share: Share, device: str, processes: int) -> None:
        if self.config.data.in_memory:
            for part in self.parts.values():
                part.load()

    def try_model(self, model: nn.Module) -> None:
        height, width = 64, 96
        try:
            with torch.inference_mode():
                model.eval().backbone(torch.zeros(1, 3, height, width))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"{self.config.model.name} does not take images of any size, such as {height} x {width} px: {error}"
            ) from error

    def training_batches(self, share: Share, device: str, workers: int | None = None) -> Any:
        return resumable_loader(
            self.parts["train"].with_packed_masks() if self.masks else self.parts["train"],
            seed=self.config.run.seed,
            accumulate=self.config.run.accumulate,
            steps=self.config.schedule.steps_per_round,
            workers=self.config.data.workers if workers is None else workers,
            collate=collate_detection,
            **vars(share),
        )

    def evaluation_batches(self, part: str, share: Share, device: str | None = None) -> Iterable[Any]:
        """One image at a time: what a detector finds depends a little on the padding that others would bring."""
        return ordered_loader(
            self.parts[part].without_masks(),
            batch_size=1,
            workers=self.config.data.workers,
            rank=share.rank,
            world=share.world,
            collate=collate_detection,
        )

    def backbone_of(self, model: nn.Module) -> nn.Module:
        return model.backbone.body

    def about(self) -> dict[str, Any]:
        ids = tuple(category.id for category in self.categories)
        return {**super().about(), "preprocessing": None, "category_ids": ids}

    def table(self, scores: DetectionScores) -> list[str]:
        kinds = ("mask", "box") if self.masks else ("box",)
        by_kind = [scores.average_precision(kind).by_category for kind in kinds]
        return [
            f"| category | {' | '.join(f'{kind} AP' for kind in kinds)} |",
            "|---" * (1 + len(kinds)) + "|",
            *(f"| {name} | {' | '.join(percent(found[name]) for found in by_kind)} |" for name in self.classes),
        ]

    def draw(self, part: str, scores: DetectionScores, model: nn.Module, folder: Path) -> dict[str, Path]:
        """The picture, and COCO's result files of all images beside it."""
        write_results(scores.boxes, folder / "boxes.json")
        if self.masks:
            write_results(scores.masks, folder / "masks.json")
        dataset, rows = self.parts[part], []
        for i in spread(range(len(dataset)), SHEET_IMAGES):
            photo, (_, target) = read_image(dataset.file(i)), dataset[i]
            found = detect(model.eval(), photo)
            shown = found["scores"] >= SHOWN_SCORE
            found = {name: tensor[shown] for name, tensor in found.items()}
            if self.masks:
                target = target | {"masks": target["masks"][:, None]}
            rows.append([photo, *(draw_detections(photo, what, self.display_names) for what in (target, found))])
        path = folder / "predictions.png"
        heading = f"{len(rows)} of {len(dataset)} {PART_NAMES[part]} images, scores from {SHOWN_SCORE}"
        save_picture_rows(rows, ("image", "labelled", "found"), path, heading)
        return {"Predictions": path}

    def image_files(self, part: str, run_dir: Path) -> tuple[Path, ...]:
        dataset = self.parts[part]
        return tuple(dataset.file(i) for i in spread(range(len(dataset)), SHOWN_FILES))

    @staticmethod
    def dense_part(model: nn.Module, config: Config) -> tuple[nn.Module, tuple[int, int], int]:
        short = -(-config.detection.min_size[-1] // DIVISOR) * DIVISOR
        long = min(short * ASPECT, config.detection.max_size) // DIVISOR * DIVISOR
        return model.backbone, (short, int(long)), 1
