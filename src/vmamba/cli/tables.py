"""Tables as text, and tables as files."""

from __future__ import annotations

import tempfile
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
    rounds = f"medians of {settings.repeats} rounds"
    return f"{environment['device']}; {settings.dtype}, TF32 {tf32}; {', '.join(versions)}; {rounds}"


def check_writable(*paths: str | Path | None) -> None:
    """Find out before the work whether files can be written where they are asked for. Leaves nothing behind.

    Raises:
        OSError: naming the file whose directory does not exist or cannot be written to, or that is a directory.
    """
    for path in map(Path, filter(None, paths)):
        parent = path.absolute().parent
        if not parent.is_dir():
            raise FileNotFoundError(f"cannot write {path}: there is no directory {path.parent}")
        if path.is_dir():
            raise IsADirectoryError(f"cannot write {path}: it is a directory, name a file in it")
        _try_to_write(path, parent)


def check_folder(out: str) -> None:
    """Find out before the work whether files can be written into a folder, which may not be there yet.

    Raises:
        OSError: the folder is a file, lies below one, or cannot be written to or made.
    """
    folder = Path(out).absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"cannot write into {out}: {nearest} is a file, name another folder")
    _try_to_write(out, nearest)


def _try_to_write(what: str | Path, folder: Path) -> None:
    try:
        # what a user may do is not all there is to know: file systems are read-only, or take no files at all
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write {what}: {folder} takes no files ({error.strerror})") from error


def name_files(figure: str | None) -> str | None:
    """The files of a figure that was asked for as `figure`, in one line."""
    from ..analysis.figures import figure_files

    return figure and " ".join(map(str, figure_files(figure)))


def check_figure(path: str | None) -> None:
    """Find out before the work whether a figure can be drawn to `path`.

    Raises:
        OSError: as `check_writable`.
        ValueError: it ends in neither .png nor .svg, which both are drawn without an ending.
        ModuleNotFoundError: matplotlib is missing.
    """
    if not path:
        return
    from .._extras import require
    from ..analysis.figures import figure_files

    check_writable(*figure_files(path))
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
