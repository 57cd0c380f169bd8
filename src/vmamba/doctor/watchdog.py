"""A watchdog for anyone's training loop: it says which phase stalled, with the stacks of all threads and workers."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from . import watcher
from .watcher import BYE, DUMP_SIGNAL, Board, State

__all__ = ["ON_STALL", "StalledTraining", "Watchdog"]

T = TypeVar("T")

ON_STALL = ("dump", "stop")
_READY_SECONDS = 60.0
_GPU_EVERY = 1.0


class StalledTraining(TimeoutError):
    """A step stalled and `on_stall="stop"` was asked for. The message names the phase and the file of the stacks."""


class Watchdog:
    """Watches a training loop from a process of its own.

        with Watchdog(60, "runs/mine") as watchdog:
            for images, labels in watchdog.data(loader):
                with watchdog.phase("forward"):
                    loss = loss_of(model(images), labels)
                with watchdog.phase("backward"):
                    loss.backward()
                with watchdog.phase("optimiser"):
                    optimizer.step()
                watchdog.step()

    Every mark is a sign of life and costs some microseconds. Without one for `seconds`, `directory/stall-1.txt` gets
    the Python stacks of all threads and of data-loader workers, what the GPU does, the last minute of the resources,
    which phase it is and what to do; standard error gets a line. The stack counts for more than the marks: a loop
    that marks only `step()` still hears "backward", "data" or "collective". `directory/resources.csv` records the
    resources from the first second to the last. Of several processes that train together each has its own
    files (`stall-1-rank1.txt`); start the watchdog when the process group is there.

    Forked workers answer by themselves, spawned ones with `DataLoader(worker_init_fn=watchdog.worker_init_fn)`, and on
    Linux only, which tells whether a process would survive the question.

    Args:
        seconds: without a sign of life, after which a step has stalled. Longer than the longest step, the first with
            its compilations and a checkpoint included.
        directory: where the files go; it is made.
        on_stall: "dump" reports and goes on; "stop" also ends the training with `StalledTraining`, and where that does
            not get through, because the process is in C, kills it after 20 s.
        advice: ends the message of a stop, such as the command to go on with.

    Raises:
        ValueError: `seconds` is not positive, or `on_stall` is unknown.
    """

    _active: Watchdog | None = None

    def __init__(self, seconds: float, directory: str | Path, *, on_stall: str = "dump", advice: str = "") -> None:
        if not seconds > 0:
            raise ValueError(f"the watchdog's seconds must be positive, not {seconds}")
        if on_stall not in ON_STALL:
            raise ValueError(f"on_stall: unknown {on_stall!r}; choose from {', '.join(ON_STALL)}")
        self.seconds = seconds
        self.directory = Path(directory)
        self.on_stall = on_stall
        self.advice = advice
        self._phase, self._gpu = "", ""
        self._marks = self._step = self._rank = 0
        self._world = 1
        self._memory, self._memory_at = (0.0, 0.0), 0.0
        self._board: Board | None = None

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def start(self) -> None:
        """Begin to watch the thread that calls this.

        Raises:
            RuntimeError: this system has no signals to ask for stacks with (Windows), another watchdog is active in
                this process, or the watching process does not start.
            OSError: the directory cannot be made or written.
        """
        if DUMP_SIGNAL is None:
            raise RuntimeError("the watchdog asks for stacks by signals, which this system does not have")
        if Watchdog._active is not None:
            raise RuntimeError(f"a watchdog is already active in this process, for {Watchdog._active.directory}")
        self.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            shared = undo.enter_context(tempfile.TemporaryFile(prefix="vmamba-watchdog-"))
            shared.truncate(Board.SIZE)
            self._stacks = undo.enter_context(tempfile.NamedTemporaryFile("ab", prefix="vmamba-watchdog-stacks-"))
            self._board = Board(shared.fileno())
            self._rank, self._world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
            self.mark("start")
            reader = undo.enter_context(open(self._stacks.name, "rb"))
            ours, theirs = (undo.enter_context(end) for end in socket.socketpair())
            faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)
            undo.callback(faulthandler.unregister, DUMP_SIGNAL)
            if threading.current_thread() is threading.main_thread():
                previous = signal.getsignal(signal.SIGINT)
                signal.signal(signal.SIGINT, functools.partial(self._interrupted, previous))
                undo.callback(signal.signal, signal.SIGINT, previous)
            settings = {
                "parent": os.getpid(),
                "thread": threading.get_ident(),
                "seconds": self.seconds,
                "directory": str(self.directory),
                "on_stall": self.on_stall,
                "advice": self.advice,
                "board": shared.fileno(),
                "stacks": reader.fileno(),
                "line": theirs.fileno(),
            }
            process = subprocess.Popen(
                [sys.executable, "-I", watcher.__file__, json.dumps(settings)],
                pass_fds=[settings[name] for name in ("board", "stacks", "line")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            undo.callback(_end, process, ours)
            theirs.close()
            ours.settimeout(_READY_SECONDS)
            # its own complaint stands on standard error
            if not ours.recv(1):
                raise RuntimeError(f"the watching process ended at once, with status {process.wait()}")
            ours.settimeout(None)
            threading.Thread(target=_answer, args=(ours,), name="vmamba-watchdog", daemon=True).start()
            Watchdog._active = self
            undo.callback(setattr, Watchdog, "_active", None)
            self._undo = undo.pop_all()

    def close(self) -> None:
        """End the watch; the history stays. Closing twice is allowed."""
        if self._board is not None:
            self._undo.close()
            self._board = None

    def mark(self, phase: str) -> None:
        """A sign of life: from now on `phase`."""
        if self._board is None:
            raise RuntimeError("this watchdog is not watching: use it in a `with` block, or call start()")
        self._phase = phase
        self._marks += 1
        if self._world == 1 and dist.is_available() and dist.is_initialized():
            self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._board.write(
            State(
                time.monotonic(),
                self._marks,
                self._step,
                self._rank,
                self._world,
                *self._memory,
                self._phase,
                self._gpu,
            )
        )

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the step: "data", "forward", "backward", "optimiser", "collective", or a name of your own."""
        before = self._phase
        self.mark(name)
        try:
            yield
        finally:
            self.mark(before)

    def step(self) -> None:
        """A step is done; the next begins with its data."""
        self._step += 1
        if torch.cuda.is_initialized() and time.monotonic() - self._memory_at > _GPU_EVERY:
            self._memory_at = time.monotonic()
            self._memory = float(torch.cuda.memory_allocated()), float(torch.cuda.memory_reserved())
            self._gpu = self._gpu or f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        self.mark("data")

    def data(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, where waiting for them is the phase "data"."""
        with self.phase("data"):
            iterator = iter(batches)
        while True:
            with self.phase("data"):
                batch = next(iterator, _END)
            if batch is _END:
                return
            yield batch

    @property
    def worker_init_fn(self) -> Callable[[int], None]:
        """For data-loader workers that are spawned, which inherit nothing: makes them answer with their stacks."""
        if self._board is None:
            raise RuntimeError("this watchdog is not watching yet: start it before the loader")
        return functools.partial(_register_worker, self._stacks.name)

    def _interrupted(self, previous: Any, number: int, frame: Any) -> None:
        """SIGINT: from the watching process if the board says so, else from the user, whose it stays."""
        why = self._board.why_stop() if self._board is not None else ""
        if why:
            self._board.ask_to_stop("")
            raise StalledTraining(why)
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL:
            raise KeyboardInterrupt


_END: Any = object()


def _register_worker(path: str, _: int) -> None:
    # held open by the handler as long as the worker lives
    faulthandler.register(DUMP_SIGNAL, file=open(path, "ab"), all_threads=True)  # noqa: SIM115


def _end(process: subprocess.Popen, line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.sendall(BYE)
        line.shutdown(socket.SHUT_WR)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


def _answer(line: socket.socket) -> None:
    """The watching process asks what only this one can find out. Runs in a thread, so it answers if the GIL is free."""
    with contextlib.suppress(OSError):
        while line.recv(64):
            line.sendall(json.dumps(_gpu_facts()).encode())


def _gpu_facts() -> dict[str, str]:
    if not torch.cuda.is_initialized():
        return {}
    launch = sys.modules.get("vmamba.ops.triton_backend.launch")
    kernel = launch.last_launched[0] if launch is not None else None
    facts = {
        "device": torch.cuda.get_device_name(),
        "memory": f"{torch.cuda.memory_allocated() / 2**30:.2f} GiB allocated, "
        f"{torch.cuda.memory_reserved() / 2**30:.2f} GiB reserved",
        "last Triton kernel of vmamba": kernel.jit.__name__ if kernel is not None else "none yet",
    }
    try:
        facts["work queued"] = "done" if torch.cuda.default_stream().query() else "unfinished"
    except RuntimeError as error:  # an earlier kernel failed
        facts["work queued"] = f"failed: {str(error).splitlines()[0]}"
    return facts
