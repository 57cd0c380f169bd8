"""How FLOPs, time and memory of networks grow with the image, and the slopes: 1 is linear in pixels, 2 quadratic.

With --checkpoint also the accuracy of a trained classifier over test sizes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .devices import add_device_argument
from .tables import check_figure, check_writable, describe_conditions, name_files, print_table, write_csv

if TYPE_CHECKING:
    from ..analysis import ScalingReport
    from ..analysis.curves import Plot

NAME = "scaling"
HELP = "measure how FLOPs, time, memory and accuracy change with the image size"
EXAMPLES = """examples:
  vmamba scaling --json scaling.json --csv scaling.csv --figure scaling
  vmamba scaling vmamba_tiny_s1l8 convnext_tiny --sizes 224,448,896 --task inference --mode compile
  vmamba scaling vmamba_nano convnext_atto --device cpu --sizes 64,96,128 --batch 1
  vmamba scaling --checkpoint runs/imagenette --data imagenette/ --accuracy-sizes 128,192,224,288,384

A batch holds about as many pixels at every size: --batch images at 224 px, at least one. Out of memory at one size is a
row of the table, not the end. Sizes are measured from the smallest up, and files are written anew after every
measurement: a run that is cut off leaves what it has. The exit status is 1 if the scan is wrong."""

MODELS = ("vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224", "convnext_tiny", "deit_small_patch16_224")
ON_CUDA = (224, 384, 512, 768, 1024, 1280, 1536)
ON_CPU = (64, 96, 128, 192)
TITLES = {"macs": "multiply-accumulates", "time": "time", "memory": "memory beyond weights and gradients"}
UNITS = {"macs": "GMACs an image", "time": "ms an image", "memory": "MB an image"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"timm models (default {' '.join(MODELS)})")
    parser.add_argument(
        "--sizes",
        metavar="LIST",
        help=f"height and width in pixels (default on CUDA {_listed(ON_CUDA)}; on the CPU {_listed(ON_CPU)})",
    )
    add_device_argument(parser, mps=False)
    parser.add_argument("--batch", type=int, metavar="N", help="images at 224 px (default on CUDA 128, on the CPU 2)")
    parser.add_argument("--dtype", help="as for `vmamba bench` (default on CUDA bf16, on the CPU fp32)")
    parser.add_argument("--tf32", action="store_true", help="let fp32 products use TF32")
    parser.add_argument("--task", metavar="LIST", default="inference,training", help="inference, training or both")
    parser.add_argument("--mode", default="eager", help="eager (the default), compile or graphs")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds of a measurement (default 3)")
    parser.add_argument(
        "--time-limit", type=float, default=480, metavar="S", help="begin no measurement after S seconds (default 480)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--csv", metavar="FILE", help="also write the rows as CSV")
    parser.add_argument("--figure", metavar="FILE", help="also draw the curves (.png, .svg; no ending: both)")
    accuracy = parser.add_argument_group("accuracy of a trained classifier")
    accuracy.add_argument("--checkpoint", metavar="RUN", help="run directory or file of weights")
    accuracy.add_argument("--checkpoint-model", metavar="NAME", help="the model of a file of bare weights")
    accuracy.add_argument("--data", metavar="PATH", help="labelled images (default: what its training held out)")
    accuracy.add_argument("--accuracy-sizes", metavar="LIST", help="test sizes (default: --sizes)")


def run(options: argparse.Namespace) -> None:
    from ..analysis import ModelSettings, accuracy_by_size, measure_scaling
    from ..analysis.measuring import checked_device
    from ..analysis.scaling import check_scaling

    check_writable(options.json, options.csv)
    check_figure(options.figure)
    for name in ("checkpoint_model", "data", "accuracy_sizes"):
        if getattr(options, name) is not None and not options.checkpoint:
            raise ValueError(f"--{name.replace('_', '-')} is of no use without --checkpoint")
    device = checked_device(options.device)
    on_cuda = device.type == "cuda"
    sizes = _numbers("--sizes", options.sizes) if options.sizes else (ON_CUDA if on_cuda else ON_CPU)
    test_sizes = _numbers("--accuracy-sizes", options.accuracy_sizes) if options.accuracy_sizes else sizes
    settings = ModelSettings(
        device=options.device,
        tasks=tuple(options.task.split(",")),
        modes=tuple(options.mode.split(",")),
        batch=2 if options.batch is None and not on_cuda else options.batch,
        dtype=options.dtype,
        tf32=options.tf32,
        repeats=options.repeats,
    )
    models = options.models or MODELS
    check_scaling(models, sizes, settings)
    # first, since it finds out whether checkpoint and data are there
    accuracy = []
    if options.checkpoint:
        accuracy = accuracy_by_size(lambda size: _evaluate(options, size, device), test_sizes, _progress)

    def finished(report: ScalingReport) -> None:
        report.accuracy = accuracy
        _write(report, options)

    report = measure_scaling(
        models,
        sizes,
        settings,
        time_limit=options.time_limit,
        progress=_progress,
        finished=finished,
    )
    _print(report)
    for what, path in (("figures", options.json), ("rows", options.csv), ("curves", name_files(options.figure))):
        if path and report.valid:
            print(f"{what}: {path}")
    if not report.valid:
        sys.exit(1)


def _evaluate(options: argparse.Namespace, size: int, device: object) -> dict[str, float]:
    from ..training import evaluate_checkpoint

    result = evaluate_checkpoint(
        options.checkpoint,
        data=options.data,
        model_name=options.checkpoint_model,
        device=str(device),
        image_size=size,
    )
    return result.metrics


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _listed(sizes: tuple[int, ...]) -> str:
    return ",".join(map(str, sizes))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} takes numbers such as 224,448, not {text!r}") from None


def _write(report: ScalingReport, options: argparse.Namespace) -> None:
    from .._files import write_text

    if options.json:
        write_text(json.dumps(report.as_dict(), indent=2) + "\n", options.json)
    if options.csv:
        records = report.records()
        write_csv(list(records[0]), [list(record.values()) for record in records], options.csv)
    if options.figure:
        from ..analysis.curves import save_curves

        settings = report.settings
        heading = f"Cost against image size: {report.environment['device']}, {settings.batch} × 224 × 224 px a batch"
        footnote = describe_conditions(report.environment, settings)
        save_curves(_plots(report), heading, footnote, Path(options.figure))


def _print(report: ScalingReport) -> None:
    print(describe_conditions(report.environment, report.settings))
    print(f"scan: {report.verdict}")
    if not report.valid:
        print("INVALID: the scan is wrong, so nothing was measured")
        return
    for task in report.settings.tasks:
        print(f"\n{task}, {report.settings.modes[0]}; figures of one image")
        cells = []
        for model in report.models:
            for row in report.rows:
                if (row.model, row.task) != (model, task):
                    continue
                start = [model, str(row.size), str(row.measured.batch)]
                cost = ["-", "-"]
                if row.complexity is not None:
                    cost = [f"{figure / 1e9:.2f}" for figure in (row.complexity.macs, row.complexity.flops)]
                if row.measured.seconds is None:
                    cells.append([*start, *cost, f"failed: {row.measured.error}"])
                    continue
                memory = "-" if row.megabytes is None else f"{row.megabytes:.1f}"
                cells.append(
                    [*start, *cost, f"{row.milliseconds:.3f}", f"{row.measured.images_per_second:,.1f}", memory]
                )
        print_table(["model", "px", "batch", "GMACs", "GFLOPs", "ms", "images/s", "MB"], cells, left=1)
    print("\nslopes: the exponent with which a figure grows with the pixels; 1 is linear, 2 quadratic")
    slopes = [
        [slope.quantity, slope.model, f"{slope.fit:.2f}", f"{slope.last:.2f}", str(slope.sizes)]
        for slope in report.slopes
    ]
    print_table(["of", "model", "all sizes", "last two", "sizes"], slopes, left=2)
    if report.accuracy:
        print("\naccuracy of the checkpoint")
        rows = [
            [str(entry.size), f"failed: {entry.error}"]
            if entry.top1 is None
            else [str(entry.size), f"{entry.top1:.2f}", "-" if entry.top5 is None else f"{entry.top5:.2f}"]
            for entry in report.accuracy
        ]
        print_table(["px", "top-1 %", "top-5 %"], rows, left=1)


def _plots(report: ScalingReport) -> list[Plot]:
    from ..analysis.curves import Curve, Plot

    slopes = {(slope.quantity, slope.model): slope.fit for slope in report.slopes}
    plots = []
    for quantity in report.quantities:
        kind, _, task = quantity.partition(" ")
        curves = []
        for model in report.models:
            points = report.points(model, quantity)
            if points:
                sizes, values = zip(*points, strict=True)
                slope = slopes.get((quantity, model))
                values = [value / 1e9 if kind == "macs" else value for value in values]
                curves.append(Curve(model, "" if slope is None else f"(slope {slope:.2f})", sizes, values))
        if curves:
            plots.append(Plot(f"{TITLES[kind]}, {task}" if task else TITLES[kind], UNITS[kind], curves))
    if found := [entry for entry in report.accuracy if entry.top1 is not None]:
        curve = Curve("the checkpoint", "", [entry.size for entry in found], [entry.top1 for entry in found])
        plots.append(Plot("accuracy of the trained classifier", "top-1, %", [curve], log=False))
    return plots
