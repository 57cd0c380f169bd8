"""Files that are either whole or not there: written aside, then moved into place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write_aside(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then rename the result to ``path``.

    Whatever stood at ``path`` survives until the new file is complete and on the disk; a failed write leaves it as it
    was and removes the temporary file.

    Raises:
        OSError: the file could not be written (full disk, no permission); names ``path``.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    # torch's zip writer reports a full disk as RuntimeError
    except (OSError, RuntimeError) as error:
        kept = "; the earlier file is untouched" if path.exists() else ""
        raise OSError(f"cannot write {path}: {error}{kept}. Free some space or choose another directory") from error
    finally:
        aside.unlink(missing_ok=True)


def save_tensors(contents: dict[str, Any], path: str | Path) -> None:
    """``torch.save`` of ``contents`` through :func:`write_aside`."""
    write_aside(path, lambda aside: torch.save(contents, aside))


def write_text(text: str, path: str | Path) -> None:
    """Write ``text`` as UTF-8 through :func:`write_aside`."""
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))
