"""metrics.csv of a run: one row an epoch, rewritten whole so that it is never half a row."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from .._files import write_text


class MetricsFile:
    """Rows of numbers under the names of the first row.

    ``keep`` reads back the rows of the first so many epochs: a resumed run goes on from its checkpoint, not from what
    it may have written after it.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if keep and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= keep]

    def append(self, row: dict[str, float | int]) -> None:
        """Add a row and write the file."""
        self.rows.append(
            {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()}
        )
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(text.getvalue(), self.path)
