"""The process that watches a training from outside: it keeps the history of its resources, and says when it stalls.

A process and not a thread: where a call into C holds the GIL, no thread of the training runs. It imports nothing but
the standard library, so it is there in a twentieth of a second and takes 15 MB. What the training tells it lies in
shared memory (`Board`), written with no system call.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import json
import mmap
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Schedulers send SIGUSR1 and SIGUSR2 to trainings; Linux has signals that nobody uses.
DUMP_SIGNAL = signal.SIGRTMIN + 3 if hasattr(signal, "SIGRTMIN") else getattr(signal, "SIGUSR2", None)

# after the request to stop, until the process is killed: time for a teardown that waits for workers
STOP_GRACE_SECONDS = 20.0
# a file a stall, and no more of them: a limit below the time of a step would fill the disk
MOST_REPORTS = 20
# between two lines of the history, doubled after every so many of them: a week of training is a file of 600 kB
SAMPLE_SECONDS = 1.0
SAMPLES_BEFORE_DOUBLING = 1000
RECENT_SAMPLES = 60
# of one processor during the stall, which it may share: above it the training computes, below it waits
BUSY = 0.2
BYE = b"bye"

COLUMNS = (
    "seconds",
    "step",
    "phase",
    "stalled",
    "host_gib",
    "workers_gib",
    "cpu_percent",
    "gpu_allocated_gib",
    "gpu_reserved_gib",
    "gpu_used_gib",
    "gpu_percent",
)


class Board:
    """What the training tells, in shared memory: where it is and since when. Read whole or read again."""

    _LAYOUT = struct.Struct("<dqqqqdd32s64s")
    SIZE = 4096
    _STOP = 2048

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, self.SIZE)

    def write(self, state: State) -> None:
        *numbers, phase, gpu = state
        self._LAYOUT.pack_into(self._memory, 0, *numbers, phase.encode()[:32], gpu.encode())

    def read(self) -> State:
        size = self._LAYOUT.size
        before, now = None, self._memory[:size]
        while before != now:
            before, now = now, self._memory[:size]
        *numbers, phase, gpu = self._LAYOUT.unpack(now)
        return State(*numbers, *(text.rstrip(b"\0").decode(errors="ignore") for text in (phase, gpu)))

    def ask_to_stop(self, why: str) -> None:
        room = self.SIZE - self._STOP
        self._memory[self._STOP :] = why.encode()[:room].ljust(room, b"\0")

    def why_stop(self) -> str:
        """Why the training shall stop; empty where it shall not."""
        return self._memory[self._STOP :].rstrip(b"\0").decode(errors="ignore")


class State(NamedTuple):
    """What is on the board. `marked` is of `time.monotonic`, which all processes of a machine share.

    marks: how many signs of life there were. allocated, reserved: bytes on the GPU. gpu: its UUID, empty without one.
    """

    marked: float
    marks: int
    step: int
    rank: int
    world: int
    allocated: float
    reserved: float
    phase: str
    gpu: str


class Process(NamedTuple):
    """What the system says of a process: memory in bytes, processor time in seconds, its state as of `ps`."""

    pid: int
    parent: int
    state: str
    resident: int
    cpu: float


@dataclass(frozen=True)
class Stall:
    """Which phase stalled, as of the stack where that tells, else as marked; `within` is the phase around it."""

    phase: str
    within: str = ""

    def __str__(self) -> str:
        return f"{self.phase} (during {self.within})" if self.within and self.within != self.phase else self.phase


WHAT_IT_MEANS = {
    "data": "The training waits for its next batch. The stacks of the workers, below, say in what.",
    "forward": "The forward pass does not end. The stack names the module.",
    "backward": "The backward pass does not end. Where a cause was found it was extreme slowness, not a deadlock: a "
    "scan as a Python loop, a backend without kernels.",
    "optimiser": "Clipping or the optimiser's step does not end.",
    "collective": "This process waits for others in an operation of all processes, and one of them does not come.",
    "compilation": "Kernels are being compiled for the GPU, as the first step of a network does, with others each time "
    "that shapes or dtypes are new.",
    "validation": "Validation does not end.",
    "checkpoint": "A checkpoint is being written: the disk is slow or does not answer.",
}
WHAT_TO_DO = {
    "data": "Run with data.workers=0 (num_workers=0): an error then shows itself, and so does a slow dataset "
    "(`vmamba data bench`). Locks, database and HDF5 handles opened before the workers start deadlock in them: open "
    "them in the worker.",
    "forward": "`vmamba doctor --config RUN` times every module and names the one that is slow.",
    "backward": "`vmamba doctor` says which backend runs and how fast; `vmamba doctor --config RUN` times every "
    "module's backward; --bisect finds the smallest culprit.",
    "optimiser": "Many small parameters make a loop of small steps: take the optimiser's foreach or fused variant.",
    "collective": "Compare with the stall files of the other processes: the one that is somewhere else is the cause. "
    "Usual: fewer batches in one process, an exception in one, a branch that only one takes, a parameter without a "
    "gradient (DDP's find_unused_parameters).",
    "compilation": "Wait: it takes a minute or two, with few processors longer, and what was compiled is kept on the "
    "disk for the next run (TRITON_CACHE_DIR). Choose more seconds for the watchdog.",
    "validation": "Validate on fewer images, or see the stack for what it waits for.",
    "checkpoint": "See whether the disk is full or a network share is away.",
}

# files and functions of a frame that tell the phase, whatever was marked
_TELLING = (
    ("compilation", re.compile(r"/triton/.* in (compile|make_\w+|_build)$")),
    ("collective", re.compile(r"torch/distributed/(distributed_c10d|_functional_collectives|c10d_logger)\.py")),
    ("data", re.compile(r"torch/utils/data/")),
    ("checkpoint", re.compile(r"torch/serialization\.py")),
    ("optimiser", re.compile(r"torch/optim/|torch/nn/utils/clip_grad\.py")),
    ("backward", re.compile(r" in _engine_run_backward$")),
)
# marks of a loop that sets none of its own
_BETWEEN = ("", "start", "data")
# a pass before the first step, in which nothing is computed, whatever its frames are called
_AHEAD = re.compile(r"vmamba/ops/.* in compile_ahead$")
_DDP = re.compile(r" in _engine_run_backward$|torch/nn/parallel/distributed\.py")
_FRAME = re.compile(r'^\s+File "')
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")


def threads_of(stacks: str) -> dict[int, list[str]]:
    """The frames of every thread, innermost first, from what `faulthandler` writes."""
    threads: dict[int, list[str]] = {}
    frames: list[str] = []
    for line in stacks.splitlines():
        if found := _THREAD.match(line):
            frames = threads.setdefault(int(found[1], 16), [])
        elif _FRAME.match(line):
            frames.append(line.strip().replace("\\", "/"))
    return threads


def diagnose(marked: str, frames: Sequence[str], world: int) -> Stall:
    """The phase that stalled. The stack counts for more than the mark, since nobody forgets to set it.

    Args:
        marked: the phase that the training is in by its own marks.
        frames: of the training's thread, innermost first.
        world: processes that train together.
    """
    if any(_AHEAD.search(frame) for frame in frames):
        return Stall("compilation", marked)
    for depth, frame in enumerate(frames):
        # no Python below: DDP waits in C++ for the others, in backward for their gradients
        if depth == 0 and world > 1 and _DDP.search(frame):
            return Stall("collective", marked)
        for phase, pattern in _TELLING:
            # an optimiser may call the forward and backward (a closure, as Lightning gives it): there the mark counts
            if pattern.search(frame) and (phase != "optimiser" or depth == 0 or marked in _BETWEEN):
                return Stall(phase, marked)
    return Stall(marked or "unmarked code")


def processes() -> dict[int, Process]:
    """All processes of this machine that can be seen: from /proc, elsewhere from `ps`."""
    found = _from_proc() if os.path.isdir("/proc/self") else _from_ps()
    return {process.pid: process for process in found}


def processor_seconds(pid: int) -> float:
    """What that process has used so far, all its threads together; 0 where it is gone."""
    found = _from_proc([str(pid)]) if os.path.isdir("/proc/self") else _from_ps()
    return sum(process.cpu for process in found if process.pid == pid)


def _from_proc(entries: Iterable[str] | None = None) -> Iterable[Process]:
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    for entry in os.listdir("/proc") if entries is None else entries:
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                # the name, in brackets, may hold anything
                fields = file.read().rpartition(")")[2].split()
                cpu = (int(fields[11]) + int(fields[12])) / tick
                yield Process(int(entry), int(fields[1]), fields[0], int(fields[21]) * page, cpu)


def _from_ps() -> Iterable[Process]:
    command = ["ps", "-axo", "pid=,ppid=,state=,rss=,time="]
    for line in subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines():
        pid, parent, state, resident, clock = line.split()
        days, _, clock = clock.rpartition("-")
        cpu = 86400.0 * int(days or 0)
        for power, part in enumerate(reversed(clock.split(":"))):
            cpu += 60**power * float(part)
        yield Process(int(pid), int(parent), state[0], 1024 * int(resident), cpu)


def descendants(of: int, everyone: dict[int, Process]) -> list[Process]:
    """Children, their children and so on, this process left out."""
    children = collections.defaultdict(list)
    for process in everyone.values():
        children[process.parent].append(process)
    found, waiting = [], [of]
    while waiting:
        for child in children[waiting.pop()]:
            if child.pid != os.getpid():
                found.append(child)
                waiting.append(child.pid)
    return sorted(found)


def catches_dump_signal(pid: int) -> bool:
    """Whether that process has a handler for `DUMP_SIGNAL`; to any other the signal is the end. Linux alone tells."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (DUMP_SIGNAL - 1) & 1)
    return False


