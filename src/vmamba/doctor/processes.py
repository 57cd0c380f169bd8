"""The step under DistributedDataParallel in several processes: does every collective meet all of them."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .patient import USED_SHARE, Patient
from .position import Place, Position
from .session import LAST_WORDS, POLL
from .stacks import users_frames
from .verdict import Level, Verdict

__all__ = ["examine_processes"]

# the second one is where a parameter without gradient shows
STEPS = 2
SHARE = USED_SHARE / 2


def examine_processes(patient: Patient) -> list[Verdict]:
    """Only where the subject says how many processes; on the CPU, each on the whole batch."""
    count = patient.subject.processes
    if count < 2:
        return []
    if patient.subject.device.type != "cpu" or not hasattr(os, "fork"):
        return [Verdict(Level.OK, "processes", "Not examined: only a model on the CPU can be copied to processes.")]
    with tempfile.TemporaryDirectory(prefix="vmamba-doctor-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        patient.restore()
        ranks = {rank: _start(patient, rank, count, folder) for rank in range(count)}
        return [_watch(patient, ranks, folder)]


def _start(patient: Patient, rank: int, count: int, folder: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            _rank(patient, rank, count, folder)
            code = 0
        except Exception as error:  # told to the parent by file
            (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        finally:
            os._exit(code)
    return pid


def _rank(patient: Patient, rank: int, count: int, folder: Path) -> None:
    import faulthandler

    stacks = open(folder / f"stacks-{rank}", "w")  # noqa: SIM115 for the life of the process
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    position = Position(folder / f"position-{rank}")
    position.note("meeting the others")
    subject = patient.subject
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=count,
        # we end what hangs, and want to see it hang until then
        timeout=datetime.timedelta(seconds=10 * patient.time_limit),
    )
    subject.model = DistributedDataParallel(subject.model)
    for _ in range(STEPS):
        position.note("forward")
        loss = subject.compute_loss()
        position.note("backward")
        loss.backward()
        position.note("optimiser")
        if subject.optimizer is not None:
            subject.optimizer.step()
            subject.optimizer.zero_grad()
    position.note("done")


def _watch(patient: Patient, ranks: dict[int, int], folder: Path) -> Verdict:
    running, end = dict(ranks), time.monotonic() + SHARE * patient.time_limit
    patient.position.note("processes")
    while running and time.monotonic() < end and not list(folder.glob("error-*")):
        time.sleep(POLL)
        running = {rank: pid for rank, pid in running.items() if os.waitpid(pid, os.WNOHANG)[0] == 0}
    places = {rank: _place(folder, rank) for rank in ranks}
    errors = sorted(folder.glob("error-*"))
    frames = {} if errors else _stacks(running, folder)
    for pid in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    if errors:
        return _error(errors[0].name.rpartition("-")[2], errors[0].read_text(encoding="utf-8"))
    if running:
        return _never_completes(patient, places, frames)
    return Verdict(Level.OK, "processes", f"{STEPS} steps in {len(ranks)} processes meet at every collective.")


def _place(folder: Path, rank: int) -> Place:
    path = folder / f"position-{rank}"
    return Position(path).read() if path.is_file() else Place()


def _stacks(running: dict[int, int], folder: Path) -> dict[int, str]:
    for pid in running.values():
        os.kill(pid, signal.SIGUSR1)
    if running:
        time.sleep(LAST_WORDS)
    frames = {rank: users_frames((folder / f"stacks-{rank}").read_text(errors="replace")) for rank in running}
    return {rank: found[0] for rank, found in frames.items() if found}


def _never_completes(patient: Patient, places: dict[int, Place], frames: dict[int, str]) -> Verdict:
    said = []
    for rank, place in places.items():
        where = f" at {frames[rank]}" if rank in frames else ""
        said.append(f"process {rank} is {'done' if place.phase == 'done' else f'in {place.phase}{where}'}")
    return Verdict(
        Level.PROBLEM,
        "collective never completes",
        f"After {SHARE * patient.time_limit:.0f} s of {STEPS} steps the processes still wait for each other: "
        f"{'; '.join(said)}.",
        "Every process must call the same collectives in the same order and number: look for all_reduce, barrier or "
        "backward inside `if rank == 0`, for loops of different lengths, and for parameters used in some processes "
        "only.",
        {"places": {str(rank): place.phase for rank, place in places.items()}, "frames": list(frames.values())},
    )


def _error(rank: str, text: str) -> Verdict:
    first = " ".join(text.split())[:400]
    if "finished reduction in the prior iteration" in text:
        remedy = "Some parameters get no gradient: use, remove or freeze them, or set find_unused_parameters=True."
        return Verdict(Level.PROBLEM, "DDP misses gradients", f"Process {rank} stopped: {first}", remedy)
    remedy = "Run the step under torchrun with one process more than one to see the whole traceback."
    return Verdict(Level.PROBLEM, "step fails in several processes", f"Process {rank} stopped: {first}", remedy)
