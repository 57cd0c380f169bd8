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
from .config import Config
from .metrics_file import MetricsFile
from .progress import duration
from .report import save_curves

# file -> (what it shows, its unit, the columns of metrics.csv and their names, whether on a logarithmic axis)
CURVES = {
    "loss.png": (
        "Loss",
        "cross-entropy (nats)",
        {"train_loss": "training", "val_loss": "validation", "ema_val_loss": "validation, averaged weights"},
        False,
    ),
    "accuracy.png": (
        "Accuracy",
        "validation images right (%)",
        {
            "top1": "top-1",
            "ema_top1": "top-1, averaged weights",
            "top5": "top-5",
            "ema_top5": "top-5, averaged weights",
        },
        False,
    ),
    "learning_rate.png": ("Learning rate", "learning rate at the end of the epoch", {"lr": "lr"}, True),
    "speed.png": ("Speed", "training images per second", {"img/s": "img/s"}, False),
}


def write_report(
    folder: Path,
    config: Config,
    *,
    metrics_csv: Path,
    result: dict[str, float],
    result_of: str,
    images: int,
    best_epoch: int,
    averaged: bool,
    hardware: str,
    pictures: dict[str, str],
) -> Path:
    """Draw the curves of ``metrics_csv`` into ``folder`` and write ``summary.md`` there; returns its path.

    ``result`` are the metrics of the weights kept on ``images`` images called ``result_of``; ``pictures`` are files
    already in ``folder`` and what they show.
    """
    rows = MetricsFile(metrics_csv, keep=config.schedule.epochs).rows
    epochs = [int(row["epoch"]) for row in rows]
    drawn: dict[str, str] = {}
    for name, (title, unit, columns, log) in CURVES.items():
        curves = {label: _column(rows, column) for column, label in columns.items() if column in rows[0]}
        save_curves(epochs, curves, folder / name, unit, log=log)
        drawn[name] = title
    seconds = sum(_column(rows, "seconds"))
    facts = {
        f"top-1 on the {images:,} {result_of} images": f"{result['top1']:.2f} %",
        "top-5": f"{result['top5']:.2f} %",
        "loss": f"{result['loss']:.4f}",
        "weights": f"epoch {best_epoch} of {config.schedule.epochs}, "
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
    path = folder / "summary.md"
    write_text("\n".join(lines), path)
    return path


def _column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row.get(name) or math.nan) for row in rows]