class Gpu:
    """Used memory and utilisation of one GPU, from pynvml if it is installed, else from `nvidia-smi`.

    Asked in a thread of its own: a driver may take seconds to answer, or never do.
    """

    def __init__(self, uuid: str) -> None:
        self.latest: tuple[float, float] | None = None  # GiB, percent
        read = self._from_pynvml if _has_pynvml() else self._from_nvidia_smi
        threading.Thread(target=read, args=(uuid,), daemon=True).start()

    def _from_pynvml(self, uuid: str) -> None:
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            while True:
                used = pynvml.nvmlDeviceGetMemoryInfo(handle).used
                self.latest = used / 2**30, float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
                time.sleep(SAMPLE_SECONDS)

    def _from_nvidia_smi(self, uuid: str) -> None:
        while program := shutil.which("nvidia-smi"):
            self.latest = ask_nvidia_smi(program, uuid)
            time.sleep(SAMPLE_SECONDS)


def ask_nvidia_smi(program: str, uuid: str) -> tuple[float, float] | None:
    """Used memory in GiB and utilisation in percent; None where it does not tell."""
    query = ["--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader,nounits", "-i", uuid]
    answer = subprocess.run([program, *query], capture_output=True, text=True, check=False).stdout
    try:
        used, percent = map(float, answer.split(","))
    except ValueError:  # "[N/A]", or nothing
        return None
    return used / 2**10, percent


