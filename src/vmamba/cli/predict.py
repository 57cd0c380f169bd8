"""The most probable classes of image files."""

from __future__ import annotations

import argparse
import json

from .devices import add_device_argument

NAME = "predict"
HELP = "classify image files with a trained model"
EXAMPLES = """examples:
  vmamba predict photo.jpg another.png                      (the newest run under runs/)
  vmamba predict --checkpoint runs/flowers-vmamba_micro --top-k 3 --sheet sheet.png photos/
  vmamba predict --checkpoint vssm1_tiny_0230s_ckpt_epoch_264.pth --model vmamba_tiny_s1l8 --json photo.jpg

A folder stands for the images directly in it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders of them")
    parser.add_argument("--checkpoint", metavar="RUN_OR_FILE", help="run directory or checkpoint (default: newest run)")
    parser.add_argument("--model", metavar="NAME", help="which model the file is of, when it does not say so itself")
    parser.add_argument("--top-k", type=int, default=5, metavar="K")
    parser.add_argument("--json", action="store_true", help="print JSON: a list of {image, predictions}")
    parser.add_argument("--sheet", metavar="PNG", help="also draw the pictures with their predictions")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    from .._devices import choose_device
    from ..training import newest_run, predict_files

    if options.top_k < 1:
        raise ValueError(f"--top-k must be at least 1, not {options.top_k}")
    device = choose_device(options.device)
    result = predict_files(
        options.checkpoint or newest_run("runs"),
        options.images,
        model_name=options.model,
        top_k=options.top_k,
        device=device,
        sheet=options.sheet,
    )
    if options.json:
        print(
            json.dumps(
                [
                    {"image": str(path), "predictions": [{"class": n, "probability": p} for n, p in ranked]}
                    for path, ranked in result.predictions
                ],
                indent=2,
                ensure_ascii=False,
            )
        )
        return
    print(f"{result.model} from {result.checkpoint}, on {device}")
    width = max(len(str(path)) for path, _ in result.predictions)
    for path, ranked in result.predictions:
        print(f"{path!s:<{width}}  " + "  ".join(f"{name} {100 * share:.1f} %" for name, share in ranked))
    if options.sheet:
        print(f"sheet: {options.sheet}")
