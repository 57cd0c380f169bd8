"""The figures that `vmamba bench --json` wrote, several files in one chart.

python benchmarks/bars.py docs/results/h200_network/{inference,training,latency,px1024}.json --out chart.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vmamba.analysis.charts import Bar, Panel, save_bars

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("files", nargs="+", type=Path)
parser.add_argument("--out", type=Path, required=True, help=".png or .svg")
options = parser.parse_args()

panels = []
for report in (json.loads(file.read_text()) for file in options.files):
    if not report["valid"]:
        raise SystemExit("a file's figures are of a scan that was wrong")
    settings, environment = report["settings"], report["environment"]
    for task in settings["tasks"]:
        bars, latency = [], task == "latency"
        rows = [row for row in report["rows"] if row["task"] == task and not row["error"]]
        for row in rows:
            times = (row["median_ms"], row["low_ms"], row["high_ms"])
            speeds = (1000 * row["batch"] / time for time in (times[0], times[2], times[1]))
            bars.append(Bar(row["model"], row["mode"], *(times if latency else speeds)))
        title = f"{task}: batch {rows[0]['batch']}, {settings['size']} px, {settings['dtype']}"
        unit = "ms (less is better)" if latency else "images a second (more is better)"
        panels.append(Panel(title, unit, bars))
versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "timm"))
footnote = f"{versions}; TF32 off; medians of {settings['repeats']} rounds, whiskers from least to most"
save_bars(panels, environment["device"], footnote, options.out)
