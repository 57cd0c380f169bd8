"""Semantic segmentation of image files: for a.jpg a mask, a coloured overlay and a legend."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..tasks import SegmentationInference

NAME = "segment"
HELP = "name the class of every pixel of image files"
EXAMPLES = """examples:
  vmamba segment --checkpoint upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s_iter_160000.pth photo.jpg
  vmamba segment --checkpoint street.safetensors --classes street_classes.txt --short-side 360 --flip frames/
  vmamba segment --checkpoint street.safetensors --short-side 0 --window 512 aerial.png

A folder stands for the images directly in it. photo.mask.png holds a class index in every pixel (in order of the class
names, from 0), photo.overlay.png the photo under its classes' colours, photo.legend.png what the colours mean."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders of them")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="UPerNet weights, official or ours")
    parser.add_argument("--model", metavar="NAME", help="its backbone, when it is none of `vmamba models`")
    parser.add_argument("--classes", metavar="FILE", help="class names, one a line (default: ADE20K's for 150 classes)")
    parser.add_argument("--out", default="segmented", metavar="DIR", help="where to write (default segmented/)")
    add_inference_arguments(parser)
    parser.add_argument("--opacity", type=float, default=0.55, help="of the colours in the overlay (default 0.55)")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, mps")


def add_inference_arguments(parser: argparse._ActionsContainer) -> None:
    """The options that say how images are looked at."""
    parser.add_argument(
        "--short-side",
        type=int,
        default=512,
        metavar="PX",
        help="fit images to this short side, four times it at most in length (default 512; 0: the image's own size)",
    )
    parser.add_argument("--window", type=int, metavar="PX", help="slide a square window instead of the whole image")
    parser.add_argument("--stride", type=int, metavar="PX", help="step of the window (default: two thirds of it)")
    parser.add_argument(
        "--scales", default="1", metavar="A,B,...", help="average over scales, such as 0.5,0.75,1,1.25,1.5,1.75"
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")


def inference_from(options: argparse.Namespace, antialias: bool) -> SegmentationInference:
    """What the options of `add_inference_arguments` say."""
    from ..tasks import SegmentationInference

    return SegmentationInference(
        size=(4 * options.short_side, options.short_side) if options.short_side else None,
        window=(options.window, options.window) if options.window else None,
        stride=(options.stride, options.stride) if options.stride else None,
        ratios=_numbers(options.scales),
        flip=options.flip,
        antialias=antialias,
    )


def run(options: argparse.Namespace) -> None:
    from ..analysis.segmentation import segment_files

    results = segment_files(
        options.checkpoint,
        options.images,
        options.out,
        backbone=options.model,
        classes=_read_names(options.classes) if options.classes else None,
        inference=inference_from(options, antialias=True),
        opacity=options.opacity,
        device=options.device,
    )
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
