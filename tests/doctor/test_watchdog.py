"""Real stalls in real loops: each is named, with the stack that shows it. Limits of a second, waits of many."""

import csv
import ctypes
import faulthandler
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vmamba.doctor import StalledTraining, Watchdog, environment, watcher
from vmamba.doctor.watchdog import _gpu_facts
from vmamba.doctor.watcher import COLUMNS, DUMP_SIGNAL, diagnose, threads_of

pytestmark = pytest.mark.usefixtures("one_thread")
LIMIT = 0.7
PROCESSES = Path(__file__).with_name("stalled_processes.py")


@pytest.fixture
def _no_gpu():
    """The watchdog looks at GPUs, so none is hidden here."""


def wait_for(path, seconds=60):
    """A stall ends when its report is written, so that nothing depends on how fast the machine is."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


def history(folder, name="resources.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


class Waiting(Dataset):
    """Its item 2 comes when the report is there."""

    def __init__(self, report):
        self.report = report

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if i == 2:
            wait_for(self.report)
        return torch.ones(3)


class WaitingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, report):
        ctx.report = report
        return x.clone()

    @staticmethod
    def backward(ctx, gy):
        wait_for(ctx.report)
        return gy, None


def run_a_step(watchdog, batch, forward, optimizer=None):
    with watchdog.phase("forward"):
        loss = forward(batch)
    with watchdog.phase("backward"):
        loss.backward()
    with watchdog.phase("optimiser"):
        if optimizer is not None:
            optimizer.step()
    watchdog.step()


def model_step(folder, forward, **named):
    """One healthy step, then one with `forward`."""
    weight = torch.ones(3, requires_grad=True)
    with Watchdog(LIMIT, folder, **named) as watchdog:
        run_a_step(watchdog, weight, torch.sum)
        run_a_step(watchdog, weight, forward)


def test_a_healthy_run_leaves_its_history_and_nothing_else(tmp_path, capfd):
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    before = signal.getsignal(signal.SIGINT)
    with Watchdog(60, tmp_path) as watchdog:
        loader = DataLoader(torch.ones(12, 3), batch_size=2, num_workers=1)
        for batch in watchdog.data(loader):
            run_a_step(watchdog, batch, lambda x: layer(x).sum(), optimizer)
        time.sleep(1.5)
    assert [path.name for path in tmp_path.iterdir()] == ["resources.csv"]
    assert capfd.readouterr().err == ""
    rows = history(tmp_path)
    assert list(rows[0]) == list(COLUMNS)
    assert float(rows[-1]["host_gib"]) > 0.05
    assert {row["stalled"] for row in rows} == {"0"}
    assert rows[-1]["step"] == "6"
    # nothing of it is left in the process
    assert signal.getsignal(signal.SIGINT) is before
    assert not faulthandler.unregister(DUMP_SIGNAL)


def test_the_history_of_a_run_that_goes_on_goes_on(tmp_path):
    for _ in range(2):
        with Watchdog(60, tmp_path):
            time.sleep(0.5)
    seconds = [float(row["seconds"]) for row in history(tmp_path)]
    assert len(seconds) >= 2
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stalled_dataset_is_data_with_the_stack_of_the_worker(tmp_path, capfd, workers):
    report = tmp_path / "stall-1.txt"
    with Watchdog(LIMIT, tmp_path) as watchdog:
        for _ in DataLoader(Waiting(report), batch_size=1, num_workers=workers):
            watchdog.step()
    text = report.read_text()
    assert text.startswith(f"vmamba watchdog: no sign of life for {LIMIT} s in data, after step ")
    assert "it waits for something" in text
    assert "data.workers=0" in text
    part = text.partition("Child process")[2] if workers else text
    assert re.search(r"test_watchdog.py\", line \d+ in __getitem__", part)
    errors = capfd.readouterr().err
    assert str(report) in errors
    assert "in data, after step" in errors


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True])
def test_spawned_workers_answer_when_they_are_told_to(tmp_path, told):
    report = tmp_path / "stall-2.txt"
    # the limit passes while the worker starts, too: its own stall is the second or a later one
    with Watchdog(LIMIT, tmp_path) as watchdog:
        loader = DataLoader(
            Waiting(report),
            batch_size=1,
            num_workers=1,
            prefetch_factor=1,
            multiprocessing_context="spawn",
            worker_init_fn=watchdog.worker_init_fn if told else None,
        )
        for _ in loader:
            watchdog.step()
    # children: the worker, and the tracker of multiprocessing, which never answers
    children = report.read_text().partition("Child process")[2]
    assert "worker_init_fn=watchdog.worker_init_fn" in children
    assert bool(re.search(r"line \d+ in __getitem__", children)) is told


def test_a_stalled_forward(tmp_path):
    report = tmp_path / "stall-1.txt"

    def slow(x):
        wait_for(report)
        return x.sum()

    model_step(tmp_path, slow)
    text = report.read_text()
    assert f"no sign of life for {LIMIT} s in forward, after step 1\n" in text
    assert "in slow" in text
    assert "The last minute" in text


def test_a_blocking_backward(tmp_path, capfd):
    report = tmp_path / "stall-1.txt"
    model_step(tmp_path, lambda x: WaitingBackward.apply(x, report).sum())
    text = report.read_text()
    assert f"no sign of life for {LIMIT} s in backward, after step 1\n" in text
    assert "in backward\n" in text
    assert "vmamba doctor --config" in text
    # whether it went on is told if the watch lasted
    assert "no sign of life" in capfd.readouterr().err


def test_a_backward_is_named_without_any_mark_but_steps(tmp_path):
    report = tmp_path / "stall-1.txt"
    weight = torch.ones(3, requires_grad=True)
    with Watchdog(LIMIT, tmp_path) as watchdog:
        watchdog.step()
        WaitingBackward.apply(weight, report).sum().backward()
    assert "in backward (during data), after step 1" in report.read_text()


def test_a_call_that_holds_the_gil_is_reported_too(tmp_path):
    class Holding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gy):
            # no thread of this process runs meanwhile; C's own sleep ends early at a signal
            for _ in range(8):
                ctypes.PyDLL(None).sleep(1)
            return gy

    model_step(tmp_path, lambda x: Holding.apply(x).sum())
    text = (tmp_path / "stall-1.txt").read_text()
    assert f"no sign of life for {LIMIT} s in backward, after step 1\n" in text


def test_computing_is_told_from_waiting(tmp_path):
    report = tmp_path / "stall-1.txt"

    def compute(x):
        while not report.exists():
            torch.ones(300, 300) @ torch.ones(300, 300)
        return x.sum()

    model_step(tmp_path, compute)
    assert "it computes, so it is slow rather than dead" in report.read_text()


def test_stop_raises_where_the_loop_is(tmp_path):
    def wait(x):
        time.sleep(120)

    start = time.monotonic()
    with pytest.raises(
        StalledTraining, match=r"stalled in forward, after step 1 for 0.7 s: see .*stall-1.txt; do this"
    ):
        model_step(tmp_path, wait, on_stall="stop", advice="do this")
    assert time.monotonic() - start < 60
    assert history(tmp_path)


@pytest.fixture
def _interruptible():
    """SIGINT as in a terminal; a process that a script starts in the background inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_the_user_can_still_interrupt(tmp_path):
    with pytest.raises(KeyboardInterrupt), Watchdog(60, tmp_path):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "within", "step"), [("stop", "forward", 1), ("forward", "forward", 1), ("backward", "backward", 2)]
)
def test_a_collective_that_never_completes(tmp_path, what, within, step):
    """Two processes; the second never comes, and the first waits in C."""
    done = subprocess.run(
        [sys.executable, PROCESSES, what, tmp_path], capture_output=True, text=True, check=False, timeout=200
    )
    assert f"in collective (during {within}), after step {step}" in done.stderr
    text = (tmp_path / "stall-1.txt").read_text()
    assert "rank 0 of 2" in text
    assert "Compare with the stall files of the other processes" in text
    assert f"in elsewhere, after step {step}" in (tmp_path / "stall-1-rank1.txt").read_text()
    assert history(tmp_path, "resources-rank1.csv")
    # it was asked to stop, which a process in C does not hear
    assert ("it does not stop when asked, so it is killed; go on" in done.stderr) is (what == "stop")
    assert done.stdout.strip() == ("-9" if what == "stop" else "None")


