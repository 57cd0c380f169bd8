"""Several processes that train one model: who there is, agreement among them, scores put together."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..tasks import Scores

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's ``rank`` of ``size``, and ``local_rank`` of ``local_size`` on this machine.

    ``control`` is a group on the CPU, for what must not wait for a GPU; None for a single process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        return bool(self.most(int(flag)))

    def most(self, number: int) -> int:
        """The largest ``number`` of all processes."""
        if self.control is None:
            return number
        largest = torch.tensor([number])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the processes, element by element; on the device of ``values``."""
        if self.control is None:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def merge(self, scores: Scores) -> Scores:
        """The scores of all processes together."""
        if self.control is None:
            return scores
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, scores, group=self.control)
        merged, *others = everyone
        for other in others:
            merged.merge(other)
        return merged

    def copy_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite ``tensors`` with the first process's, in place."""
        if self.control is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def from_first(self, value: T) -> T:
        """What the first process passes here."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


def launched_processes() -> int:
    """How many processes torchrun started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first_process() -> bool:
    """Whether this process is the first, or the only one, of those that torchrun started."""
    return launched_processes() == 1 or os.environ["RANK"] == "0"


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """Meet the other processes that torchrun started, through NCCL on GPUs and gloo elsewhere; leave them at the end.

    Raises:
        ValueError: there are more processes than GPUs on this machine.
    """
    if launched_processes() == 1:
        yield World()
        return
    rank, size, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    if device == "cuda":
        if local_size > torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {local_size} processes here and there are {torch.cuda.device_count()} GPUs: "
                f"start at most one a GPU with --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        # the first process may take long to check a folder of a million files
        control = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        yield World(rank, size, local_rank, local_size, control)
    finally:
        # the trainer and its sharded weights hold each other and process groups; a group that is taken down as late as
        # the end of the program may abort it
        gc.collect()
        dist.destroy_process_group()
