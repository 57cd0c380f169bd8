"""A function run in a process of its own that is ended when its time is over, whatever it is stuck in."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["END_SECONDS", "Failed", "Finished", "Stalled", "end_with_parent", "run_with_limit"]

# importing torch on a busy machine, before the function's own time begins
START_SECONDS = 180.0
# from the dump of the stacks to the end of the process
GRACE_SECONDS = 2.0
# from the signal that ends a process to its end
END_SECONDS = 10.0
_OUTPUT_CHARACTERS = 4000
_POLL_SECONDS = 0.02
# sys.path first: the function may live beside a user's script. The rest of the start is this module's own
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from vmamba.doctor.child import _serve
_serve(sys.argv[2], float(sys.argv[3]))
"""


@dataclass(frozen=True)
class Finished:
    """The function returned `value`."""

    value: Any
    output: str = ""


@dataclass(frozen=True)
class Failed:
    """The function raised, or its process died. `error` in one line; `traceback` empty for a process that died."""

    error: str
    traceback: str = ""
    output: str = ""


@dataclass(frozen=True)
class Stalled:
    """The function was not done after `seconds`. `stacks`: the Python stacks of all threads of its process then."""

    seconds: float
    stacks: str
    output: str = ""


def run_with_limit(
    function: Callable[..., Any], *args: Any, seconds: float, **kwargs: Any
) -> Finished | Failed | Stalled:
    """Call `function(*args, **kwargs)` in a fresh process for at most `seconds`.

    Fresh, not forked: CUDA, OpenMP and autograd's threads do not survive a fork. The process and all its children are
    killed at the end, also where they hold the GIL or block in C. What it prints is kept in `output`, the last 4,000
    characters. Its start (importing torch) is not counted.

    Args:
        function: importable by name from `sys.path` as it is here, like its arguments and its value picklable.
        seconds: the time limit of the call.

    Raises:
        ValueError: `seconds` is not positive.
        pickle.PicklingError, AttributeError, TypeError: function or arguments cannot be sent to another process.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, not {seconds}")
    call = pickle.dumps((function, args, kwargs))
    with tempfile.TemporaryDirectory(prefix="vmamba-doctor-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "call").write_bytes(call)
        path = json.dumps([os.getcwd() if entry == "" else entry for entry in sys.path])
        with open(folder / "output", "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, path, name, repr(seconds)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # a group of its own: its data-loader workers end with it
                start_new_session=True,
            )
        try:
            ended = _wait(process, folder, seconds)
        finally:
            _end(process)
        return _result(process, folder, seconds, ended)


def _wait(process: subprocess.Popen, folder: Path, seconds: float) -> bool:
    """Whether the process came to its own end."""
    deadline = time.monotonic() + START_SECONDS
    while not (folder / "started").exists():
        if process.poll() is not None:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    deadline = time.monotonic() + seconds + GRACE_SECONDS
    # the result is enough: what a process does at its exit may hang, too
    while time.monotonic() < deadline:
        if process.poll() is not None or (folder / "result").exists():
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    # what waits in the kernel for a driver or a disk does not hear of it, and is not waited for
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)


def _result(process: subprocess.Popen, folder: Path, seconds: float, ended: bool) -> Finished | Failed | Stalled:
    output = (folder / "output").read_text(errors="replace")[-_OUTPUT_CHARACTERS:]
    if (folder / "result").exists():
        kind, *rest = pickle.loads((folder / "result").read_bytes())
        return Finished(rest[0], output) if kind == "value" else Failed(rest[0], rest[1], output)
    if not ended:
        stacks = folder / "stacks"
        return Stalled(seconds, stacks.read_text(errors="replace") if stacks.exists() else "", output)
    code = process.returncode
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return Failed(f"the process died: {how}", "", output)


def end_with_parent() -> None:
    """Should the process that started this one be killed, so is this one, where the system offers it."""
    if sys.platform == "linux":
        # option 1 is PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _serve(folder: str, seconds: float) -> None:
    """What the fresh process does: the call, under a clock of C that no Python code can hold up."""
    here = Path(folder)
    end_with_parent()
    stacks = open(here / "stacks", "w")  # noqa: SIM115 faulthandler writes to it until the process ends
    (here / "started").touch()
    faulthandler.dump_traceback_later(seconds, file=stacks)
    try:
        function, args, kwargs = pickle.loads((here / "call").read_bytes())
        result = pickle.dumps(("value", function(*args, **kwargs)))
    # whatever a probe raises, SystemExit too, is what the caller wants to hear of
    except BaseException as error:
        message = " ".join(str(error).split())
        result = pickle.dumps(
            (
                "error",
                f"{type(error).__name__}: {message}" if message else type(error).__name__,
                traceback.format_exc(),
            )
        )
    faulthandler.cancel_dump_traceback_later()
    (here / "aside").write_bytes(result)
    os.replace(here / "aside", here / "result")
