"""Tables as text, and tables as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def print_table(names: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
    """Columns under their names, the first `left` of them to the left. A row that ends early ends with a sentence."""
    rows = [list(row)[: len(names)] for row in rows]
    whole = [names, *(row if len(row) == len(names) else row[:-1] for row in rows)]
    widths = [max(len(row[i]) for row in whole if i < len(row)) for i in range(len(names))]
    align: list[Callable[[str, int], str]] = [str.ljust if i < left else str.rjust for i in range(len(names))]
    for row in (names, *rows):
        cells = [align[i](cell, widths[i]) for i, cell in enumerate(row)]
        if len(row) < len(names):
            cells[-1] = row[-1]
        print("  ".join(cells).rstrip())


def describe_conditions(environment: Mapping[str, Any], settings: Any) -> str:
    """One line on what figures were taken with: versions, dtype, TF32, threads on the CPU, rounds."""
    versions = [f"{name} {environment[name]}" for name in ("torch", "triton", "timm", "commit") if environment[name]]
    if settings.device == "cpu":
        versions.append(f"{environment['threads']} threads")
    tf32 = "on" if settings.tf32 else "off"
    return (
        f"{environment['device']}; {settings.dtype}, TF32 {tf32}; {', '.join(versions)}; medians of {settings.repeats} "
        "rounds, with the least and the most"
    )


def check_writable(*paths: str | None) -> None:
    """Find out before the work whether files can be written where they are asked for.

    Raises:
        FileNotFoundError: naming the file whose directory does not exist.
    """
    for path in paths:
        if path and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"cannot write {path}: there is no directory {Path(path).parent}")


def check_figure(path: str | None) -> None:
    """Find out before the work whether a figure can be drawn to `path`.

    Raises:
        FileNotFoundError: its directory does not exist.
        ValueError: it ends in neither .png nor .svg.
        ModuleNotFoundError: matplotlib is missing.
    """
    if not path:
        return
    from .._extras import require
    from ..analysis.charts import figure_format

    check_writable(path)
    figure_format(Path(path))
    require("matplotlib.figure", "train")


def write_csv(names: Sequence[str], rows: Sequence[Sequence[object]], path: str) -> None:
    """Write rows under column names as CSV; None is an empty cell."""
    import csv
    import io

    from .._files import write_text

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    write_text(text.getvalue(), path)
