"""A probe that returns, raises, dies, sleeps or holds the GIL: the caller always gets an answer."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmamba.doctor.child import Failed, Finished, Stalled, run_with_limit


def double(number, plus=0):
    print("computing")
    return 2 * number + plus


def fail():
    raise KeyError("no such\nthing")


def die():
    os.kill(os.getpid(), signal.SIGSEGV)


def leave():
    sys.exit(3)


def sleep_for_ever():
    time.sleep(1000)


def hold_the_gil():
    ctypes.PyDLL(None).sleep(1000)  # PyDLL, unlike CDLL, keeps the GIL


def start_a_process(path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(path, "w") as file:
        file.write(str(child.pid))
    time.sleep(1000)


def test_a_value_comes_back_and_prints_are_kept():
    assert run_with_limit(double, 4, plus=1, seconds=60) == Finished(9, "computing\n")


def test_an_exception_is_an_answer():
    result = run_with_limit(fail, seconds=60)
    assert isinstance(result, Failed)
    assert result.error.startswith("KeyError: ")
    assert "\n" not in result.error
    assert "in fail" in result.traceback


def test_an_exit_is_an_answer():
    assert run_with_limit(leave, seconds=60).error == "SystemExit: 3"


def test_a_process_that_dies_is_an_answer():
    assert run_with_limit(die, seconds=60).error == "the process died: killed by SIGSEGV"


@pytest.mark.parametrize("function", [sleep_for_ever, hold_the_gil])
def test_what_never_ends_is_ended_and_says_where_it_was(function):
    result = run_with_limit(function, seconds=0.5)
    assert isinstance(result, Stalled)
    assert result.seconds == 0.5
    assert re.search(rf"in {function.__name__}$", result.stacks, re.MULTILINE)


def test_children_end_with_it(tmp_path):
    path = tmp_path / "pid"
    assert isinstance(run_with_limit(start_a_process, str(path), seconds=1.5), Stalled)
    pid = int(path.read_text())
    for _ in range(200):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} lives on")


def test_a_limit_must_be_positive():
    with pytest.raises(ValueError, match="not 0"):
        run_with_limit(double, 1, seconds=0)


def tell_and_sleep(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(1000)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_it_ends_with_whoever_started_it(tmp_path):
    path = tmp_path / "pid"
    program = f"from tests.doctor.test_child import *; run_with_limit(tell_and_sleep, {str(path)!r}, seconds=600)"
    caller = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 120
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        caller.kill()
        caller.wait()
    deadline = time.monotonic() + 20
    # a zombie has no program any more
    while os.path.exists(f"/proc/{path.read_text()}/exe"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
