"""How numbers and lists are put in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["listed", "milliseconds", "number", "plural", "size"]


def listed(names: Sequence[str], most: int = 5) -> str:
    """ "a, b and 3 more"."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def plural(count: int, noun: str) -> str:
    """ "1 value", "3 values"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{1e3 * seconds:.0f} ms"


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
