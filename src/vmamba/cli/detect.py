"""Objects in image files: boxes, masks, names and scores, as COCO JSON and as pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .devices import add_device_argument

if TYPE_CHECKING:
    from ..data import Category

NAME = "detect"
HELP = "find objects in image files with a trained detector"
EXAMPLES = """examples:
  vmamba detect --checkpoint mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth street.jpg zoo/
  vmamba detect --checkpoint runs/cells-vmamba_tiny_s1l8 slides/
  vmamba detect --checkpoint cells.safetensors --categories cells/train.json --out found/ slide.png
  vmamba detect --checkpoint swin.safetensors --model swin_tiny_patch4_window7_224 --threshold 0.5 street.jpg

A folder stands for the images directly in it. OUT gets detections.json, a COCO file with scores, and a PNG an image."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders of them")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN_OR_FILE",
        help="run directory, or weights, official or ours",
    )
    parser.add_argument("--model", metavar="NAME", help="its backbone (default: the VMamba that the weights fit)")
    parser.add_argument(
        "--categories",
        metavar="JSON",
        help="COCO file with the categories it knows (default: the run's, or COCO's 80)",
    )
    parser.add_argument("--out", default="detections", metavar="DIR", help="folder to write to (default detections)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in OUT")
    parser.add_argument("--threshold", type=float, default=0.3, metavar="S", help="least score (default 0.3)")
    parser.add_argument(
        "--max-detections", type=int, metavar="N", help="an image (default: as the run was evaluated, or 100)"
    )
    add_size_arguments(parser)
    add_device_argument(parser)


def add_size_arguments(parser: argparse._ActionsContainer) -> None:
    """What weights do not tell of a detector; a run's checkpoint does."""
    parser.add_argument("--min-size", type=int, metavar="PX", help="short side it works at (a run's own, or 800)")
    parser.add_argument("--max-size", type=int, metavar="PX", help="long side at most (a run's own, or 1333)")
    parser.add_argument("--anchor-scale", type=float, metavar="S", help="as it was trained (a run's own, or 8)")


def sizes_from(options: argparse.Namespace) -> dict[str, float]:
    """The options of `add_size_arguments` that were given, for `mask_rcnn`."""
    given = {name: getattr(options, name) for name in ("min_size", "max_size", "anchor_scale")}
    return {name: value for name, value in given.items() if value is not None}


def run(options: argparse.Namespace) -> None:
    from .._devices import choose_device
    from .._files import write_aside, write_text
    from ..data import list_images, read_image
    from ..pictures import draw_detections
    from ..tasks import as_coco, detect
    from ..training.detected_files import load_trained_detector

    if not 0 <= options.threshold < 1:
        raise ValueError(f"--threshold must lie in [0, 1), not {options.threshold}")
    device = choose_device(options.device)
    files = list_images(options.images)
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not options.overwrite:
        raise FileExistsError(f"{out} exists already: choose another folder with --out or add --overwrite")
    changed = sizes_from(options) | {"score_threshold": options.threshold}
    if options.max_detections is not None:
        changed["max_detections"] = options.max_detections
    detector, known, _ = load_trained_detector(options.checkpoint, options.model, **changed)
    detector.to(device)
    categories = _categories(options.categories, known, detector.classes)
    names = [category.name for category in categories]

    out.mkdir(parents=True, exist_ok=True)
    print(f"{options.checkpoint}, on {device}")
    images, found = [], []
    for file, picture_name in zip(files, _picture_names(files), strict=True):
        image = read_image(file)
        detections = detect(detector, image)
        images.append((str(file), (image.height, image.width)))
        found.append(detections)
        picture = draw_detections(image, detections, names)
        write_aside(out / picture_name, lambda aside, picture=picture: picture.save(aside, format="png"))
        print(f"{file}  {_summary(detections['labels'].tolist(), names)}  -> {out / picture_name}")
    write_text(json.dumps(as_coco(images, found, categories)), out / "detections.json")
    print(f"{sum(len(d['labels']) for d in found)} objects in {len(files)} image(s): {out / 'detections.json'}")


def _categories(file: str | None, known: Sequence[Category] | None, classes: int) -> Sequence[Category]:
    from ..data import Category, read_coco

    if file is not None:
        categories = read_coco(file).categories
        if len(categories) != classes:
            raise ValueError(f"{file} has {len(categories)} categories, but the detector knows {classes}")
        return categories
    return known or tuple(Category(number, f"class {number}") for number in range(1, classes + 1))


def _picture_names(files: list[Path]) -> list[str]:
    """A PNG's name for each file; files of one name from several folders are numbered."""
    names: list[str] = []
    for file in files:
        name, number = f"{file.stem}.png", 2
        while name in names:
            name, number = f"{file.stem}-{number}.png", number + 1
        names.append(name)
    return names


def _summary(labels: list[int], names: list[str]) -> str:
    counts = {names[label - 1]: labels.count(label) for label in dict.fromkeys(labels)}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