def _has_pynvml() -> bool:
    try:
        import pynvml  # noqa: F401
    except ImportError:
        return False
    return True


class History:
    """resources.csv, and the last lines of it; a run that goes on goes on in the same file."""

    def __init__(self, path: Path) -> None:
        self.recent: collections.deque[dict[str, Any]] = collections.deque(maxlen=RECENT_SAMPLES)
        self.every = SAMPLE_SECONDS
        self._count = 0
        self._before = self._last_second(path)
        self._start = time.monotonic()
        fresh = not path.exists()
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 kept for the whole run
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        if fresh:
            self._writer.writeheader()

    @staticmethod
    def _last_second(path: Path) -> float:
        try:
            with open(path, newline="", encoding="utf-8") as file:
                return max((float(row["seconds"]) for row in csv.DictReader(file)), default=0.0)
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def add(self, row: dict[str, Any]) -> None:
        row = {"seconds": self._before + time.monotonic() - self._start, **row}
        self.recent.append(row)
        self._count += 1
        if self._count % SAMPLES_BEFORE_DOUBLING == 0:
            self.every *= 2
        self._writer.writerow(
            {k: f"{v:.4g}" if isinstance(v, float) and k != "seconds" else v for k, v in row.items()}
            | {"seconds": f"{row['seconds']:.1f}"}
        )
        self._file.flush()

    def table(self) -> str:
        """The last minute, as text."""
        lines = ["  ".join(f"{name:>{max(9, len(name))}}" for name in COLUMNS)]
        for row in self.recent:
            cells = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in (row[name] for name in COLUMNS))
            lines.append("  ".join(f"{c:>{max(9, len(n))}}" for c, n in zip(cells, COLUMNS, strict=True)))
        return "\n".join(lines)


