"""Masks of an image's objects as bits of the same pixels, eight objects a byte.

Between processes and on the way to a GPU an eighth of bools, and in the making, too: 375 cells in 1024 x 1024 pixels
are 390 MB as bools. Whatever moves pixels as they are moves the masks of eight objects at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

__all__ = ["PackedMasks", "pack_masks", "pack_run_lengths", "unpack_masks"]


class PackedMasks(tv_tensors.Mask):
    """Masks of N objects for torchvision's v2 transforms: planes (ceil(N / 8), H, W) uint8.

    The highest bit of the first plane is the first object's.
    """


def pack_masks(masks: Tensor) -> Tensor:
    """The planes of masks (N, H, W) bool on the CPU."""
    return torch.from_numpy(np.packbits(masks.numpy(), axis=0))


def unpack_masks(planes: Tensor, count: int) -> Tensor:
    """The masks (count, H, W) bool of planes, where these are."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=planes.device)[:, None, None]
    return ((planes[:, None] >> shifts) & 1).flatten(0, 1)[:count].view(torch.bool)


def pack_run_lengths(runs: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Tensor:
    """The planes of compressed run lengths of COCO, each for an image of `size` (H, W).

    Of 47 cells in an image 2.5 ms; decoding one mask after another took 73, most of it to write pixels of no object.

    Raises:
        ValueError: they are of another number of pixels.
    """
    height, width = size
    count = -(-len(runs) // 8)
    planes = np.zeros((height, count, width), dtype=np.uint8)
    if runs:
        changes = _changes([one["counts"] for one in runs], height * width)
        numbers = np.repeat(np.arange(len(runs)), [len(places) for places in changes])
        column, row = np.divmod(np.concatenate(changes), height)
        bits = (128 >> numbers % 8).astype(np.uint8)
        np.bitwise_xor.at(planes, (row, numbers // 8, column), bits)
        for above, here in itertools.pairwise(planes):
            here ^= above
        # runs that go on at the top of the next column
        going_on = np.bitwise_xor.accumulate(planes[-1], axis=1)[:, :-1]
        if going_on.any():
            planes[:, :, 1:] ^= going_on
    return torch.from_numpy(planes).transpose(0, 1)


def _changes(texts: Sequence[bytes], pixels: int) -> list[np.ndarray]:
    """For each mask the numbers of the pixels, down the columns, before which it changes between 0 and 1."""
    # a number is five bits a character, the lowest first, with 32 in all characters but its last
    digits = np.frombuffer(b"".join(texts), dtype=np.uint8).astype(np.int64) - 48
    is_last = digits < 32
    lasts = np.flatnonzero(is_last)
    firsts = np.concatenate([[0], lasts[:-1] + 1])
    powers = 5 * (np.arange(len(digits)) - np.repeat(firsts, lasts - firsts + 1))
    numbers = np.add.reduceat((digits & 31) << powers, firsts)
    numbers -= (digits[lasts] & 16) << powers[lasts] + 1  # the highest bit is the sign
    changes = []
    for lengths in np.split(numbers, np.cumsum(is_last)[np.cumsum([len(text) for text in texts])[:-1] - 1]):
        # from the fourth on a length is told by how much it differs from the last but one
        lengths[1::2] = lengths[1::2].cumsum()
        lengths[2::2] = lengths[2::2].cumsum()
        places = lengths.cumsum()
        if places[-1] != pixels:
            raise ValueError(f"run lengths of {places[-1]} pixels in an image of {pixels}")
        changes.append(places[places < pixels])
    return changes
