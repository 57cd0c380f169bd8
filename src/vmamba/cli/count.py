"""Parameters and operations of a network, module by module, without running it.

Two conventions stand side by side: the papers' (one per multiply-accumulate) and torch's (two)."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .tables import check_writable, print_table, write_csv

if TYPE_CHECKING:
    from torch import nn

    from ..analysis import ModuleCount

NAME = "count"
HELP = "count parameters and FLOPs of a model, module by module"
EXAMPLES = """examples:
  vmamba count vmamba_tiny_s1l8
  vmamba count vmamba_tiny_s1l8 --size 512 --depth 3
  vmamba count vmamba_base_s2l15 --task segmentation --csv upernet.csv
  vmamba count vmamba_tiny_s2l5 --task detection --size 800 1333 --json mask_rcnn.json
  vmamba count swin_tiny_patch4_window7_224

GMACs: 10^9 operations as the VMamba papers count their "FLOPs": one per multiply-accumulate; 9*B*L*E*N + B*L*E for the
scan of every route, which is not halved; 5 an element for a LayerNorm. GFLOPs: two per multiply-accumulate, 9*N + 2 for
a step of the scan, nothing for norms, as torch counts. Activations, pooling and resizing count in neither.
A detector's heads count on 1000 and 100 regions, as mmdetection's counter has it."""

# task -> (H, W) that the papers' figures are for, classes
TASKS = {
    "classification": ((224, 224), 1000),
    "segmentation": ((512, 2048), 150),
    "detection": ((1280, 800), 80),
}
COLUMNS = ("name", "kind", "depth", "parameters", "macs", "flops")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="timm model: a classifier, or the backbone for another task")
    parser.add_argument(
        "--task", choices=tuple(TASKS), default="classification", help="segmentation: UPerNet; detection: Mask R-CNN"
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="PX",
        help="height and width, or one number for both (default 224; segmentation 512 2048; detection 1280 800)",
    )
    parser.add_argument("--classes", type=int, metavar="N", help="default 1000; segmentation 150; detection 80")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="levels of modules in the table (default 2)")
    parser.add_argument("--csv", metavar="FILE", help="also write every module, whatever its depth, as CSV")
    parser.add_argument("--json", metavar="FILE", help="the same as JSON")


def run(options: argparse.Namespace) -> None:
    from ..analysis import count_modules

    height, width = _size(options)
    if options.depth < 0:
        raise ValueError(f"--depth must be 0 or more, not {options.depth}")
    if options.classes is not None and options.classes < 1:
        raise ValueError(f"--classes must be at least 1, not {options.classes}")
    check_writable(options.csv, options.json)
    classes = options.classes or TASKS[options.task][1]
    counts = count_modules(_network(options.model, options.task, classes, (height, width)), (1, 3, height, width))
    whole = counts[0]
    print(f"{options.model}, {options.task}, {classes} classes, one image of {height} x {width}\n")
    print_table(
        ["module", "kind", "parameters", "GMACs", "%", "GFLOPs"],
        [_cells(count, whole) for count in counts if count.depth <= options.depth],
        left=2,
    )
    print("\nGMACs: one per multiply-accumulate, as in the papers; GFLOPs: two (see `vmamba count --help`)")
    if options.csv:
        write_csv(COLUMNS, [list(_record(count).values()) for count in counts], options.csv)
        print(f"modules: {options.csv}")
    if options.json:
        from .._files import write_text

        facts = {"model": options.model, "task": options.task, "classes": classes, "height": height, "width": width}
        report = {"kind": "count", **facts, "modules": [_record(count) for count in counts]}
        write_text(json.dumps(report, indent=2) + "\n", options.json)
        print(f"modules: {options.json}")


def _size(options: argparse.Namespace) -> tuple[int, int]:
    size = options.size or TASKS[options.task][0]
    if len(size) > 2 or min(size) < 1:
        raise ValueError(f"--size takes one or two positive numbers, not {' '.join(map(str, size))}")
    return size[0], size[-1]


def _network(name: str, task: str, classes: int, size: tuple[int, int]) -> nn.Module:
    """The network on the meta device, where its weights take no memory and no time."""
    import torch

    from ..analysis.throughput import make_model

    if task == "classification":
        return make_model(name, size, num_classes=classes)
    with torch.device("meta"):
        if task == "segmentation":
            from ..models import create_upernet

            return create_upernet(name, classes)
        from ..models.detection import mask_rcnn

        return mask_rcnn(name, classes)


def _cells(count: ModuleCount, whole: ModuleCount) -> list[str]:
    name = "  " * count.depth + (count.name.rpartition(".")[2] or "network")
    share = f"{100 * count.macs / whole.macs:.1f}" if whole.macs else "-"
    return [name, count.kind, f"{count.parameters:,}", f"{count.macs / 1e9:.4g}", share, f"{count.flops / 1e9:.4g}"]


def _record(count: ModuleCount) -> dict[str, object]:
    return {column: getattr(count, column) for column in COLUMNS}
