"""Runs of `vmamba train` side by side: a Markdown table, and their curves in one figure.

    python benchmarks/runs.py docs/results/imagenette/*/ --metric top1 --out docs/results/imagenette/curves.png

Each folder holds a run's config.yaml and metrics.csv. The metric is that of the trained weights or of their moving
average, whichever is better: the best of all validations, and the last one. Images a second are the median of the
epochs; minutes are the whole run's, validations included.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import yaml

from vmamba._figures import BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILLION, new_figure

COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY_BLUE)
STYLES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", nargs="+", type=Path)
parser.add_argument("--metric", required=True, help="a column of metrics.csv: top1, miou, mask_ap, box_ap")
parser.add_argument("--out", type=Path, help="figure: .png or .svg")
options = parser.parse_args()

names = (options.metric, f"ema_{options.metric}")
models: list[str] = []
figure = new_figure(7.5, 4.5)
axes = figure.subplots()
print(f"| run | model | seed | best {options.metric} | last | epochs | images/s | memory GiB | minutes |")
print("|---|---|---|---|---|---|---|---|---|")
for run in options.runs:
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or options.metric not in rows[0]:
        raise SystemExit(f"{run / 'metrics.csv'} has no figures of {options.metric}")
    epochs = [int(row["epoch"]) for row in rows]
    best = [max(float(row.get(name) or 0) for name in names) for row in rows]
    speed = statistics.median(float(row["img/s"]) for row in rows)
    memory = f"{max(float(row['memory_gib']) for row in rows):.2f}" if "memory_gib" in rows[0] else "-"
    minutes = sum(float(row["seconds"]) for row in rows) / 60
    model, seed = config["model"]["name"], config["run"]["seed"]
    planned = config["schedule"]["epochs"] or epochs[-1]
    length = f"{planned}" if epochs[-1] == planned else f"{epochs[-1]}, stopped, of {planned}"
    print(
        f"| {run.name} | {model} | {seed} | {max(best):.2f} | {best[-1]:.2f} | {length} | {speed:,.0f} | {memory} "
        f"| {minutes:.1f} |"
    )
    style = STYLES[models.count(model) % len(STYLES)]
    colour = COLOURS[list(dict.fromkeys([*models, model])).index(model) % len(COLOURS)]
    axes.plot(epochs, best, linestyle=style, color=colour, label=f"{run.name}: {max(best):.2f}")
    models.append(model)
axes.set_xlabel("epoch")
axes.set_ylabel(f"{options.metric}, % (the better of trained and averaged weights)")
axes.grid(alpha=0.3)
axes.legend(fontsize="small")
if options.out is not None:
    figure.savefig(options.out, dpi=150)
