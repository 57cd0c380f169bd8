"""The report of a finished run: curves, pictures and a Markdown page that holds them together."""

from __future__ import annotations

import math
import platform
import statistics
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__
from .._files import write_text
from ..tasks import Chart, Task
from .config import Config
from .job import percent
from .metrics_file import MetricsFile
from .progress import duration
from .report import save_curves

RATE = {"lr": "lr"}


def write_report(
    folder: Path,
    config: Config,
    task: Task,
    *,
    metrics_csv: Path,
    result: dict[str, float],
    result_of: str,
    images: int,
    best_epoch: int,
    averaged: bool,
    hardware: str,
    pictures: dict[str, str],
    table: list[str],
) -> Path:
    """Draw the curves of ``metrics_csv`` into ``folder`` and write ``summary.md`` there; returns its path.

    ``result`` are the metrics of the weights kept on ``images`` images called ``result_of``; ``pictures`` are files
    already in ``folder`` and what they show; ``table`` are lines of Markdown about the single classes.
    """
    rounds = config.schedule.rounds
    rows = MetricsFile(metrics_csv, keep=rounds).rows
    epochs = [int(row["epoch"]) for row in rows]
    drawn: dict[str, str] = {}
    for chart in _charts(task):
        curves = {label: _column(rows, column) for column, label in chart.curves.items() if column in rows[0]}
        save_curves(epochs, curves, folder / chart.file, chart.axis, log=chart.curves == RATE)
        drawn[chart.file] = chart.title
    seconds = sum(_column(rows, "seconds"))
    first, *others = task.figures
    facts = {
        f"{task.figures[first]} on the {images:,} {result_of} images": f"{percent(result[first])} %",
        **{task.figures[name]: f"{percent(result[name])} %" for name in others},
        **({"loss": f"{result['loss']:.4f}"} if "loss" in result else {}),
        "weights": f"epoch {best_epoch} of {rounds}, "
        f"{'their moving average' if averaged else 'as trained'}, the best on the validation images",
        "time": f"{duration(seconds)} for {len(rows)} epochs, validation included",
        "speed": f"{statistics.median(_column(rows, 'img/s')):.1f} training images/s (median of the epochs)",
        **({"memory": f"{max(_column(rows, 'memory_gib')):.2f} GiB at most"} if "memory_gib" in rows[0] else {}),
        "hardware": hardware,
        "software": f"vmamba {__version__}, torch {torch.__version__}, timm {version('timm')}, "
        f"lightning {version('lightning')}, Python {platform.python_version()}",
        "seed": str(config.run.seed),
    }
    lines = [f"# {config.model.name} on {config.data.source}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "All settings: [config.yaml](../config.yaml); all figures: [metrics.csv](../metrics.csv).", ""]
    for name, title in (drawn | pictures).items():
        lines += [f"## {title}", "", f"![{title}]({name})", ""]
    if table:
        lines += ["## Classes", "", *table, ""]
    path = folder / "summary.md"
    write_text("\n".join(lines), path)
    return path


def _charts(task: Task) -> list[Chart]:
    """The curves of a report; those that a run has not are left out."""
    losses = {"train_loss": "training", "val_loss": "validation", "ema_val_loss": "validation, averaged weights"}
    own = task.chart.curves
    shown = {
        prefix + name: label + ending
        for name, label in own.items()
        for prefix, ending in (("", ""), ("ema_", ", averaged weights"))
    }
    return [
        Chart("loss.png", "Loss", task.loss_axis, losses),
        task.chart._replace(curves=shown),
        Chart("learning_rate.png", "Learning rate", "learning rate at the end of the epoch", RATE),
        Chart("speed.png", "Speed", "training images per second", {"img/s": "img/s"}),
    ]


def _column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row.get(name) or math.nan) for row in rows]
