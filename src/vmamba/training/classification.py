"""Runs of classification: labelled images, a classifier, its confusion matrix and a sheet of predictions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..data import Preprocessing, check_batches, evaluation_batches, open_source, training_batches
from ..data.folder import Files
from ..data.sources import Samples
from ..tasks import Classification, ClassificationScores
from .config import Config
from .evaluation import check_image_size
from .job import PART_NAMES, SHOWN_FILES, Job, Known, Share, spread
from .report import save_confusion_matrix, save_prediction_sheet

SHEET_IMAGES = 24


def preprocessing_of(config: Config) -> Preprocessing:
    """What a classifier trained with ``config`` expects of its input."""
    data = config.data
    return Preprocessing(
        (data.image_size, data.image_size), data.interpolation, data.crop_pct, crop_mode=data.crop_mode
    )


class ClassificationJob(Job):
    """Training a classifier of timm."""

    command = "predict"
    known = Known("ImageNet-1K", "imagenet", train=1_281_167, val=50_000, classes=1000)

    def __init__(self, config: Config) -> None:
        data, loss = config.data, config.loss
        splits = open_source(
            data.source,
            val_fraction=data.val_fraction,
            split_seed=data.split_seed,
            on_unreadable=data.on_unreadable,
        )
        self.config = config
        self.classes, self.display_names = splits.classes, splits.display_names
        self.parts: dict[str, Samples] = {"train": splits.train, "val": splits.val}
        if splits.test is not None:
            self.parts["test"] = splits.test
        self.preprocessing = preprocessing_of(config)
        self.task = Classification(
            len(splits.classes), loss.label_smoothing, loss.mixup, loss.cutmix, loss.mix_prob, loss.mix_switch
        )
        self.network = self.network_for(config, len(splits.classes))

    @staticmethod
    def network_for(config: Config, classes: int, **facts: Any) -> dict[str, Any]:
        drop_path = {} if config.model.drop_path is None else {"drop_path_rate": config.model.drop_path}
        return {**config.model.kwargs, "num_classes": classes, **drop_path}

    def check(self, share: Share, device: str, processes: int) -> None:
        images, size = len(self.parts["train"]), self.config.data.batch_size
        parts = size // share.batch_size
        if self.task.mixes and (share.batch_size % 2 or images < size):
            raise ValueError(
                f"mixup and CutMix need an even number of images in a pass and a data.batch_size of at most the "
                f"{images} training images, not {size}{f' in {parts} passes' if parts > 1 else ''}"
            )
        check_batches(
            [self.parts["train"], self.parts["val"]],
            self.preprocessing,
            self.config.augment,
            in_memory=self.config.data.in_memory,
            longest=self.config.data.memory_size,
            processes=processes,
        )

    def try_model(self, model: nn.Module) -> None:
        check_image_size(
            model,
            self.config.model.name,
            self.preprocessing.image_size,
            " (data.image_size; some models need the size in model.kwargs, too)",
        )

    def training_batches(self, share: Share, device: str, workers: int | None = None) -> Any:
        return training_batches(
            self.parts["train"],
            self.preprocessing,
            self.config.augment,
            seed=self.config.run.seed,
            longest=self.config.data.memory_size,
            accumulate=self.config.run.accumulate,
            steps=self.config.schedule.steps_per_round,
            workers=self.config.data.workers if workers is None else workers,
            in_memory=self.config.data.in_memory,
            device=device,
            **vars(share),
        )

    def evaluation_batches(self, part: str, share: Share, device: str | None = None) -> Iterable[Any]:
        placing = {} if device is None else {"in_memory": self.config.data.in_memory, "device": device}
        return evaluation_batches(
            self.parts[part], self.preprocessing, workers=self.config.data.workers, **placing, **vars(share)
        )

    def about(self) -> dict[str, Any]:
        return {**super().about(), "preprocessing": self.preprocessing}

    def draw(self, part: str, scores: ClassificationScores, model: nn.Module, folder: Path) -> dict[str, Path]:
        matrix, sheet = folder / "confusion_matrix.png", folder / "predictions.png"
        save_confusion_matrix(scores.confusion(), self.display_names, matrix)
        self._draw_predictions(part, scores, sheet)
        return {"Confusion matrix": matrix, "Predictions": sheet}

    def _draw_predictions(self, part: str, scores: ClassificationScores, path: Path) -> None:
        """Up to half the sheet are wrong predictions, the rest right ones; both spread evenly over the data set."""
        samples, names = self.parts[part], self.display_names
        labels, predicted = scores.labels, scores.predicted
        wrong = (labels != predicted).nonzero().flatten().tolist()
        right = (labels == predicted).nonzero().flatten().tolist()
        wrong_wanted = min(len(wrong), max(SHEET_IMAGES // 2, SHEET_IMAGES - len(right)))
        shown = spread(wrong, wrong_wanted) + spread(right, SHEET_IMAGES - wrong_wanted)
        titles = [
            names[predicted[i]] if predicted[i] == labels[i] else f"{names[predicted[i]]}, true {names[labels[i]]}"
            for i in shown
        ]
        save_prediction_sheet(
            [samples[i][0] for i in shown],
            titles,
            [bool(predicted[i] == labels[i]) for i in shown],
            path,
            f"{len(wrong)} of {len(samples)} {PART_NAMES[part]} images wrong; {wrong_wanted} of them shown, then right "
            f"ones",
        )

    def image_files(self, part: str, run_dir: Path) -> tuple[Path, ...]:
        """Images that are no files yet are written into the run."""
        samples = self.parts[part]
        chosen = spread(range(len(samples)), SHOWN_FILES)
        if isinstance(samples, Files):
            return tuple(samples.path(i) for i in chosen)
        folder = run_dir / "samples"
        folder.mkdir(exist_ok=True)
        paths = []
        for i in chosen:
            image, label = samples[i]
            paths.append(folder / f"{samples.classes[label]}_{i}.png")
            image.save(paths[-1])
        return tuple(paths)

    @staticmethod
    def dense_part(model: nn.Module, config: Config) -> tuple[nn.Module, tuple[int, int], int]:
        return model, (config.data.image_size, config.data.image_size), 1
