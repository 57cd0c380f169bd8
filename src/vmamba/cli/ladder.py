"""The acceleration ladder of VMamba-T: from plain torch to the fused operator, and from the first network to the last.

Each rung is a network that runs: its parameters, FLOPs, measured speed and memory, the paper's A100 figures beside."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .devices import add_device_argument
from .tables import check_figure, check_writable, describe_conditions, name_files, print_table, write_csv

if TYPE_CHECKING:
    from ..analysis import LadderReport, ModelSettings
    from ..analysis.charts import Panel
    from ..analysis.ladder import Rung
    from ..analysis.throughput import ModelRow

NAME = "ladder"
HELP = "measure the paper's acceleration steps, rung by rung"
EXAMPLES = """examples:
  vmamba ladder --json ladder.json --csv ladder.csv --figure ladder
  vmamba ladder --rungs fused,f,g --mode compile --batch 256
  vmamba ladder --device cpu --size 64 --batch 2 --figure ladder.svg

Rungs of the backend, on Vanilla-VMamba-T: plain, triton, low, linear, fused. Rungs of the architecture, on the fused
operator: d, d+, e, f-, f, g. Each rung's scan is checked against fp64 before it is timed. The fastest rungs are
measured first, and files are written anew after every measurement: a run that is cut off leaves what it has.
docs/analysis.md says what each rung computes. The exit status is 1 if the scan is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rungs", metavar="LIST", help="some of the rungs (default all)")
    add_device_argument(parser, mps=False)
    parser.add_argument("--batch", type=int, metavar="N", help="images (default on CUDA 128, on the CPU 8)")
    parser.add_argument("--size", type=int, default=224, metavar="PX", help="height and width (default 224)")
    parser.add_argument("--dtype", help="as for `vmamba bench` (default on CUDA bf16, on the CPU fp32)")
    parser.add_argument("--tf32", action="store_true", help="let fp32 products use TF32")
    parser.add_argument("--task", metavar="LIST", default="inference,training", help="inference, training or both")
    parser.add_argument(
        "--mode", metavar="LIST", help="some of eager,compile,graphs (default eager; on CUDA compile too)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds of a measurement (default 3)")
    parser.add_argument(
        "--time-limit", type=float, default=480, metavar="S", help="begin no measurement after S seconds (default 480)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--csv", metavar="FILE", help="also write a row for every measurement as CSV")
    parser.add_argument("--figure", metavar="FILE", help="also draw a bar chart (.png, .svg; no ending: both)")


def run(options: argparse.Namespace) -> None:
    from ..analysis import ModelSettings, climb_ladder

    check_writable(options.json, options.csv)
    check_figure(options.figure)
    settings = ModelSettings(
        device=options.device,
        tasks=tuple(options.task.split(",")),
        modes=tuple(options.mode.split(",")) if options.mode else None,
        batch=options.batch,
        size=options.size,
        dtype=options.dtype,
        tf32=options.tf32,
        repeats=options.repeats,
    )
    report = climb_ladder(
        settings,
        options.rungs.split(",") if options.rungs else None,
        time_limit=options.time_limit,
        progress=lambda message: print(message, file=sys.stderr, flush=True),
        finished=lambda report: _write(report, options),
    )
    _print(report)
    for what, path in (("figures", options.json), ("rows", options.csv), ("chart", name_files(options.figure))):
        if path and report.valid:
            print(f"{what}: {path}")
    if not report.valid:
        sys.exit(1)


def _write(report: LadderReport, options: argparse.Namespace) -> None:
    from .._files import write_text

    if options.json:
        write_text(json.dumps(report.as_dict(), indent=2) + "\n", options.json)
    if options.csv:
        records = report.records()
        write_csv(list(records[0]), [list(record.values()) for record in records], options.csv)
    if options.figure:
        from ..analysis.charts import save_bars

        settings = report.settings
        heading = f"VMamba-T, rung by rung: {report.environment['device']}, batch {settings.batch}, {settings.size} px"
        conditions = describe_conditions(report.environment, settings)
        footnote = f"{conditions}, whiskers from the least to the most"
        save_bars(_panels(report), heading, footnote, Path(options.figure))


