"""Speed and memory of networks side by side, ours and any timm model; or, with --op, of the 2-D scan alone.

The scan is first held to its reference. Where it is wrong, the figures are marked INVALID, no ratio is printed, and the
exit status is 1."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .devices import add_device_argument
from .tables import check_figure, check_writable, name_files, print_table

if TYPE_CHECKING:
    from ..analysis import ModelReport, OperatorReport

NAME = "bench"
HELP = "measure speed and memory of models, or of the scan alone"
EXAMPLES = """examples:
  vmamba bench
  vmamba bench vmamba_tiny_s1l8 convnext_tiny --task inference,latency --json bench.json --png bench.png
  vmamba bench vmamba_tiny_s1l8 swin_tiny_patch4_window7_224 --train --batch 64 --mode compile
  vmamba bench --op
  vmamba bench --op --d-state 16 --batch 32 --dtype fp32

Tasks: inference is the forward of a batch; latency the forward of one image, from the call to the finished result;
training the forward, cross-entropy and backward of a batch, and with --optimizer NAME that one's step too.
Modes: eager; compile, torch.compile; graphs, torch.compile(mode="reduce-overhead"), CUDA only.
Figures are medians over rounds in which all models are measured in turn, with the least and the most;
docs/performance.md tells how they are made."""

ON_CUDA = ("vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50")
ON_CPU = ("vmamba_nano", "convnext_atto")

# options of one of the two kinds of run, which the other refuses
ONLY_MODELS = ("task", "mode", "channels_last", "optimizer")
ONLY_OPERATOR = ("d_state",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"timm model; the first is what the others are compared with (default on CUDA {' '.join(ON_CUDA)}; "
        f"on the CPU {' '.join(ON_CPU)})",
    )
    parser.add_argument("--op", action="store_true", help="measure the scan alone, at the stages of VMamba-T")
    add_device_argument(parser, mps=False)
    parser.add_argument(
        "--batch", type=int, metavar="N", help="images (default on CUDA 128; on the CPU 8, with --op 1)"
    )
    parser.add_argument("--size", type=int, metavar="PX", help="height and width of the images (default 224)")
    parser.add_argument(
        "--dtype",
        help="fp32; bf16 or fp16, autocast; bf16-weights, all in bf16 (default on CUDA bf16, on the CPU fp32)",
    )
    parser.add_argument("--tf32", action="store_true", default=None, help="let fp32 products use TF32")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds (default 7)")
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--png", metavar="FILE", help="also draw a bar chart (.png, .svg; no ending: both)")
    models = parser.add_argument_group("of models")
    models.add_argument("--task", metavar="LIST", help="some of inference,latency,training (default all three)")
    models.add_argument(
        "--train", action="store_const", const="training", dest="task", help="short for --task training"
    )
    models.add_argument(
        "--mode",
        metavar="LIST",
        help="some of eager,compile,graphs (default on the CPU eager; on CUDA eager,compile, for latency graphs too)",
    )
    models.add_argument(
        "--channels-last", choices=("auto", "on", "off"), help="image layout (default auto: for convolutional networks)"
    )
    models.add_argument(
        "--optimizer", metavar="NAME", help="a training step includes this one's: adamw (fused on CUDA), nmuon, ..."
    )
    operator = parser.add_argument_group("of the scan alone (--op)")
    operator.add_argument(
        "--d-state", type=int, metavar="N", help="1, as VMamba-T[s1l8] (the default), or 16, as the first VMamba-T"
    )


def run(options: argparse.Namespace) -> None:
    _check(options)
    report = _operator(options) if options.op else _models(options)
    if options.json:
        from .._files import write_text

        write_text(json.dumps(report.as_dict(), indent=2) + "\n", options.json)
        print(f"figures: {options.json}")
    if options.png:
        from ..analysis.charts import save_bars

        panels = _operator_panels(report) if options.op else _model_panels(report)
        save_bars(panels, _heading(report), _footnote(report), Path(options.png))
        print(f"chart: {name_files(options.png)}")
    if not report.valid:
        sys.exit(1)


def _check(options: argparse.Namespace) -> None:
    """Find out what can be known to be wrong before minutes of measuring."""
    for name in ONLY_MODELS if options.op else ONLY_OPERATOR:
        if getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is of no use {'with' if options.op else 'without'} --op: leave it out")
    if options.op and options.models:
        raise ValueError(f"--op measures the scan alone: leave out {' '.join(options.models)}, or --op")
    check_writable(options.json)
    check_figure(options.png)


def _given(options: argparse.Namespace, *names: str) -> dict:
    """The options that were given; the settings have the defaults of the others."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _models(options: argparse.Namespace) -> ModelReport:
    from ..analysis import ModelSettings, measure_models
    from ..analysis.measuring import checked_device

    settings = _given(options, "device", "batch", "size", "dtype", "tf32", "channels_last", "optimizer", "repeats")
    for option, field in (("task", "tasks"), ("mode", "modes")):
        if getattr(options, option) is not None:
            settings[field] = tuple(getattr(options, option).split(","))
    settings = ModelSettings(**settings)
    names = options.models or (ON_CUDA if checked_device(settings.device).type == "cuda" else ON_CPU)
    report = measure_models(names, settings, _progress)
    _print_conditions(report, [str(report.verdict)])
    for task in settings.tasks:
        rows = [row for row in report.rows if row.task == task]
        print(f"\n{_task_title(report, task)}")
        names = ["model", "mode", "layout", "images/s", "ms", "least - most", "peak GB", f"x {report.baseline}"]
        cells = []
        for row in rows:
            layout = {True: "channels-last", False: "as made", None: "-"}[row.channels_last]
            memory = "-" if row.peak_memory is None else f"{row.peak_memory / 1e9:.2f}"
            if row.seconds is None:
                cells.append([row.model, row.mode, layout, f"failed: {row.error}"])
                continue
            speed = f"{row.images_per_second:,.1f}"
            cells.append([row.model, row.mode, layout, speed, *_times(row), memory, _ratio(report.relative(row))])
        print_table(names if report.valid else names[:-1], cells, left=3)
    return report


