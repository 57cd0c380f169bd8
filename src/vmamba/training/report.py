"""Pictures of a finished run as PNG: the confusion matrix, a sheet of predictions, curves over the epochs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .._figures import BLUE, GREEN, PURPLE, VERMILLION, new_figure
from .._files import write_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

RIGHT, WRONG = BLUE, VERMILLION
CURVE_STYLES = ((BLUE, "-"), (VERMILLION, "-"), (GREEN, "--"), (PURPLE, ":"))


def save_confusion_matrix(confusion: Tensor, names: Sequence[str], path: Path) -> None:
    """Draw counts (true, predicted), shaded by the share of the true class; numbers up to 20 classes."""
    count = len(names)
    side = min(14.0, 3.0 + 0.45 * count)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    share = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    shading = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shading, ax=axes, label="share of the true class")
    if count <= 60:
        axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(count), names)
    if count <= 20:
        for row in range(count):
            for column in range(count):
                number = int(confusion[row, column])
                if number:
                    colour = "white" if share[row, column] > 0.5 else "black"
                    axes.text(column, row, str(number), ha="center", va="center", color=colour)
    correct = int(confusion.trace())
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{correct} of {int(confusion.sum())} right ({100 * correct / int(confusion.sum()):.2f} %)")
    _save(figure, path)


def save_prediction_sheet(
    images: Sequence[Image.Image], titles: Sequence[str], right: Sequence[bool | None], path: Path, heading: str
) -> None:
    """Draw ``images`` in rows of six, each under its title; ``right`` None is a prediction nobody checked.

    Right ones have a thin blue frame, wrong ones a thick vermillion frame and a cross before the title.
    """
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(2.0 * columns, 2.35 * rows + 0.5)
    figure.suptitle(heading)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(images) :]:
        axes.set_axis_off()
    for axes, image, title, verdict in zip(grid, images, titles, right, strict=False):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.imshow(image)
        colour = "black" if verdict is None else RIGHT if verdict else WRONG
        for spine in axes.spines.values():
            spine.set_color(colour)
            spine.set_linewidth(4 if verdict is False else 1.5)
        axes.set_title(f"\N{MULTIPLICATION SIGN} {title}" if verdict is False else title, color=colour, fontsize=9)
    _save(figure, path)


def save_picture_rows(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], path: Path, heading: str) -> None:
    """Draw pictures in rows, each column under its title."""
    width = 4.2 * len(titles)
    height = sum(max(p.height / p.width for p in row) for row in rows) * 4.2 + 0.8
    figure = new_figure(width, height)
    figure.suptitle(heading)
    grid = figure.subplots(
        len(rows),
        len(titles),
        squeeze=False,
        gridspec_kw={"height_ratios": [max(p.height / p.width for p in row) for row in rows]},
    )
    for number, (axes_row, row) in enumerate(zip(grid, rows, strict=True)):
        for axes, picture, title in zip(axes_row, row, titles, strict=True):
            axes.set_axis_off()
            axes.imshow(picture)
            if number == 0:
                axes.set_title(title)
    _save(figure, path)


def save_curves(
    epochs: Sequence[int], curves: dict[str, Sequence[float]], path: Path, ylabel: str, *, log: bool = False
) -> None:
    """Draw named curves over the epochs, with a legend where there are several; what is not finite leaves a gap."""
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    for (name, values), (colour, style) in zip(curves.items(), CURVE_STYLES, strict=False):
        axes.plot(epochs, values, style, color=colour, label=name, marker="o" if len(epochs) < 3 else None)
    if log:
        axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    _save(figure, path)


def save_resources(csv_path: str | Path, path: str | Path) -> bool:
    """Draw the history of a watchdog, its ``resources.csv``, over the minutes; shaded where the training stalled.

    False where there is nothing to draw: no file, or no line in it.
    """
    if not Path(csv_path).is_file():
        return False
    with open(csv_path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return False
    minutes = [float(row["seconds"]) / 60 for row in rows]
    panels = {
        "host memory (GiB)": {"host_gib": "training", "workers_gib": "its data-loader workers"},
        "GPU memory (GiB)": {
            "gpu_allocated_gib": "tensors",
            "gpu_reserved_gib": "held by torch",
            "gpu_used_gib": "used, by all processes",
        },
        "utilisation (%)": {"cpu_percent": "processor (100 % each)", "gpu_percent": "GPU"},
    }
    # the columns of a machine without a GPU are empty
    shown = {
        title: {name: label for name, label in columns.items() if any(row[name] for row in rows)}
        for title, columns in panels.items()
    }
    shown = {title: columns for title, columns in shown.items() if columns}
    figure = new_figure(7.5, 0.8 + 2.4 * len(shown))
    for axes, (title, columns) in zip(
        figure.subplots(len(shown), sharex=True, squeeze=False).flat, shown.items(), strict=True
    ):
        for (name, label), (colour, style) in zip(columns.items(), CURVE_STYLES, strict=False):
            values = [float(row[name] or "nan") for row in rows]
            axes.plot(minutes, values, style, color=colour, label=label, marker="o" if len(rows) < 3 else None)
        for start, end in _stalls(rows):
            axes.axvspan(start / 60, end / 60, color=WRONG, alpha=0.2, linewidth=2, label="stalled")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))  # one entry for all stalls
        axes.legend(once.values(), once.keys(), loc="best")
    axes.set_xlabel("minutes of training")
    _save(figure, path)
    return True


def _stalls(rows: Sequence[dict[str, str]]) -> list[tuple[float, float]]:
    """First and last second of every stall."""
    found: list[tuple[float, float]] = []
    before = "0"
    for row in rows:
        second = float(row["seconds"])
        if row["stalled"] == "1":
            found = [*found[:-1], (found[-1][0], second)] if before == "1" else [*found, (second, second)]
        before = row["stalled"]
    return found


def _save(figure: Figure, path: Path) -> None:
    write_aside(path, lambda aside: figure.savefig(aside, format="png", dpi=120))
