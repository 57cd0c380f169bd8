"""Examinations in a process of their own, watched from outside: the doctor never hangs and leaves nothing behind.

The child notes in a small mapped file where it is; what it found it appends to another. Both outlive it, whatever ends
it. A child that is not heard of for too long has the Python stacks of all its threads and workers written down, and is
killed with everything it started (it leads a process group).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .child import END_SECONDS, end_with_parent
from .position import SET_UP, Place, Position
from .subject import MISTAKES, Subject, load
from .verdict import Level, Verdict

__all__ = ["Job", "Report", "Source", "Work", "run_jobs"]

POLL = 0.02
# how long processes get to write their stacks down before they are killed
LAST_WORDS = 1.0
# a child that still moved in this last part of its time is slow, not stuck
STILL_MOVING = 0.2
# a new interpreter imports torch, on a busy machine; the time of its first job begins after that
START_SECONDS = 180.0
# characters of stacks that are kept
STACKS = 100_000


@dataclass(frozen=True)
class Source:
    """What to examine: an object of this process, or a target that the child loads by itself."""

    target: str | Subject
    overrides: tuple[str, ...] = ()
    device: str = "auto"

    def load(self) -> Subject:
        if isinstance(self.target, Subject):
            return self.target
        return load(self.target, self.overrides, self.device)


@dataclass(frozen=True)
class Job:
    """One examination: its name in the table of probes, and its arguments, plain data."""

    name: str
    arguments: tuple[Any, ...] = ()


@dataclass
class Report:
    """How a child ended.

    Attributes:
        verdicts: of the jobs that were finished.
        stopped: a job said that those after it make no sense.
        left: jobs not done.
        stalled: the job during which time ran out, and ``place``, ``moving`` (it was slow rather than stuck) and
            ``stacks`` (faulthandler's text) with it.
        died: how the process ended by itself, for example "killed by SIGSEGV", and its last ``output``.
        mistake: an error of the user's in setting up, to raise as it is.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    stopped: bool = False
    left: list[Job] = field(default_factory=list)
    stalled: Job | None = None
    died: str = ""
    place: Place = field(default_factory=Place)
    moving: bool = False
    stacks: str = ""
    output: str = ""
    mistake: Exception | None = None


# what a child does: gets the subject's source, its jobs, where it is, the limit of a job, and a way to tell
Work = Callable[[Source, Sequence[Job], Position, float, Callable[..., None]], None]


def run_jobs(
    source: Source, jobs: Sequence[Job], time_limit: float, work: Work, set_up_limit: float | None = None
) -> Report:
    """Do ``jobs`` one after another in a child; each may take ``time_limit`` seconds, and setting up ``set_up_limit``
    (None: the same).

    ``work`` is a function of a module, since a new interpreter must be able to import it.

    Raises:
        ValueError: the subject can neither be inherited nor written to a file.
    """
    with tempfile.TemporaryDirectory(prefix="vmamba-doctor-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        child = _start(source, jobs, time_limit, work, folder)
        try:
            return _watch(child, jobs, time_limit, set_up_limit or time_limit, folder)
        finally:
            child.end()


class _Child:
    """A process that leads a group."""

    def __init__(self, pid: int, process: subprocess.Popen | None = None) -> None:
        self.pid = pid
        self._process = process
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code (negative: the signal), None while it runs."""
        if self._code is None:
            if self._process is not None:
                self._code = self._process.poll()
            else:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def members(self) -> list[int]:
        """The processes of the group, itself first; where the system does not list them, itself."""
        found = [self.pid]
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # after the name in parentheses: state, parent, group
                if int(stat.read_text().rpartition(")")[2].split()[2]) == self.pid:
                    found.append(int(stat.parent.name))
        return list(dict.fromkeys(found))

    def end(self) -> None:
        """Kill it and all it has started."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            if self.poll() is None:
                # it had not yet made its group
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
        elif self._process is not None:
            self._process.kill()
        # what waits in the kernel for a driver or a disk does not hear of it, and is not waited for
        last = time.monotonic() + END_SECONDS
        while self.poll() is None and time.monotonic() < last:
            time.sleep(POLL)


def _start(source: Source, jobs: Sequence[Job], time_limit: float, work: Work, folder: Path) -> _Child:
    subject = source.target if isinstance(source.target, Subject) else None
    if subject is not None and _can_fork():
        return _fork(lambda: _child(source, jobs, time_limit, work, folder, forked=True))
    if subject is not None:
        try:
            torch.save(subject, folder / "subject.pt")
        except Exception as error:  # pickling runs the user's own code
            raise ValueError(
                f"the subject cannot be given to another process ({type(error).__name__}: {error}): pass the name of "
                "a function that makes it, 'module:function', so that the doctor's process can call it"
            ) from error
    order = {
        "target": None if subject is not None else source.target,
        "overrides": source.overrides,
        "device": source.device,
        "jobs": [(job.name, job.arguments) for job in jobs],
        "time_limit": time_limit,
        "work": f"{work.__module__}:{work.__qualname__}",
    }
    (folder / "order.json").write_text(json.dumps(order), encoding="utf-8")
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "from vmamba.doctor.session import main; main()", str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Child(process.pid, process)


def _can_fork() -> bool:
    # beside a GPU autograd has threads from its first backward on, and what was forked after that cannot run another
    return hasattr(os, "fork") and sys.platform != "darwin" and not torch.accelerator.is_available()


def _fork(run: Callable[[], None]) -> _Child:
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # of threads in the parent: the child runs one thread, and has a time limit should a lock have been held
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            # the pools of threads did not come along
            torch.set_num_threads(1)
            run()
            code = 0
        finally:
            os._exit(code)
    return _Child(pid)


def main() -> None:
    """The child that is a new interpreter: its order lies in the folder that it is given."""
    folder = Path(sys.argv[1])
    order = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    module, _, name = order["work"].partition(":")
    work = getattr(__import__(module, fromlist=[name]), name)
    target = order["target"]
    if target is None:
        # written by the parent a moment ago
        target = torch.load(folder / "subject.pt", weights_only=False)
    source = Source(target, tuple(order["overrides"]), order["device"])
    jobs = [Job(name, tuple(arguments)) for name, arguments in order["jobs"]]
    _child(source, jobs, order["time_limit"], work, folder, forked=False)


def _child(source: Source, jobs: Sequence[Job], time_limit: float, work: Work, folder: Path, *, forked: bool) -> None:
    if forked:
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115 for life
    end_with_parent()
    stacks = open(folder / "stacks.txt", "a")  # noqa: SIM115 for the life of the process
    faulthandler.enable(stacks)
    if hasattr(faulthandler, "register"):
        # workers that are forked inherit this
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    results = open(folder / "results.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def tell(**line: Any) -> None:
        print(json.dumps(line), file=results, flush=True)

    tell(started=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work(source, jobs, Position(folder / "position"), time_limit, tell)
    except MISTAKES as error:
        kind = next(cls for cls in MISTAKES if isinstance(error, cls))
        tell(mistake=[kind.__name__, str(error)])
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _watch(child: _Child, jobs: Sequence[Job], time_limit: float, set_up_limit: float, folder: Path) -> Report:
    position, report, results = Position(folder / "position"), Report(left=list(jobs)), folder / "results.jsonl"
    began = moved = time.monotonic()
    place, read, current, limit = Place(), 0, Job(SET_UP), START_SECONDS
    while True:
        code = child.poll()
        now = time.monotonic()
        lines = results.read_text(encoding="utf-8").splitlines(keepends=True) if results.is_file() else []
        for text in lines[read:]:
            if not text.endswith("\n"):
                break
            read += 1
            line = json.loads(text)
            if "mistake" in line:
                kind, message = line["mistake"]
                report.mistake = {cls.__name__: cls for cls in MISTAKES}[kind](message)
                return report
            began = moved = now
            if "started" in line:
                limit = set_up_limit
            if "began" in line:
                current, limit = jobs[line["began"]], time_limit
            if "ended" in line:
                report.left = list(jobs[line["ended"] + 1 :])
                report.verdicts += [_verdict(values) for values in line["verdicts"]]
                report.stopped = line["stop"]
            if report.stopped or not report.left:
                return report
        if code is not None:
            report.died, report.place = _manner(code), position.read()
            report.stalled, report.output = current, _tail(folder / "output.txt")
            report.stacks = _tail(folder / "stacks.txt", STACKS)
            return report
        if position.read() != place:
            place, moved = position.read(), now
        if now - began > limit:
            report.stalled, report.place = current, place
            report.moving = now - moved < STILL_MOVING * limit
            report.stacks = _dump_stacks(child, folder)
            return report
        time.sleep(POLL)


def _verdict(values: dict[str, Any]) -> Verdict:
    return Verdict(**{**values, "level": Level(values["level"])})


def _manner(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    number = -code
    return f"was killed by {signal.Signals(number).name if number in list(signal.Signals) else f'signal {number}'}"


def _tail(path: Path, characters: int = 2000) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-characters:] if path.is_file() else ""


def _dump_stacks(child: _Child, folder: Path) -> str:
    if not hasattr(faulthandler, "register"):
        return ""
    path = folder / "stacks.txt"
    # one after another: in one file they would write between each other's lines
    for pid in child.members():
        before = size = _size(path)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
        end = time.monotonic() + LAST_WORDS
        while time.monotonic() < end:
            time.sleep(5 * POLL)
            if before < size == _size(path):
                break
            size = _size(path)
    return _tail(path, STACKS)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
