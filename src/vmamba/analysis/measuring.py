"""How figures of speed are taken: warm-up, device events, rounds in turn, and the conditions they were taken under."""

from __future__ import annotations

import contextlib
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from .._devices import choose_device
from ..ops import backends

Key = tuple[str, ...]
Step = Callable[[], object]
Round = Callable[[], float]  # measures one round and returns seconds a step

# The first call compiles or loads, the second records a CUDA graph, the third is the first like all others.
WARM_UP_CALLS = 3


class Measurement(NamedTuple):
    """Seconds a step over several rounds: the median, the least and the most."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Measurement:
        return cls(statistics.median(samples), min(samples), max(samples))


class Stopwatch:
    """Times steps on one device, "cpu" or "cuda"."""

    def __init__(self, device: torch.device):
        self.device = device

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def back_to_back(self, step: Step, count: int) -> float:
        """Seconds a step of `count` steps queued one behind the other."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(count):
                step()
            return (time.perf_counter() - start) / count
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        first.record()
        for _ in range(count):
            step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000 / count

    def one_by_one(self, step: Step, count: int) -> float:
        """Median seconds from a call to its finished result, each call waiting for the one before."""
        samples = []
        for _ in range(count):
            self.synchronize()
            start = time.perf_counter()
            step()
            self.synchronize()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)

    def rounds(self, step: Step, seconds: float, *, latency: bool = False) -> Round:
        """A function that measures one round of `step`, of as many calls as take about `seconds`; it warms up now."""
        for _ in range(WARM_UP_CALLS):
            step()
        measure = self.one_by_one if latency else self.back_to_back
        count = min(1000, max(1, round(seconds / measure(step, 1))))
        return lambda: measure(step, count)


def in_turn(
    preparations: Mapping[Key, Callable[[], Round]], rounds: int, progress: Callable[[str], None]
) -> dict[Key, Measurement | str]:
    """Prepare every case, then measure all of them in turn, `rounds` times, so that drift of the machine meets all.

    A case that fails, in its preparation or later, is left out from then on; its result is the reason.
    """
    ready: dict[Key, Round] = {}
    samples: dict[Key, list[float]] = {}
    failures: dict[Key, str] = {}
    for key, prepare in preparations.items():
        progress(f"preparing {' '.join(key)}")
        try:
            ready[key] = prepare()
        # out of memory, no compiler, an unsupported size: whatever it is, the others are still to be measured
        except Exception as error:
            failures[key] = reason(error)
        if key in failures:
            free_memory()  # here, where the exception holds the failed tensors no longer
    for i in range(rounds):
        progress(f"round {i + 1} of {rounds}")
        for key in list(ready):
            try:
                samples.setdefault(key, []).append(ready[key]())
            except Exception as error:
                failures[key] = reason(error)
            if key in failures:
                del ready[key]
                free_memory()
    return {key: failures[key] if key in failures else Measurement.of(samples[key]) for key in preparations}


def reason(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines[:2])}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def free_memory() -> None:
    """Give what nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def numeric_flags(tf32: bool) -> Iterator[None]:
    """TF32 as asked and cuDNN's search for the fastest convolution on, as sizes are fixed; put back afterwards."""
    cudnn = torch.backends.cudnn
    saved = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    cudnn.allow_tf32, cudnn.benchmark = tf32, True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(saved[0])
        cudnn.allow_tf32, cudnn.benchmark = saved[1:]


@contextlib.contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Random numbers from seed 0; the caller's generators are put back afterwards, other devices' not touched."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


def as_current(device: torch.device) -> contextlib.AbstractContextManager:
    """`device` as the current CUDA device, which events and streams belong to."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def checked_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: it is neither CPU nor CUDA, or there is no CUDA here.
    """
    if name == "auto":
        name = choose_device(name, among=("cuda", "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: choose auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"cannot measure on {name!r}: choose auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} asked for, but torch {torch.__version__} sees no CUDA here: choose cpu")
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the software, as far as they bear on speed."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_cuda else None,
        "triton": _version("triton"),
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "scan_backend": next(name for name, status in backends(device).items() if status.chosen),
        "commit": _commit(),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this package's checkout, with "+changes" if files differ from it; None outside a checkout."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False)
        except OSError:  # no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # an installed package may lie inside somebody else's repository
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--untracked-files=no", ".")
    return f"{commit}+changes" if changes else commit
