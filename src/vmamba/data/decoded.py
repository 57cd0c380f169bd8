"""Images of different sizes decoded once and kept in memory, for data that worker processes augment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .memory import HOST_SHARE, free_memory

__all__ = ["DecodedImages"]


class DecodedImages:
    """uint8 arrays of any shapes, one after another in one block of memory; item ``i`` is a view of the block.

    A single tensor: worker processes share its memory with this one, whether they are forked or started afresh, where
    a list of arrays would be copied.

    Args:
        shapes: of all arrays, known before they are decoded (from the headers of files).
        decode: gives array ``i`` as a tensor or what ``torch.as_tensor`` takes; called from several threads.

    Raises:
        ValueError: they need more than 80 % of the memory that is free (nothing was decoded then), or ``decode`` gives
            another shape than was said.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], decode: Callable[[int], object]) -> None:
        self.shapes = tuple(shapes)
        lengths = [math.prod(shape) for shape in self.shapes]
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        needed, free = starts[-1], free_memory()
        if needed > HOST_SHARE * free:
            raise ValueError(
                f"{len(lengths)} decoded images need {needed / 1e9:.1f} GB, and of the {free / 1e9:.1f} GB of free "
                f"memory at most {HOST_SHARE:.0%} may be used: set data.in_memory=false"
            )
        self._starts = starts
        self._block = torch.empty(needed, dtype=torch.uint8)

        def fill(index: int) -> None:
            array = torch.as_tensor(decode(index))
            if tuple(array.shape) != self.shapes[index]:
                raise ValueError(f"image {index} is {tuple(array.shape)}, and its header says {self.shapes[index]}")
            self[index].copy_(array)

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(fill, range(len(lengths))):
                pass

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Tensor:
        start, stop = self._starts[index], self._starts[index + 1]
        return self._block[start:stop].view(self.shapes[index])
