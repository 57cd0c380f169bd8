"""Where an examination is, in a file that outlives its process."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SET_UP", "Place", "Position"]

# the phase in which a process begins
SET_UP = "set-up"


@dataclass(frozen=True)
class Place:
    """Where a child was: phase ("data", "forward", "loss", "backward", "optimiser"), module, ``done`` of ``total``
    nodes of the backward pass."""

    phase: str = SET_UP
    where: str = ""
    done: int = 0
    total: int = 0


class Position:
    """A :class:`Place` in a file: written by one process in microseconds, read by another at any time."""

    SIZE = 1024

    def __init__(self, path: str | Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, self.SIZE)
        self._memory = mmap.mmap(descriptor, self.SIZE)
        os.close(descriptor)

    def note(self, phase: str, where: str = "", done: int = 0, total: int = 0) -> None:
        text = f"{phase}\t{where[:800]}\t{done}\t{total}\n".encode()[: self.SIZE]
        self._memory[: len(text)] = text

    def read(self) -> Place:
        line = bytes(self._memory).partition(b"\n")[0].decode(errors="replace").split("\t")
        # a line caught while it was being written is no line
        if len(line) != 4 or not (line[2].isdigit() and line[3].isdigit()):
            return Place()
        return Place(line[0], line[1], int(line[2]), int(line[3]))
