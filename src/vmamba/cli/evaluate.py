"""A trained model measured on labelled images: top-1, top-5 and loss; mean IoU of segmentation; AP of detection."""

from __future__ import annotations

import argparse

from .detect import add_size_arguments, sizes_from
from .devices import add_device_argument
from .segment import add_inference_arguments, inference_from
from .tables import print_table

NAME = "eval"
HELP = "measure a trained model on a labelled data set"
EXAMPLES = """examples:
  vmamba eval runs/digits-vmamba_nano
  vmamba eval runs/flowers-vmamba_micro --data more_flowers/
  vmamba eval runs/flowers-vmamba_micro --image-size 128 --crop-pct 1.0
  vmamba eval vssm1_tiny_0230s_ckpt_epoch_264.pth --model vmamba_tiny_s1l8 --data imagenet/ --precision fp16
  vmamba eval runs/street-vmamba_tiny_s1l8 --window 512 --device cpu
  vmamba eval upernet.pth --task segmentation --data ADEChallengeData2016/
  vmamba eval upernet.pth --task segmentation --data ADEChallengeData2016/ \\
      --short-side 0 --scales 0.5,0.75,1,1.25,1.5,1.75 --flip

  vmamba eval runs/cells-vmamba_tiny_s1l8 --max-dets 500 --results found/
  vmamba eval mask_rcnn.pth --task detection --data coco/val2017 --annotations coco/annotations/instances_val2017.json

Without --data: the data the run was trained on (its test images, or its validation images where it has no others)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="run directory or checkpoint file")
    parser.add_argument(
        "--task",
        choices=("classification", "segmentation", "detection"),
        help="default: the run's own; for other files classification",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help='image folder, zip or tar files, hfds/NAME, or "digits"; for segmentation a folder of images and masks, '
        "for detection one of images and COCO files",
    )
    parser.add_argument("--model", metavar="NAME", help="which model the file is of, when it does not say so itself")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loading processes")
    add_device_argument(parser)
    parser.add_argument(
        "--precision",
        choices=("fp32", "tf32", "bf16", "fp16"),
        default="fp32",
        help="default fp32; the published figures are of fp16 and batches of 64",
    )
    images = parser.add_argument_group("classification")
    images.add_argument("--batch-size", type=int, default=64, metavar="N")
    images.add_argument("--image-size", type=int, metavar="PX", help="other than the one it was trained for")
    images.add_argument("--crop-pct", type=float, metavar="SHARE", help="of the short side that the centre crop keeps")
    objects = parser.add_argument_group("detection")
    objects.add_argument("--annotations", metavar="JSON", help="a COCO file of the images in the folder --data")
    objects.add_argument(
        "--max-dets", type=int, metavar="N", help="detections an image that count (default: as trained, or 100)"
    )
    objects.add_argument("--results", metavar="DIR", help="folder for boxes.json and masks.json, COCO's result files")
    add_size_arguments(objects)
    add_inference_arguments(parser.add_argument_group("segmentation"))


def run(options: argparse.Namespace) -> None:
    from .._devices import choose_device

    options.device = choose_device(options.device)
    TASKS[options.task or _task_of(options.checkpoint)](options)


def _task_of(checkpoint: str) -> str:
    from ..training.checkpoints import about_of

    about = about_of(checkpoint)
    return "classification" if about is None else about.task


def _classification(options: argparse.Namespace) -> None:
    from ..training import evaluate_checkpoint

    result = evaluate_checkpoint(
        options.checkpoint,
        data=options.data,
        model_name=options.model,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        image_size=options.image_size,
        crop_pct=options.crop_pct,
        precision=options.precision,
    )
    names = ("model", "images", "top-1 %", "top-5 %", "loss")
    rows = [
        (result.model, f"{result.images}", *_cells(result.metrics)),
        # so that whoever has ImageNet sees at once whether the weights and the code are right
        *([("published", "50000", *_cells(result.published))] if result.published else []),
    ]
    print(f"{result.checkpoint} on {result.data}, {options.precision} on {options.device}")
    print_table(names, rows, left=0)


def _cells(metrics: dict[str, float]) -> tuple[str, ...]:
    digits = {"top1": 3, "top5": 3, "loss": 4}
    return tuple(f"{metrics[name]:.{count}f}" if name in metrics else "-" for name, count in digits.items())


def _segmentation(options: argparse.Namespace) -> None:
    from ..training.segmented_files import evaluate_segmentation

    result = evaluate_segmentation(
        options.checkpoint,
        options.data,
        backbone=options.model,
        inference=inference_from(options, antialias=False),  # as published
        workers=options.workers,
        device=options.device,
        precision=options.precision,
    )
    print(
        f"{options.checkpoint} on {result.data} ({result.images} {result.part} images), "
        f"{options.precision} on {options.device}\n"
    )
    width = max(len("class"), *map(len, result.classes))
    print(f"{'class':<{width}}  {'IoU %':>7}  {'acc. %':>7}  {'pixels':>12}")
    for name, row in zip(result.classes, result.by_class, strict=True):
        print(f"{name:<{width}}  {_percent(row['iou'])}  {_percent(row['accuracy'])}  {row['pixels']:>12,}")
    metrics = result.metrics
    print(
        f"\nmean IoU {metrics['miou']:.2f} %   mean accuracy {metrics['macc']:.2f} %   "
        f"pixel accuracy {metrics['accuracy']:.2f} %   loss {metrics['loss']:.4f}"
    )


def _detection(options: argparse.Namespace) -> None:
    from ..training.detected_files import evaluate_detection

    result = evaluate_detection(
        options.checkpoint,
        options.data,
        options.annotations,
        backbone=options.model,
        max_dets=options.max_dets,
        results=options.results,
        workers=options.workers,
        device=options.device,
        precision=options.precision,
        **sizes_from(options),
    )
    print(
        f"{options.checkpoint} on {result.data} ({result.images} images, at most {result.max_dets} detections each), "
        f"{options.precision} on {options.device}\n"
    )
    columns = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "small", "APm": "medium", "APl": "large"}
    print(f"{'':<6}" + "".join(f"{name:>8}" for name in columns))
    for kind, found in result.precision.items():
        print(f"{kind:<6}" + "".join(f" {_percent(getattr(found, field))}" for field in columns.values()))
    categories = next(iter(result.precision.values())).by_category
    width = max(len("category"), *map(len, categories))
    print(f"\n{'category':<{width}}" + "".join(f"  {kind + ' AP':>8}" for kind in result.precision))
    for name in categories:
        print(f"{name:<{width}}" + "".join(f"   {_percent(p.by_category[name])}" for p in result.precision.values()))
    for file in result.files.values():
        print(f"results: {file}")


def _percent(value: float) -> str:
    return f"{value:>7.2f}" if value == value else f"{'-':>7}"  # NaN: the class does not occur


TASKS = {"classification": _classification, "segmentation": _segmentation, "detection": _detection}
