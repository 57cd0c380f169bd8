"""Top-1, top-5 and loss of a trained model on labelled images."""

from __future__ import annotations

import argparse

NAME = "eval"
HELP = "measure a trained model on a labelled data set"
EXAMPLES = """examples:
  vmamba eval runs/digits-vmamba_nano
  vmamba eval runs/flowers-vmamba_micro --data more_flowers/
  vmamba eval runs/flowers-vmamba_micro --image-size 128 --crop-pct 1.0
  vmamba eval vssm1_tiny_0230s_ckpt_epoch_264.pth --model vmamba_tiny_s1l8 --data imagenet/

Without --data: the data the run was trained on (its test images, or its validation images where it has no others)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="run directory or checkpoint file")
    parser.add_argument("--data", metavar="FOLDER", help='image folder, zip or tar files, hfds/NAME, or "digits"')
    parser.add_argument("--model", metavar="NAME", help="which model the file is of, when it does not say so itself")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--image-size", type=int, metavar="PX", help="other than the one it was trained for")
    parser.add_argument("--crop-pct", type=float, metavar="SHARE", help="of the short side that the centre crop keeps")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loading processes")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, mps")


def run(options: argparse.Namespace) -> None:
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
    )
    names = ("model", "images", "top-1 %", "top-5 %", "loss")
    metrics = result.metrics
    values = (
        result.model,
        str(result.images),
        f"{metrics['top1']:.3f}",
        f"{metrics['top5']:.3f}",
        f"{metrics['loss']:.4f}",
    )
    widths = [max(len(name), len(value)) for name, value in zip(names, values, strict=True)]
    print(f"{result.checkpoint} on {result.data}")
    for row in (names, values):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