def _print(report: LadderReport) -> None:
    print(describe_conditions(report.environment, report.settings))
    print(f"scan: {report.verdict}")
    if not report.valid:
        print("INVALID: the scan is wrong, so nothing was measured")
        return
    print()
    rows = [
        [
            row.rung.name,
            row.rung.step,
            row.rung.change,
            f"{row.complexity.parameters:,}",
            f"{row.complexity.macs / 1e9:.3f}",
            f"{row.complexity.flops / 1e9:.3f}",
            row.rung.published.top1,
        ]
        for row in report.rows
    ]
    print_table(["rung", "paper", "change", "parameters", "GMACs", "GFLOPs", "top-1 %"], rows, left=3)
    for task in report.settings.tasks:
        print(f"\n{_title(task, report.settings)}")
        for mode in report.settings.modes:
            cells = []
            first = None
            for row in report.rows:
                case = row.at(task, mode)
                published = getattr(row.rung.published, task)
                start = [row.rung.name, mode]
                if case is None or case.seconds is None:
                    cells.append([*start, _why_not(row.unavailable, case)])
                    continue
                speed = case.images_per_second
                first = first or speed
                times = f"{1000 * case.seconds.low:.2f} - {1000 * case.seconds.high:.2f}"
                memory = "-" if case.peak_memory is None else f"{case.peak_memory / 1e9:.2f}"
                paper = "-" if published is None else f"{published:,}"
                cells.append([*start, f"{speed:,.1f}", f"{speed / first:.2f}", times, memory, paper])
            names = ["rung", "mode", "images/s", "x first", "ms, least - most", "peak GB", "paper, A100"]
            print_table(names, cells, left=2)
    print(
        "\nGMACs: one per multiply-accumulate, as in the papers; GFLOPs: two. top-1: ImageNet-1K as published, or its"
        "\nchange. paper: images/s in fp32 with batch 128. x first: over the first rung that was measured in that mode."
    )


def _why_not(unavailable: str, case: ModelRow | None) -> str:
    if unavailable:
        return f"unavailable: {unavailable}"
    return (case.error if case is not None else None) or "not measured"


def _title(task: str, settings: ModelSettings) -> str:
    what = {"inference": "inference: forward", "training": "training: forward, loss, backward"}[task]
    return f"{what}; batch {settings.batch}, {settings.size} px, {settings.dtype}"


def _panels(report: LadderReport) -> list[Panel]:
    from ..analysis.charts import Bar, Panel

    panels = []
    for task in report.settings.tasks:
        bars = []
        for row in report.rows:
            group = f"{_label(row.rung)}\n{row.rung.change}"
            for mode in report.settings.modes:
                case = row.at(task, mode)
                if case is None or case.seconds is None:
                    bars.append(Bar(group, f"here, {mode}", None, note=_short(_why_not(row.unavailable, case))))
                else:
                    seconds = case.seconds
                    speeds = (case.batch / s for s in (seconds.median, seconds.high, seconds.low))
                    bars.append(Bar(group, f"here, {mode}", *speeds))
            if (published := getattr(row.rung.published, task)) is not None:
                bars.append(Bar(group, "paper, A100, fp32, batch 128", published, published, published))
        values = [bar.value for bar in bars if bar.value is not None]
        is_wide = bool(values) and max(values) > 50 * min(values)  # a CPU beside an A100
        panels.append(Panel(_title(task, report.settings), "images a second (more is better)", bars, is_wide))
    return panels


def _label(rung: Rung) -> str:
    """Our name and the paper's: "plain (vanilla)", "triton (a)", "(d)", "d+"."""
    step = rung.step.strip("()")
    if not step:
        return rung.name
    return f"({step})" if step == rung.name else f"{rung.name} ({step})"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