class Watcher:
    """See the module. `line` is the wire to the training: it answers questions there, and says when it is done."""

    def __init__(
        self,
        parent: int,
        seconds: float,
        directory: Path,
        on_stall: str,
        advice: str,
        board: Board,
        stacks: int,
        line: socket.socket,
        thread: int,
    ) -> None:
        self.parent, self.seconds, self.directory, self.on_stall, self.advice = (
            parent,
            seconds,
            directory,
            on_stall,
            advice,
        )
        self.board, self.stacks, self.line, self.thread = board, stacks, line, thread
        state = board.read()
        self.history = History(directory / f"resources{_suffix(state)}.csv")
        self.gpu: Gpu | None = None
        self._cpu: dict[int, float] = {}
        self._cpu_at = 0.0
        self._busy_since: tuple[int, float, float] = (-1, 0.0, 0.0)
        self._kill_at: float | None = None
        self._reported: tuple[int, float, Stall] | None = None
        self._reports = 0

    def run(self) -> None:
        poll = min(0.5, self.seconds / 10)
        next_sample = 0.0
        while not self._is_over(poll):
            state, now = self.board.read(), time.monotonic()
            if self.gpu is None and state.gpu:
                self.gpu = Gpu(state.gpu)
            stalled = now - state.marked > self.seconds
            if now >= next_sample:
                self._sample(state, stalled)
                next_sample = now + self.history.every
            self._note_busy(state)
            if self._reported is not None and self._reported[0] != state.marks:
                _, since, stall = self._reported
                say(f"it goes on, after {now - since:.0f} s in {stall}")
                self._reported = self._kill_at = None
            if self._kill_at is not None and now > self._kill_at:
                self._kill()
                return
            if stalled and self._reported is None and self._reports < MOST_REPORTS:
                self._report(state)
        self._sample(self.board.read(), stalled=False)  # the shortest run has a history, too

    def _is_over(self, seconds: float) -> bool:
        """Waits a little. The line alone does not tell: forked workers hold its other end, too."""
        readable, _, _ = select.select([self.line], [], [], seconds)
        # anything else is an answer that came too late
        return bool(readable and self.line.recv(65536) in (b"", BYE)) or os.getppid() != self.parent

    def _sample(self, state: State, stalled: bool) -> None:
        everyone = processes()
        own, workers = everyone.get(self.parent), descendants(self.parent, everyone)
        now = time.monotonic()
        spent = {p.pid: p.cpu for p in (own, *workers) if p is not None}
        passed = now - self._cpu_at
        used = sum(cpu - self._cpu.get(pid, cpu) for pid, cpu in spent.items())
        used_gib, percent = self.gpu.latest if self.gpu is not None and self.gpu.latest is not None else ("", "")
        self.history.add(
            {
                "step": state.step,
                "phase": state.phase,
                "stalled": int(stalled),
                "host_gib": own.resident / 2**30 if own is not None else "",
                "workers_gib": sum(p.resident for p in workers) / 2**30,
                "cpu_percent": 100 * used / passed if self._cpu else "",
                "gpu_allocated_gib": state.allocated / 2**30 if state.gpu else "",
                "gpu_reserved_gib": state.reserved / 2**30 if state.gpu else "",
                "gpu_used_gib": used_gib,
                "gpu_percent": percent,
            }
        )
        self._cpu, self._cpu_at = spent, now

    def _note_busy(self, state: State) -> None:
        """At the first look after a mark, the processor time spent up to then."""
        if state.marks != self._busy_since[0]:
            self._busy_since = state.marks, time.monotonic(), processor_seconds(self.parent)

    def _report(self, state: State) -> None:
        now = time.monotonic()
        busy = (processor_seconds(self.parent) - self._busy_since[2]) / max(1e-3, now - self._busy_since[1])
        stacks = self._dump(self.parent)
        answer = self._ask()
        threads = threads_of(stacks)
        stall = diagnose(state.phase, threads.get(self.thread, []), state.world)
        where = f"{stall}, after step {state.step}"
        number = 1
        while (path := self.directory / f"stall-{number}{_suffix(state)}.txt").exists():
            number += 1
        head = f"no sign of life for {self.seconds:g} s in {where}"
        sections = [
            f"vmamba watchdog: {head}",
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}, process {self.parent}"
            + (f", rank {state.rank} of {state.world}" if state.world > 1 else ""),
            "",
            WHAT_IT_MEANS.get(stall.phase, "The code outside the marked phases does not end."),
            f"Meanwhile it used {100 * busy:.0f} % of a processor: "
            + (
                "it waits for something."
                if busy <= BUSY
                else "it computes, so it is slow rather than dead."
                if not state.gpu
                else "it computes, or waits for the GPU, which takes a processor, too."
            ),
            *([] if state.step else ["No step is done yet: the first also compiles kernels and starts workers."]),
            f"What to do: {WHAT_TO_DO.get(stall.phase, 'See the stack for what it waits for.')}",
            *self._gpu_section(state, answer),
            "",
            "Python stacks of the training",
            stacks or "none came: the process does not react to signals (it is stopped, or waits for a disk).",
            *self._worker_sections(),
            "",
            "The last minute",
            self.history.table(),
        ]
        write(path, "\n".join(sections) + "\n")
        self._reports += 1
        say(f"{head}; {'computing' if busy > BUSY else 'waiting'}. Stacks and history: {path}")
        self._reported = state.marks, state.marked, stall
        if self.on_stall == "stop":
            self.board.ask_to_stop(f"stalled in {where} for {self.seconds:g} s: see {path}{self._then()}")
            self._kill_at = time.monotonic() + STOP_GRACE_SECONDS
            os.kill(self.parent, signal.SIGINT)

    def _then(self) -> str:
        return f"; {self.advice}" if self.advice else ""

    def _kill(self) -> None:
        """It was asked to stop and did not: something in C does not let it."""
        say(f"it does not stop when asked, so it is killed{self._then()}")
        # parents first: a parent that lives might start a worker anew
        for pid in (self.parent, *(p.pid for p in descendants(self.parent, processes()))):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _dump(self, pid: int) -> str:
        """What a process writes of its stacks when asked: with the GIL held and in C, too."""
        size = os.fstat(self.stacks).st_size
        try:
            os.kill(pid, DUMP_SIGNAL)
        except ProcessLookupError:
            return ""
        seen, quiet_since, deadline = size, time.monotonic(), time.monotonic() + 3
        while time.monotonic() < deadline and (seen == size or time.monotonic() - quiet_since < 0.2):
            time.sleep(0.02)
            if (now := os.fstat(self.stacks).st_size) != seen:
                seen, quiet_since = now, time.monotonic()
        return os.pread(self.stacks, seen - size, size).decode(errors="replace").rstrip()

    def _ask(self) -> dict[str, Any] | None:
        """What a thread of the training says of the GPU; None if none answers, because a call into C holds the GIL."""
        with contextlib.suppress(OSError, ValueError):
            self.line.sendall(b"?")
            if select.select([self.line], [], [], 3)[0]:
                return json.loads(self.line.recv(65536))
        return None

    def _gpu_section(self, state: State, answer: dict[str, Any] | None) -> list[str]:
        if answer is None:
            driver = ", or the GPU's driver does not return" if state.gpu else ""
            return [f"No thread of it answers: a call into C holds the GIL{driver}."]
        if not answer:
            return []
        lines = ["", "GPU", *(f"{name}: {value}" for name, value in answer.items())]
        if answer.get("work queued") == "unfinished":
            lines.append(
                "The GPU is not done with what was queued, maybe in an earlier phase than the one that waits here: "
                "CUDA_LAUNCH_BLOCKING=1 shows which."
            )
        return lines

    def _worker_sections(self) -> list[str]:
        lines = []
        for process in descendants(self.parent, processes()):
            lines += ["", f"Child process {process.pid}, state {process.state}, {process.resident / 2**20:.0f} MiB"]
            if catches_dump_signal(process.pid):
                lines.append(self._dump(process.pid) or "no stack came")
            else:
                lines.append(
                    "no stack: it is no forked worker (spawned ones need worker_init_fn=watchdog.worker_init_fn)"
                )
        return lines or ["", "It has no child processes: no data-loader workers."]


def _suffix(state: State) -> str:
    """Of the files of all processes but the first."""
    return f"-rank{state.rank}" if state.rank else ""


def say(text: str) -> None:
    print(f"vmamba watchdog: {text}", file=sys.stderr, flush=True)


def write(path: Path, text: str) -> None:
    """Whole or not at all, as everything in a run directory."""
    aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def main(arguments: Sequence[str]) -> None:
    settings = json.loads(arguments[0])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training
    board, line = Board(settings.pop("board")), socket.socket(fileno=settings.pop("line"))
    watcher = Watcher(**settings | {"directory": Path(settings["directory"])}, board=board, line=line)
    line.sendall(b"!")  # ready
    watcher.run()


if __name__ == "__main__":
    main(sys.argv[1:])
