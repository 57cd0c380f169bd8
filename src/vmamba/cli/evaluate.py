"""Top-1, top-5 and loss of a trained model on labelled images."""

from __future__ import annotations

import argparse

NAME = "eval"
HELP = "measure a trained model on a labelled data set"
EXAMPLES = """examples:
  vmamba eval runs/digits-vmamba_nano
  vmamba eval runs/flowers-vmamba_micro --data more_flowers/
  vmamba eval vssm1_tiny_0230s_ckpt_epoch_264.pth --model vmamba_tiny_s1l8 --data imagenet/ --precision fp16

Without --data: the data the run was trained on (its test images, or its validation images where it has no others)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="run directory or checkpoint file")
    parser.add_argument("--data", metavar="FOLDER", help='image folder with test/, val/ or class folders, or "digits"')
    parser.add_argument("--model", metavar="NAME", help="which model the file is of, when it does not say so itself")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loading processes")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, mps")
    parser.add_argument(
        "--precision",
        choices=("fp32", "tf32", "bf16", "fp16"),
        default="fp32",
        help="default fp32; the published figures are of fp16 and batches of 64",
    )


def run(options: argparse.Namespace) -> None:
    from ..training import evaluate_checkpoint

    result = evaluate_checkpoint(
        options.checkpoint,
        data=options.data,
        model_name=options.model,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        precision=options.precision,
    )
    rows = [
        ("model", "images", "top-1 %", "top-5 %", "loss"),
        (result.model, f"{result.images}", *_cells(result.metrics)),
        # so that whoever has ImageNet sees at once whether the weights and the code are right
        *([("published", "50000", *_cells(result.published))] if result.published else []),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"{result.checkpoint} on {result.data}, {options.precision}")
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cells(metrics: dict[str, float]) -> tuple[str, ...]:
    digits = {"top1": 3, "top5": 3, "loss": 4}
    return tuple(f"{metrics[name]:.{count}f}" if name in metrics else "-" for name, count in digits.items())
