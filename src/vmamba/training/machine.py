"""Where and how precisely to compute, and how much memory that took."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .._devices import choose_device, devices_here


@dataclass(frozen=True)
class Machine:
    """Device type and precision ("fp32", "tf32", "bf16", "fp16"), nothing "auto" left."""

    device: str
    precision: str


def choose_machine(device: str, precision: str) -> Machine:
    """Resolve "auto": a GPU where there is one, bf16 where a GPU has it in hardware.

    Raises:
        ValueError: the device asked for is not there.
    """
    there = devices_here()
    if device == "auto":
        device = choose_device(device)
    if device not in there:
        raise ValueError(f"run.device={device}: this machine has only {', '.join(reversed(there))}")
    if precision == "auto":
        has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    return Machine(device, precision)


@contextlib.contextmanager
def matrix_precision(precision: str) -> Iterator[None]:
    """fp32 matrix products and convolutions in TF32, unless ``precision`` is "fp32": then as exact as they come."""
    exact = precision == "fp32"
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager:
    """Autocast to the half precision ``precision`` on ``device``; nothing for "fp32" and "tf32"."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return contextlib.nullcontext() if half is None else torch.autocast(torch.device(device).type, dtype=half)


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """At most ``count`` CPU threads an operation; None leaves it to torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory(device: str) -> float | None:
    """The most memory taken so far, in GiB: on a GPU what was allocated, on a CPU what the process had resident.

    None where the system does not tell.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32" or device != "cpu":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