BACKWARD = 'File "/x/torch/autograd/graph.py", line 1 in _engine_run_backward'
DATA = 'File "/x/torch/utils/data/dataloader.py", line 1 in __next__'
BARRIER = 'File "/x/torch/distributed/distributed_c10d.py", line 1 in barrier'
DDP = 'File "/x/torch/nn/parallel/distributed.py", line 1 in _run_ddp_forward'
SAVE = 'File "/x/torch/serialization.py", line 1 in save'
ADAMW = 'File "/x/torch/optim/adamw.py", line 1 in step'
AHEAD = 'File "/x/vmamba/ops/ahead.py", line 1 in compile_ahead'
COMPILE = 'File "/x/triton/compiler/compiler.py", line 1 in compile'
LAUNCH = 'File "/x/triton/compiler/compiler.py", line 1 in runner'
MINE = 'File "/x/my.py", line 1 in f'


@pytest.mark.parametrize(
    ("marked", "frames", "world", "stall"),
    [
        ("forward", [MINE, AHEAD], 1, "compilation (during forward)"),
        ("forward", [BACKWARD, AHEAD], 2, "compilation (during forward)"),
        ("forward", [MINE, COMPILE], 1, "compilation (during forward)"),
        ("forward", [LAUNCH, MINE], 1, "forward"),
        ("forward", [MINE], 1, "forward"),
        ("", [], 1, "unmarked code"),
        ("forward", [MINE, DATA], 1, "data (during forward)"),
        ("forward", [BACKWARD], 1, "backward (during forward)"),
        ("backward", [BACKWARD], 2, "collective (during backward)"),
        ("backward", [MINE, BACKWARD], 2, "backward"),
        ("forward", [DDP, MINE], 2, "collective (during forward)"),
        ("forward", [MINE, DDP], 2, "forward"),
        ("optimiser", [ADAMW, MINE], 1, "optimiser"),
        ("forward", [MINE, ADAMW], 1, "forward"),
        ("data", [MINE, ADAMW], 1, "optimiser (during data)"),
        ("validation", [BARRIER, MINE], 2, "collective (during validation)"),
        ("optimiser", [SAVE], 1, "checkpoint (during optimiser)"),
    ],
)
def test_the_stack_counts_for_more_than_the_mark(marked, frames, world, stall):
    assert str(diagnose(marked, frames, world)) == stall


