"""The data loader: does it give batches, how long does each take, do its workers live."""

from __future__ import annotations

import re
import time
import traceback
from multiprocessing import reduction, resource_sharer

from torch.multiprocessing import reductions

from .patient import Patient
from .stacks import is_users
from .subject import to_device
from .verdict import Level, Verdict
from .wording import milliseconds

__all__ = ["examine_loader"]

# the first one also starts the workers
BATCHES = 6
# seconds that starting the workers may take at the beginning of every epoch
SLOW_START = 5.0
DEAD_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) (?P<how>exited unexpectedly|is killed by signal: [\w ]+)"
)

# where a batch's memory is asked for from the worker that holds it; found dead there, it may not be known to be so yet
SHARING = (reductions.__file__, reduction.__file__, resource_sharer.__file__)


def examine_loader(patient: Patient) -> list[Verdict]:
    """Draw batches. The first one is what is examined afterwards, where the subject has none."""
    subject = patient.subject
    if subject.loader is None:
        return []
    waits: list[float] = []
    first = None
    patient.position.note("data")
    try:
        began = time.perf_counter()
        for batch in subject.loader:
            waits.append(time.perf_counter() - began)
            first = batch if first is None else first
            if len(waits) == BATCHES or not patient.has_time():
                break
            patient.position.note("data", f"batch {len(waits) + 1}")
            began = time.perf_counter()
    except Exception as error:  # from the user's data set, with the worker's traceback in its text
        return [_fails(error, len(waits))]
    if first is None:
        return [
            Verdict(
                Level.PROBLEM,
                "data loader is empty",
                "The data loader gave no batch at all.",
                "Look at the sampler, and whether drop_last=True drops a data set smaller than one batch.",
            )
        ]
    if subject.batch is None:
        subject.batch = to_device(first, subject.device)
    # how long a batch takes when the loader is under way
    patient.facts["waits"] = waits[1:]
    workers = getattr(subject.loader, "num_workers", 0)
    if workers and not subject.loader.persistent_workers and waits[0] - max(waits[1:], default=0.0) > SLOW_START:
        return [_starts_slowly(waits[0], workers)]
    message = f"{len(waits)} batches" if len(waits) > 1 else "1 batch"
    return [
        Verdict(
            Level.OK,
            "data loader",
            f"{message}, the first after {milliseconds(waits[0])}"
            + (f", the others after {milliseconds(max(waits[1:]))} at most." if waits[1:] else "."),
            figures={"wait_seconds": waits},
        )
    ]


def _starts_slowly(seconds: float, workers: int) -> Verdict:
    return Verdict(
        Level.WARNING,
        "workers start slowly",
        f"The first batch came after {seconds:.1f} s: so long the {workers} workers take to start, at every epoch.",
        "Keep them with persistent_workers=True. Workers that are spawned import everything again and copy the "
        "data set: make it small to pickle, or fork them (multiprocessing_context='fork').",
        {"seconds": seconds, "workers": workers},
    )


def _fails(error: Exception, given: int) -> Verdict:
    text = str(error).strip()
    dead = DEAD_WORKER.search(text)
    if dead is not None:
        return _died(f" (pid {dead['pids']}) {dead['how'].replace('is killed', 'was killed')}", given)
    last = traceback.extract_tb(error.__traceback__)[-8:]
    if isinstance(error, OSError | EOFError) and any(frame.filename in SHARING for frame in last):
        return _died(" exited unexpectedly", given)
    lines = text.splitlines()
    places = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', text)
    users = [place for place in places if is_users(place[0])]
    where = f" at {users[-1][0]}:{users[-1][1]} in {users[-1][2]}" if users else ""
    return Verdict(
        Level.PROBLEM,
        "data loader fails",
        f"After {given} batches the data loader raised {type(error).__name__}{where}: {lines[-1] if lines else ''}",
        "Call dataset[index] by itself for the sample named there; num_workers=0 gives the whole traceback.",
        {"batches": given, "error": type(error).__name__},
    )


def _died(how: str, given: int) -> Verdict:
    return Verdict(
        Level.PROBLEM,
        "data loader worker died",
        f"After {given} batches a worker process of the data loader{how}, without a Python error of its own.",
        "The system killed it, mostly for want of memory (dmesg says so) or of shared memory (docker: "
        "--shm-size), or a library crashed in it: try num_workers=0, then fewer workers.",
        {"batches": given},
    )