def _operator(options: argparse.Namespace) -> OperatorReport:
    from ..analysis import OperatorSettings, measure_operator

    settings = OperatorSettings(**_given(options, "device", "batch", "size", "dtype", "tf32", "repeats", "d_state"))
    report = measure_operator(settings, _progress)
    _print_conditions(report, [str(verdict) for verdict in report.verdicts.values()])
    print(f"a large copy reads and writes {report.bandwidth / 1e9:,.0f} GB/s")
    print("floor: the time of reading each input once and writing each output once at that speed")
    compared = report.valid and len(report.verdicts) > 1
    for shape in dict.fromkeys(row.shape for row in report.rows):
        print(f"\n{shape}")
        cells = []
        for row in report.rows:
            if row.shape != shape:
                continue
            if row.seconds is None:
                cells.append([row.backend, row.work, f"failed: {row.error}"])
                continue
            floor = ["-", "-"]
            if row.floor is not None:
                floor = [f"{1000 * row.floor:.3f}", f"{100 * row.fraction_of_floor:.1f}"]
            cells.append([row.backend, row.work, *_times(row), *floor, _ratio(report.speed_up(row))])
        names = ["backend", "pass", "ms", "least - most", "floor ms", "% of floor", f"x {report.baseline}"]
        print_table(names if compared else names[:-1], cells, left=2)
    return report


def _print_conditions(report: ModelReport | OperatorReport, verdicts: list[str]) -> None:
    settings = report.as_dict()["settings"]
    for title, facts in (("on", report.environment), ("settings", settings)):
        print(f"{title}: " + ", ".join(f"{name} {_fact(value)}" for name, value in facts.items() if value is not None))
    for verdict in verdicts:
        print(f"scan: {verdict}")
    if not report.valid:
        print("INVALID: the scan is wrong, so the figures below are of something else than VMamba; no ratios are given")


def _fact(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "+".join(value) if isinstance(value, tuple) else str(value)


def _times(row) -> list[str]:
    median, low, high = (1000 * s for s in row.seconds)
    return [f"{median:.3f}", f"{low:.3f} - {high:.3f}"]


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _task_title(report: ModelReport, task: str) -> str:
    settings = report.settings
    batch = 1 if task == "latency" else settings.batch
    what = {
        "inference": "inference: forward",
        "latency": "latency: forward, from the call to the finished result",
        "training": ", ".join(filter(None, ("training step: forward, loss, backward", settings.optimizer))),
    }[task]
    return f"{what}; batch {batch}, {settings.size} px, {settings.dtype}"


def _heading(report: ModelReport | OperatorReport) -> str:
    return ("" if report.valid else "INVALID (the scan is wrong): ") + report.environment["device"]


def _footnote(report: ModelReport | OperatorReport) -> str:
    facts = report.environment
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "timm", "commit") if facts[name])
    settings = report.settings
    return (
        f"{settings.dtype}, TF32 {_fact(settings.tf32)}; {versions}; medians of {settings.repeats} rounds, "
        "whiskers from least to most"
    )


def _model_panels(report: ModelReport) -> list:
    from ..analysis.charts import Bar, Panel

    panels = []
    for task in report.settings.tasks:
        bars = []
        for row in report.rows:
            if row.task != task:
                continue
            if row.seconds is None:
                bars.append(Bar(row.model, row.mode, None, note="failed"))
            elif task == "latency":
                bars.append(Bar(row.model, row.mode, *(1000 * s for s in row.seconds)))
            else:
                speeds = (row.batch / s for s in (row.seconds.median, row.seconds.high, row.seconds.low))
                bars.append(Bar(row.model, row.mode, *speeds))
        unit = "ms (less is better)" if task == "latency" else "images a second (more is better)"
        panels.append(Panel(_task_title(report, task), unit, bars))
    return panels


def _operator_panels(report: OperatorReport) -> list:
    from ..analysis.charts import Bar, Panel

    panels = []
    for shape in dict.fromkeys(row.shape for row in report.rows):
        bars = []
        for row in report.rows:
            if row.shape == shape:
                times = (None,) if row.seconds is None else (1000 * s for s in row.seconds)
                bars.append(Bar(row.work, row.backend, *times, note="" if row.seconds else "failed"))
        passes = list(dict.fromkeys(bar.group for bar in bars))
        panels.append(Panel(str(shape), "ms (less is better)", sorted(bars, key=lambda bar: passes.index(bar.group))))
    return panels
