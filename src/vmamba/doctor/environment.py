"""What is wrong with an installation: versions that do not fit, an idle GPU, a backend that is wrong or slow.

Facts are gathered first and judged afterwards, so that the judgement can be tried on machines that are not there.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from ..ops import backends
from ..ops.dispatch import BackendStatus
from .child import Failed, Finished, Stalled, run_with_limit
from .speed import Speed, measure
from .verdict import Level, Verdict

__all__ = [
    "Facts",
    "Gpu",
    "examine_environment",
    "gather",
    "judge_backend",
    "judge_facts",
    "judge_speed",
    "slow_variables",
]

PROBE_SECONDS = 120.0
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 10)
LEAST_FREE_GIB = 2.0

# what an extra brings, as far as one can tell it by
EXTRAS = {
    "train": ("lightning", "torchmetrics", "tensorboard", "matplotlib"),
    "det": ("torchvision", "faster-coco-eval"),
    "smp": ("segmentation-models-pytorch",),
    "hf": ("transformers", "datasets"),
    "export": ("onnx", "onnxscript"),
}
# environment variables that make a training slow without a word: when, and what they do
SLOW_VARIABLES: dict[str, tuple[Callable[[str], bool], str]] = {
    "TRITON_INTERPRET": (lambda v: v == "1", "Triton's kernels run in its interpreter, thousands of times slower"),
    "CUDA_LAUNCH_BLOCKING": (lambda v: v == "1", "every kernel is waited for"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (lambda v: v not in ("", "0"), "every tensor is a call of cudaMalloc"),
    "TRITON_ALWAYS_COMPILE": (lambda v: v == "1", "kernels are compiled again in every process"),
    "TORCH_COMPILE_DISABLE": (lambda v: v == "1", "torch.compile does nothing"),
    "TORCHDYNAMO_DISABLE": (lambda v: v == "1", "torch.compile does nothing"),
    "NCCL_P2P_DISABLE": (lambda v: v == "1", "GPUs exchange gradients through host memory"),
    "CUDA_VISIBLE_DEVICES": (lambda v: v in ("", "-1"), "all GPUs are hidden"),
}


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as torch sees it; memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int


@dataclass(frozen=True)
class Facts:
    """What can be known of a machine without computing.

    torch_cuda: CUDA version that torch was built for, None for a build without. cuda_error: why torch cannot use CUDA
    though the build could, empty where it can. driver_cuda: newest CUDA version the driver supports. seen_gpus: names
    of NVIDIA GPUs that the driver lists, whatever torch says. triton_wanted: the version that this torch asks for.
    architectures: what the build holds code for, such as "sm_90". host memory in bytes. packages: versions by name.
    """

    python: tuple[int, int, int]
    system: str
    torch: str
    torch_cuda: str | None
    hip: str | None
    cuda_error: str
    driver: str | None
    driver_cuda: tuple[int, int] | None
    seen_gpus: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    architectures: tuple[str, ...]
    triton: str | None
    triton_wanted: str | None
    memory: int | None
    free_memory: int | None
    cores: int
    threads: int
    packages: Mapping[str, str | None]
    variables: Mapping[str, str]
    backends: Mapping[str, Mapping[str, BackendStatus]]


def gather() -> Facts:
    """The facts of this machine. Asks the driver (`nvidia-smi`, 20 s at most); nothing is allocated on a GPU."""
    seen, driver, driver_cuda = _from_driver()
    there = torch.cuda.is_available()
    error = ""
    if not there and torch.version.cuda is not None:
        try:
            torch.cuda.init()
        # what torch says is the fact
        except Exception as raised:
            error = str(raised).splitlines()[0]
    gpus = []
    for index in range(torch.cuda.device_count() if there else 0):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), total, free))
    total, available = _host_memory()
    devices = ["cpu", *(["cuda"] if there else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    return Facts(
        python=sys.version_info[:3],
        system=f"{platform.system()} {platform.machine()}",
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        hip=torch.version.hip,
        cuda_error=error,
        driver=driver,
        driver_cuda=driver_cuda,
        seen_gpus=seen,
        gpus=tuple(gpus),
        architectures=tuple(torch.cuda.get_arch_list()) if there else (),
        triton=_version("triton"),
        triton_wanted=_triton_wanted(),
        memory=total,
        free_memory=available,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        packages={name: _version(name) for names in EXTRAS.values() for name in names},
        variables={name: os.environ[name] for name in SLOW_VARIABLES if name in os.environ},
        backends={device: backends(device) for device in devices},
    )


def _from_driver() -> tuple[tuple[str, ...], str | None, tuple[int, int] | None]:
    """Names of GPUs, the driver's version and the CUDA version it goes up to."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), None, None
    try:
        text = subprocess.run([program], capture_output=True, text=True, check=False, timeout=20).stdout
        names = subprocess.run([program, "-L"], capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return (), None, None
    driver, cuda = re.search(r"Driver Version:\s*([\d.]+)", text), re.search(r"CUDA Version:\s*(\d+)\.(\d+)", text)
    return (
        tuple(re.findall(r"^GPU \d+: (.*?) \(UUID", names, re.MULTILINE)),
        driver[1] if driver else None,
        (int(cuda[1]), int(cuda[2])) if cuda else None,
    )


def _host_memory() -> tuple[int | None, int | None]:
    """Bytes of memory, in all and available; None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = dict(re.findall(r"^(\w+):\s+(\d+) kB", file.read(), re.MULTILINE))
        return 1024 * int(found["MemTotal"]), 1024 * int(found["MemAvailable"])
    except (OSError, KeyError):
        return None, None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _triton_wanted() -> str | None:
    """The version of Triton that the installed torch asks for; None for builds that ask for none, or not exactly."""
    found = [re.match(r"triton\s*\(?==\s*([\w.]+)", wanted) for wanted in metadata.requires("torch") or ()]
    return next((match[1] for match in found if match), None)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.11.0+cu130" is (2, 11, 0)."""
    return tuple(int(part) for part in re.match(r"\d*(?:\.\d+)*", version)[0].split(".") if part)


def judge_facts(facts: Facts) -> list[Verdict]:
    """One verdict a fact, in the order of a chain where each rests on those before."""
    return [
        verdict
        for judge in (_python, _torch, _cuda, _build, _triton, _memory, _backends, _variables, _threads, _extras)
        for verdict in judge(facts)
    ]


def _python(facts: Facts) -> Iterator[Verdict]:
    version = ".".join(map(str, facts.python))
    if facts.python[:2] < OLDEST_PYTHON:
        yield Verdict(
            Level.PROBLEM,
            "Python is too old",
            f"Python {version}; vmamba needs 3.10 or newer.",
            "Make a new environment with a newer Python.",
        )
    else:
        yield Verdict(Level.OK, "Python", f"Python {version} on {facts.system}.")


def _torch(facts: Facts) -> Iterator[Verdict]:
    if numbers(facts.torch)[:2] < OLDEST_TORCH:
        yield Verdict(
            Level.PROBLEM,
            "torch is too old",
            f"torch {facts.torch}; vmamba needs 2.10 or newer.",
            "pip install --upgrade torch",
        )
    else:
        built = (
            f"for CUDA {facts.torch_cuda}" if facts.torch_cuda else f"for ROCm {facts.hip}" if facts.hip else "no CUDA"
        )
        yield Verdict(Level.OK, "torch", f"torch {facts.torch} ({built}).")


def _cuda(facts: Facts) -> Iterator[Verdict]:
    gpus = ", ".join(gpu.name for gpu in facts.gpus)
    driver = f"driver {facts.driver}" if facts.driver else "its driver"
    up_to = f"{driver}, which goes up to CUDA {'.'.join(map(str, facts.driver_cuda))}" if facts.driver_cuda else driver
    if facts.gpus:
        yield Verdict(Level.OK, "GPU", f"{gpus}; {up_to}.")
    elif not facts.seen_gpus:
        yield Verdict(Level.OK, "GPU", "No NVIDIA GPU here; everything runs on the CPU.")
    elif facts.variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return  # told with the variables
    elif facts.torch_cuda is None:
        yield Verdict(
            Level.PROBLEM,
            "torch without CUDA",
            f"There is a GPU ({', '.join(facts.seen_gpus)}), and torch {facts.torch} is a build without CUDA: training "
            "runs on the CPU.",
            "Install a CUDA build of torch: see the selector on pytorch.org for the index of your CUDA version.",
        )
    elif facts.driver_cuda is not None and facts.driver_cuda[0] < numbers(facts.torch_cuda)[0]:
        yield Verdict(
            Level.PROBLEM,
            "driver is too old",
            f"torch was built for CUDA {facts.torch_cuda}, and {up_to}: {facts.cuda_error or 'CUDA does not start'}.",
            f"Update the NVIDIA driver, or install torch built for CUDA {facts.driver_cuda[0]}.",
        )
    else:
        yield Verdict(
            Level.PROBLEM,
            "CUDA does not start",
            f"The driver lists {', '.join(facts.seen_gpus)}; torch cannot use it: {facts.cuda_error or 'no reason'}.",
            "Restart after an update of the driver; in a container, start it with access to the GPU (--gpus all).",
        )


def _build(facts: Facts) -> Iterator[Verdict]:
    """Whether the build has code for the GPU: binary code serves the same major capability, PTX all newer ones."""
    for gpu in facts.gpus if facts.torch_cuda else ():
        codes = [re.match(r"(sm|compute)_(\d+)(\d)", name) for name in facts.architectures]
        codes = [(code[1], (int(code[2]), int(code[3]))) for code in codes if code]
        fits = any(
            capability <= gpu.capability and (kind == "compute" or capability[0] == gpu.capability[0])
            for kind, capability in codes
        )
        if codes and not fits:
            yield Verdict(
                Level.PROBLEM,
                "torch build does not fit the GPU",
                f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, and torch {facts.torch} "
                f"holds code for {', '.join(facts.architectures)}.",
                "Install a build of torch for this GPU: a newer one for a new GPU, an older CUDA for an old one.",
            )


def _triton(facts: Facts) -> Iterator[Verdict]:
    if facts.triton is None:
        if facts.gpus and facts.torch_cuda:
            yield Verdict(
                Level.WARNING,
                "no Triton",
                "Triton is not installed, so there are no kernels for the GPU.",
                f"pip install triton{f'=={facts.triton_wanted}' if facts.triton_wanted else ''}",
            )
        return
    if facts.triton_wanted is not None and numbers(facts.triton)[:2] != numbers(facts.triton_wanted)[:2]:
        yield Verdict(
            Level.WARNING,
            "Triton does not fit torch",
            f"Triton {facts.triton} is installed, and torch {facts.torch} belongs with {facts.triton_wanted}: "
            "torch.compile and kernels may fail.",
            f"pip install triton=={facts.triton_wanted}",
        )
    else:
        yield Verdict(Level.OK, "Triton", f"Triton {facts.triton}, as torch {facts.torch} wants it.")


def _memory(facts: Facts) -> Iterator[Verdict]:
    places = [("host", facts.free_memory, facts.memory)]
    places += [(f"GPU {i} ({gpu.name})", gpu.free, gpu.memory) for i, gpu in enumerate(facts.gpus)]
    for place, free, total in places:
        if free is None or total is None:
            continue
        text = f"{place}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        figures = {"place": place, "free": free, "total": total}
        if free < LEAST_FREE_GIB * 2**30:
            yield Verdict(
                Level.WARNING,
                "little memory",
                f"{text}.",
                "See with nvidia-smi or top who holds it: often an earlier training that did not end.",
                figures,
            )
        else:
            yield Verdict(Level.OK, "memory", f"{text}.", figures=figures)


def _backends(facts: Facts) -> Iterator[Verdict]:
    for device, statuses in facts.backends.items():
        chosen = next(name for name, status in statuses.items() if status.chosen)
        over = "; ".join(f"{name}: {status.reason}" for name, status in statuses.items() if not status.available)
        figures = {"device": device, "backend": chosen}
        if device == "cuda" and chosen != "triton":
            yield Verdict(
                Level.WARNING,
                "slow portable backend",
                f"On the GPU the scans run on the {chosen!r} backend, plain PyTorch, many times slower than the "
                f"kernels ({over}).",
                "Install Triton as it belongs with this torch; the lines above say which.",
                figures,
            )
        else:
            yield Verdict(
                Level.OK, "backend", f"On {device} runs {chosen!r}{f' ({over})' if over else ''}.", figures=figures
            )


def _variables(facts: Facts) -> Iterator[Verdict]:
    # hidden GPUs are news only where there are GPUs
    return slow_variables({n: v for n, v in facts.variables.items() if n != "CUDA_VISIBLE_DEVICES" or facts.seen_gpus})


def slow_variables(variables: Mapping[str, str]) -> Iterator[Verdict]:
    """Of these variables of the environment, those that make a training slow."""
    for name, value in variables.items():
        when, effect = SLOW_VARIABLES.get(name, (lambda _: False, ""))
        if when(value):
            yield Verdict(
                Level.WARNING,
                "slow by environment variable",
                f"{name}={value!r} is set: {effect}.",
                f"unset {name}, unless you are looking for an error with it",
                {"variable": name, "value": value},
            )


def _threads(facts: Facts) -> Iterator[Verdict]:
    text = f"torch computes with {facts.threads} of {facts.cores} processors"
    if facts.threads > facts.cores:
        yield Verdict(
            Level.WARNING,
            "more threads than processors",
            f"{text}: they wait for each other.",
            f"Set run.threads={facts.cores}, or OMP_NUM_THREADS={facts.cores}.",
        )
    elif facts.threads < facts.cores and not facts.gpus:
        yield Verdict(
            Level.WARNING,
            "processors are idle",
            f"{text}, and there is no GPU.",
            f"Unset OMP_NUM_THREADS, or set run.threads={facts.cores}.",
        )
    else:
        yield Verdict(Level.OK, "threads", f"{text}.")


def _extras(facts: Facts) -> Iterator[Verdict]:
    parts = []
    for extra, names in EXTRAS.items():
        missing = [name for name in names if facts.packages[name] is None]
        versions = ", ".join(f"{name} {facts.packages[name]}" for name in names if facts.packages[name])
        if not missing:
            parts.append(f"{extra} ({versions})")
        elif versions:
            parts.append(f"{extra} in part ({versions}; without {', '.join(missing)})")
        else:
            parts.append(f"no {extra}")
    yield Verdict(
        Level.OK,
        "extras",
        f"{'; '.join(parts)}. pip install 'vmamba[NAME]'.",
        figures={"packages": dict(facts.packages)},
    )


def _no_facts(asked: Failed | Stalled, seconds: float) -> Verdict:
    if isinstance(asked, Failed):
        what = f"failed: {asked.error}"
    else:
        what = f"was not done after {seconds:g} s; it was in {innermost(asked.stacks)}"
    return Verdict(
        Level.PROBLEM,
        "machine does not answer",
        f"Asking for versions and devices {what}.",
        "Mostly the GPU's driver hangs or is broken: see nvidia-smi and dmesg, and restart the machine. With "
        "CUDA_VISIBLE_DEVICES= (set, and empty) the CPU is examined alone.",
    )


def judge_backend(backend: str, device: str, seconds: float = PROBE_SECONDS) -> Verdict:
    """Hold one backend to the fp64 reference in a process of its own: forward and all gradients."""
    name, subject = "self-test", f"Backend {backend!r} on {device}"
    dtypes = ("float32", "bfloat16") if device == "cuda" else ("float32",)
    result = run_with_limit(self_test, backend, device, dtypes, seconds=seconds)
    figures: dict[str, Any] = {"backend": backend, "device": device}
    another = "Update torch and Triton together. Until then ss2d(..., backend='portable') computes on any device."
    if isinstance(result, Finished):
        wrong = [text for right, text in result.value if not right]
        figures["results"] = [text for _, text in result.value]
        if not wrong:
            return Verdict(Level.OK, name, f"{subject}: {'; '.join(figures['results'])}.", figures=figures)
        return Verdict(Level.PROBLEM, "backend is wrong", f"{subject}: {'; '.join(wrong)}.", another, figures)
    if isinstance(result, Failed):
        return Verdict(Level.PROBLEM, "backend fails", f"{subject}: {result.error}.", another, figures)
    return Verdict(
        Level.PROBLEM,
        "backend hangs",
        f"{subject} was not done after {seconds:g} s; it was in {innermost(result.stacks)}.",
        another,
        figures,
    )


def self_test(backend: str, device: str, dtypes: tuple[str, ...]) -> list[tuple[bool, str]]:
    """For every dtype whether the backend is right, and by how much."""
    from ..ops.judge import judge

    found = [judge(backend, device, getattr(torch, dtype)) for dtype in dtypes]
    return [(verdict.right, str(verdict)) for verdict in found]


def innermost(stacks: str) -> str:
    """The line that a process was in, from the stacks of its threads, the calling one last."""
    from .watcher import threads_of

    frames = list(threads_of(stacks).values())
    return frames[-1][0] if frames and frames[-1] else "an unknown place"


def judge_speed(device: str, seconds: float = PROBE_SECONDS) -> list[Verdict]:
    """Measure the chosen backend on `device` in a process of its own, and hold it to what this hardware should give."""
    result = run_with_limit(measure, device, torch.get_num_threads(), seconds=seconds)
    if isinstance(result, Finished):
        return speed_verdicts(result.value)
    if isinstance(result, Failed):
        what, remedy = f"failed: {result.error}", "See the self-test above; `vmamba bench --op` shows the whole error."
    else:
        what = f"was not done after {seconds:g} s; it was in {innermost(result.stacks)}"
        remedy = "Is the machine busy with something else? `vmamba bench --op` measures without a limit."
    return [Verdict(Level.WARNING, "speed is unknown", f"Measuring the scan on {device} {what}.", remedy)]


def speed_verdicts(speed: Speed) -> list[Verdict]:
    """What the figures say, of forward, backward, and how backward grows with L."""
    found = []
    for work, took, floor, expected in (
        ("forward", speed.forward, speed.forward_floor, speed.expected[0]),
        ("backward", speed.backward, speed.backward_floor, speed.expected[1]),
    ):
        text = (
            f"{work.capitalize()} of the scan on {speed.device} ({speed.backend!r}, {speed.shape}): "
            f"{1000 * took:.3g} ms, "
            f"{took / floor:.3g} times what its bytes take at {speed.bandwidth / 1e9:.3g} GB/s; usual is {expected:g}"
        )
        figures = {"seconds": took, "floor": floor, "usual": expected * floor, "bandwidth": speed.bandwidth}
        if took > speed.TOO_SLOW * expected * floor:
            found.append(
                Verdict(
                    Level.WARNING,
                    f"slow {work}",
                    f"{text}.",
                    "Is the machine busy or throttled, or a profiler on? `vmamba bench --op` shows all stages.",
                    figures,
                )
            )
        else:
            found.append(Verdict(Level.OK, f"speed of {work}", f"{text}.", figures=figures))
    times = ", ".join(f"{1000 * t:.3g}" for t in speed.times)
    text = (
        f"Backward at L = {', '.join(map(str, speed.lengths))} takes {times} ms: it grows as L^{speed.exponent:.2f} "
        f"on {speed.device}"
    )
    figures = {"lengths": speed.lengths, "seconds": speed.times, "exponent": speed.exponent}
    if speed.exponent > speed.SUPERLINEAR:
        found.append(
            Verdict(
                Level.PROBLEM,
                "backward grows faster than linearly",
                f"{text}.",
                "The scan's backward is linear; something else runs in its place. The lines above name the backend.",
                figures,
            )
        )
    else:
        found.append(Verdict(Level.OK, "backward is linear in L", f"{text}.", figures=figures))
    return found


def examine_environment(
    device: str = "auto", *, seconds: float = PROBE_SECONDS, progress: Callable[[str], None] = lambda message: None
) -> list[Verdict]:
    """All of it: facts, self-tests of every available backend, speed. Nothing takes longer than its limit.

    Args:
        device: "cpu" or "cuda" restricts self-tests and speed to one; "auto" is all that there are.
        seconds: the limit of every probe.

    Raises:
        ValueError: there is no such device here.
    """
    progress("looking at versions and devices")
    # a driver that hangs takes whoever asks it with it
    asked = run_with_limit(gather, seconds=seconds)
    if not isinstance(asked, Finished):
        return [_no_facts(asked, seconds)]
    facts = asked.value
    devices = [name for name in facts.backends if name in ("cpu", "cuda")]
    if device != "auto":
        if device not in devices:
            raise ValueError(f"device {device!r}: this machine has {', '.join(devices)}")
        devices = [device]
    verdicts = judge_facts(facts)
    for place in devices:
        for backend, status in facts.backends[place].items():
            if status.available:
                progress(f"self-test of {backend} on {place}")
                verdicts.append(judge_backend(backend, place, seconds))
        progress(f"speed on {place}")
        verdicts += judge_speed(place, seconds)
    return verdicts
