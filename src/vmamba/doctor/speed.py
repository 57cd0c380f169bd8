"""How fast the scan is on this machine, against its bytes at the speed of a copy, and how backward grows with L."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops import backends

__all__ = ["Speed", "measure", "slope"]

ROUTES, K = "cross2d", 4
# stage 1 of VMamba-T[s1l8] at 224 px, and images that make a GPU busy
SIDE, CHANNELS, RANK = 56, 96, 6
IMAGES = {"cpu": 1, "cuda": 64}
SIDES = {"cpu": (28, 40, 56, 80), "cuda": (28, 56, 112, 168)}
ROUNDS = 7

# What forward and backward usually take, in times of their bytes' floor. The portable backend on the CPU goes some
# forty times through arrays of x's size: 50 and 74 to 64 and 92 measured with AVX-512 on two machines, 73 and 109 with
# two threads beside an H200. There the kernels, bound by three special functions a number, took 15.6 and 19.4
# (docs/results/h200_doctor.txt).
USUAL = {"cpu": (60.0, 90.0), "cuda": (16.0, 19.0)}


@dataclass(frozen=True)
class Speed:
    """Seconds of the best round of each; `times` are backward's at `lengths`, `exponent` their slope in logarithms.

    bandwidth: bytes a second, read and written, of a copy. expected: usual multiples of the floors of both passes.
    """

    # three times as slow as usual may be another machine; five times is something wrong
    TOO_SLOW: ClassVar[float] = 5.0
    # between linear, 1.0 to 1.2 where caches end, and quadratic, 2
    SUPERLINEAR: ClassVar[float] = 1.5

    device: str
    backend: str
    shape: str
    bandwidth: float
    forward: float
    forward_floor: float
    backward: float
    backward_floor: float
    expected: tuple[float, float]
    lengths: tuple[int, ...]
    times: tuple[float, ...]

    @property
    def exponent(self) -> float:
        return slope(self.lengths, self.times)


def slope(lengths: tuple[int, ...], times: tuple[float, ...]) -> float:
    """The exponent e of times ~ lengths^e, by least squares over the logarithms."""
    xs, ys = [math.log(length) for length in lengths], [math.log(t) for t in times]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def measure(device: str, threads: int) -> Speed:
    """Measure the backend that an automatic choice takes on `device`, with so many threads on the CPU.

    All cases are timed in turn and the best of their rounds counts: what else the machine does slows some rounds down,
    and rarely all.
    """
    torch.set_num_threads(threads)
    backend = next(name for name, status in backends(device).items() if status.chosen)
    source = torch.randn(2**24 if device == "cpu" else 2**27, device=device)
    target = torch.empty_like(source)
    cases: dict[object, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    with torch.no_grad():
        for side in SIDES[device]:
            forward, backward = _passes(device, backend, side)
            if side == SIDE:
                cases["forward"] = forward
            cases[side] = backward
        best = _best(cases, device)
    x, p = _numbers(device)
    bandwidth = 2 * source.nbytes / best["copy"]
    return Speed(
        device=device,
        backend=backend,
        shape=f"{IMAGES[device]} x {SIDE} x {SIDE} x {CHANNELS}, fp32",
        bandwidth=bandwidth,
        forward=best["forward"],
        forward_floor=4 * (2 * x + p) / bandwidth,
        backward=best[SIDE],
        backward_floor=4 * (3 * x + 2 * p) / bandwidth,
        expected=USUAL[device],
        lengths=tuple(side * side for side in SIDES[device]),
        times=tuple(best[side] for side in SIDES[device]),
    )


def _numbers(device: str) -> tuple[int, int]:
    """Numbers in x, and in p."""
    pixels = IMAGES[device] * SIDE * SIDE
    return pixels * CHANNELS, pixels * K * (RANK + 2)


def _passes(device: str, backend: str, side: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The scan's forward, and its backward, on random inputs of images of `side` x `side`."""
    size = (IMAGES[device], side, side)
    x, gy = torch.randn(*size, CHANNELS, device=device), torch.randn(*size, CHANNELS, device=device)
    p = torch.randn(*size, K * (RANK + 2), device=device)
    weights = [
        torch.randn(K, CHANNELS, RANK, device=device) * RANK**-0.5,
        2 * torch.rand(K, CHANNELS, device=device) - 4,
        -torch.rand(K * CHANNELS, 1, device=device) - 0.5,
        torch.ones(K * CHANNELS, device=device),
    ]
    scan, scan_backward = torch.ops.vmamba.ss2d_scan, torch.ops.vmamba.ss2d_scan_backward
    _, states = scan(x, p, *weights, ROUTES, backend, True)
    return (
        lambda: scan(x, p, *weights, ROUTES, backend, False),
        lambda: scan_backward(gy, x, p, *weights, states, ROUTES, backend),
    )


def _best(cases: Mapping[object, Callable[[], object]], device: str) -> dict[object, float]:
    from ..analysis.measuring import Stopwatch

    watch = Stopwatch(torch.device(device))
    for case in cases.values():
        case()
    rounds = [{name: watch.back_to_back(case, 1) for name, case in cases.items()} for _ in range(ROUNDS)]
    return {name: min(times[name] for times in rounds) for name in cases}
