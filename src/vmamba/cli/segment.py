"""Semantic segmentation of image files: for a.jpg a mask, a coloured overlay and a legend."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .devices import add_device_argument

if TYPE_CHECKING:
    from ..tasks import SegmentationInference

NAME = "segment"
HELP = "name the class of every pixel of image files"
EXAMPLES = """examples:
  vmamba segment --checkpoint upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s_iter_160000.pth photo.jpg
  vmamba segment --checkpoint runs/street-vmamba_tiny_s1l8 frames/
  vmamba segment --checkpoint street.safetensors --classes street_classes.txt --short-side 360 --flip frames/
  vmamba segment --checkpoint street.safetensors --short-side 0 --window 512 aerial.png

A folder stands for the images directly in it. photo.mask.png holds a class index in every pixel (in order of the class
names, from 0), photo.overlay.png the photo under its classes' colours, photo.legend.png what the colours mean."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders of them")
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN_OR_FILE", help="run directory, or UPerNet weights, official or ours"
    )
    parser.add_argument("--model", metavar="NAME", help="its backbone, when it is none of `vmamba models`")
    parser.add_argument("--classes", metavar="FILE", help="class names, one a line (default: the run's, or ADE20K's)")
    parser.add_argument("--out", default="segmented", metavar="DIR", help="where to write (default segmented/)")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are there already")
    add_inference_arguments(parser)
    parser.add_argument("--opacity", type=float, default=0.55, help="of the colours in the overlay (default 0.55)")
    add_device_argument(parser)


def add_inference_arguments(parser: argparse._ActionsContainer) -> None:
    """The options that say how images are looked at."""
    parser.add_argument(
        "--short-side",
        type=int,
        metavar="PX",
        help="fit images to this short side, four times it at most in length (default: as the run was evaluated, or "
        "512; 0: the image's own size)",
    )
    parser.add_argument("--window", type=int, metavar="PX", help="slide a square window instead of the whole image")
    parser.add_argument("--stride", type=int, metavar="PX", help="step of the window (default: two thirds of it)")
    parser.add_argument("--scales", metavar="A,B,...", help="average over scales, such as 0.5,0.75,1,1.25,1.5,1.75")
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")


def inference_from(options: argparse.Namespace, antialias: bool) -> SegmentationInference | None:
    """What the options of `add_inference_arguments` say; None for a run's checkpoint where they say nothing."""
    from ..tasks import SegmentationInference
    from ..training.checkpoints import about_of

    given = (options.short_side, options.window, options.stride, options.scales, options.flip or None)
    if all(value is None for value in given) and _is_a_run(options.checkpoint, about_of):
        return None
    short_side = 512 if options.short_side is None else options.short_side
    if short_side < 0:
        raise ValueError(f"--short-side must be a number of pixels, or 0 for the image's own size, not {short_side}")
    return SegmentationInference(
        size=(4 * short_side, short_side) if short_side else None,
        window=(options.window, options.window) if options.window else None,
        stride=(options.stride, options.stride) if options.stride else None,
        ratios=_numbers(options.scales or "1"),
        flip=options.flip,
        antialias=antialias,
    )


def _is_a_run(checkpoint: str, about_of: Callable[[Path], object]) -> bool:
    path = Path(checkpoint)
    return path.is_dir() or (path.is_file() and about_of(path) is not None)


def run(options: argparse.Namespace) -> None:
    from .._devices import choose_device
    from ..training.segmented_files import segment_files

    device = choose_device(options.device)
    results = segment_files(
        options.checkpoint,
        options.images,
        options.out,
        backbone=options.model,
        classes=_read_names(options.classes) if options.classes else None,
        inference=inference_from(options, antialias=True),
        opacity=options.opacity,
        device=device,
        overwrite=options.overwrite,
    )
    print(f"{options.checkpoint}, on {device}")
    for result in results:
        shares = "  ".join(f"{name} {100 * share:.1f} %" for _, name, share in result.classes[:8])
        more = f"  and {len(result.classes) - 8} more" if len(result.classes) > 8 else ""
        print(f"{result.image}  {shares}{more}\n  {result.mask}\n  {result.overlay}\n  {result.legend}")


def _read_names(listing: str) -> list[str]:
    path = Path(listing)
    if not path.is_file():
        raise FileNotFoundError(f"no such list of class names: {path}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--scales must be numbers with commas between them, such as 0.75,1,1.25, not {text!r}"
        ) from None
