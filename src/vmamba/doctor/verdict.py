"""What every examination of the doctor answers: one verdict a line, with the remedy in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

__all__ = ["Level", "Verdict", "exit_code"]


class Level(str, Enum):
    """How serious a verdict is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Verdict:
    """One line of the doctor's answer.

    Attributes:
        level: ok, warning (works, but slower or riskier than it need be) or problem (training cannot go right).
        name: what was found, as a short fixed name that programs may test for: "loss is not a scalar".
        message: what was seen, with the numbers and the names of modules and parameters.
        remedy: what to do about it, in words; empty for ok.
        figures: the numbers of the message as plain data for ``--json``.
    """

    level: Level
    name: str
    message: str
    remedy: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.level is not Level.OK) != bool(self.remedy):
            raise ValueError(f"{self.name!r} is {self.level.value}: a remedy belongs to warnings and problems alone")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "level": self.level.value}


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """1 where any verdict is a problem, 0 otherwise: what the command exits with."""
    return int(any(verdict.level is Level.PROBLEM for verdict in verdicts))