def test_stacks_are_read_by_thread():
    stacks = (
        'Thread 0x00000000000000ff [worker] (most recent call first):\n  File "a.py", line 1 in f\n\n'
        'Current thread 0x0000000000000010 (most recent call first):\n  File "b.py", line 2 in g\n'
        '  File "c.py", line 3 in h\n'
    )
    assert threads_of(stacks) == {
        255: ['File "a.py", line 1 in f'],
        16: ['File "b.py", line 2 in g', 'File "c.py", line 3 in h'],
    }


@pytest.mark.parametrize(("named", "match"), [({"seconds": 0}, "not 0"), ({"on_stall": "cry"}, "unknown 'cry'")])
def test_settings_that_make_no_sense(tmp_path, named, match):
    with pytest.raises(ValueError, match=match):
        Watchdog(**{"seconds": 1, "directory": tmp_path, **named})


def test_one_watchdog_a_process(tmp_path):
    with Watchdog(60, tmp_path / "one"), pytest.raises(RuntimeError, match="already active"):
        Watchdog(60, tmp_path / "two").start()
    assert not (tmp_path / "two").exists()


def test_it_says_that_it_is_not_started(tmp_path):
    with pytest.raises(RuntimeError, match="with"):
        Watchdog(60, tmp_path).step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_and_the_last_kernel_are_told(tmp_path):
    from vmamba.ops import selective_scan

    report = tmp_path / "stall-1.txt"
    u = torch.randn(1, 8, 64, device="cuda")

    def scan():
        selective_scan(u, u, -torch.ones(8, 1, device="cuda"), u[:, :1], u[:, :1])

    def forward(x):
        scan()
        wait_for(report)
        return x.sum()

    scan()  # compiling takes longer than the watchdog waits
    model_step(tmp_path, forward)
    text = report.read_text()
    assert torch.cuda.get_device_name() in text
    assert "work queued: done" in text
    assert "last Triton kernel of vmamba: scan_forward_kernel" in text


# -- what a machine without a GPU, or without /proc, can try of the others


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A function that puts a program of that name first on the path; it prints what it is given."""

    def make(name, output):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return make


@pytest.mark.parametrize(("output", "found"), [("10240, 87", (10.0, 87.0)), ("[N/A], [N/A]", None), ("", None)])
def test_the_gpu_as_nvidia_smi_tells_it(program, output, found):
    program("nvidia-smi", output)
    assert watcher.ask_nvidia_smi("nvidia-smi", "GPU-1") == found


def test_the_driver_as_nvidia_smi_tells_it(program):
    program("nvidia-smi", "| Driver Version: 550.54.15   CUDA Version: 12.4 |\nGPU 0: NVIDIA L4 (UUID: GPU-1)")
    assert environment._from_driver() == (("NVIDIA L4",), "550.54.15", (12, 4))


def test_a_training_on_a_gpu_tells_of_it(monkeypatch):
    launch = SimpleNamespace(last_launched=[SimpleNamespace(jit=SimpleNamespace(__name__="_scan_kernel"))])
    monkeypatch.setitem(sys.modules, "vmamba.ops.triton_backend.launch", launch)
    for name, answer in {
        "is_initialized": True,
        "get_device_name": "NVIDIA L4",
        "memory_allocated": 2**30,
        "memory_reserved": 2**31,
        "default_stream": SimpleNamespace(query=lambda: False),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    assert _gpu_facts() == {
        "device": "NVIDIA L4",
        "memory": "1.00 GiB allocated, 2.00 GiB reserved",
        "last Triton kernel of vmamba": "_scan_kernel",
        "work queued": "unfinished",
    }


def test_processes_are_the_same_from_both_sources():
    ps, proc = ({p.pid: p for p in source()}[os.getpid()] for source in (watcher._from_ps, watcher._from_proc))
    assert ps.parent == proc.parent == os.getppid()
    assert ps.resident == pytest.approx(proc.resident, rel=0.2)
    assert ps.cpu == pytest.approx(proc.cpu, abs=5)
