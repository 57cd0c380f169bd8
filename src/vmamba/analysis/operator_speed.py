"""Speed of the 2-D scan alone, at the shapes of the four stages of VMamba-T, against the time its bytes must take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import backends, ss2d
from ..ops.judge import Verdict, judge
from .measuring import (
    Measurement,
    Round,
    Step,
    Stopwatch,
    as_current,
    checked_device,
    environment,
    free_memory,
    in_turn,
    numeric_flags,
    own_random_numbers,
)

__all__ = ["OperatorReport", "OperatorRow", "OperatorSettings", "measure_operator"]

PASSES = ("scan forward", "scan backward", "ss2d forward", "ss2d forward + backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUTES = "cross2d"
K = 4

# E / C by N: VMamba-T[s1l8] and the first VMamba-T
_SSM_RATIO = {1: 1, 16: 2}
# sets of inputs that are gone through in turn: batch 2 at 64 px would take 2,500 in stage 4 to outgrow an H100's cache
_MOST_SETS = 32
_STAGE_1_CHANNELS = 96


@dataclass(frozen=True)
class OperatorSettings:
    """What to measure and how. `None` stands for the device's own default, which the report fills in.

    device: "auto" (CUDA where there is one), "cpu" or "cuda".
    batch: images; None: 128 on CUDA, 1 on the CPU. size: pixels a side of the images that the network would get.
    d_state: N, 1 (shapes of VMamba-T[s1l8], E = C) or 16 (of the first VMamba-T, E = 2C).
    dtype: of x and p, "fp32", "bf16" or "fp16"; None: bf16 on CUDA, fp32 on the CPU. Weights are fp32.
    tf32: whether matrix products in fp32 may use TF32.
    repeats: rounds, each measuring every case once; the figures are medians over them.
    round_seconds: about how long one case is measured in one round.

    Raises:
        ValueError: for a value that is none of these.
    """

    device: str = "auto"
    batch: int | None = None
    size: int = 224
    d_state: int = 1
    dtype: str | None = None
    tf32: bool = False
    repeats: int = 7
    round_seconds: float = 0.1

    def __post_init__(self) -> None:
        if self.d_state not in _SSM_RATIO:
            raise ValueError(f"d_state must be one of {', '.join(map(str, _SSM_RATIO))}, not {self.d_state}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype: unknown {self.dtype!r}; choose from {', '.join(DTYPES)}")
        for name in ("batch", "size", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class Shape:
    """What the scan of one stage gets."""

    stage: int
    B: int
    H: int
    W: int
    E: int
    R: int
    N: int

    def __str__(self) -> str:
        return f"stage {self.stage}: {self.B} x {self.H} x {self.W} x {self.E}, N {self.N}, R {self.R}"

    def x_and_p(self) -> tuple[int, int]:
        """Numbers in x (and in y), and in p."""
        pixels = self.B * self.H * self.W
        return pixels * self.E, pixels * K * (self.R + 2 * self.N)


@dataclass
class OperatorRow:
    """One pass of one backend at one stage. Either `seconds` or `error` is set.

    floor: the seconds that reading each input once and writing each output once take at the bandwidth measured in the
    same run, for the scan alone; None for ss2d with its projection.
    """

    shape: Shape
    backend: str
    work: str
    floor: float | None
    seconds: Measurement | None = None
    error: str | None = None

    @property
    def fraction_of_floor(self) -> float | None:
        return None if self.floor is None or self.seconds is None else self.floor / self.seconds.median


@dataclass
class OperatorReport:
    """Figures with the conditions they were taken under. `bandwidth`: bytes a second, read and written together."""

    settings: OperatorSettings
    environment: dict[str, Any]
    bandwidth: float
    verdicts: dict[str, Verdict]
    rows: list[OperatorRow] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        return all(verdict.right for verdict in self.verdicts.values())

    @property
    def baseline(self) -> str:
        """The backend the others are compared with: the least preferred."""
        return list(self.verdicts)[-1]

    def speed_up(self, row: OperatorRow) -> float | None:
        """Time of the baseline over that of `row`; None if either has no valid figure, or one of the two is wrong."""
        if row.seconds is None or not (self.verdicts[row.backend].right and self.verdicts[self.baseline].right):
            return None
        base = next(r for r in self.rows if (r.shape, r.work, r.backend) == (row.shape, row.work, self.baseline))
        return None if base.seconds is None else base.seconds.median / row.seconds.median

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times in milliseconds, bandwidth in GB (1e9 bytes) a second."""
        rows = []
        for row in self.rows:
            times = (None,) * 3 if row.seconds is None else (1000 * s for s in row.seconds)
            rows.append(
                {
                    **asdict(row.shape),
                    "backend": row.backend,
                    "pass": row.work,
                    **dict(zip(("median_ms", "low_ms", "high_ms"), times, strict=True)),
                    "floor_ms": None if row.floor is None else 1000 * row.floor,
                    "fraction_of_floor": row.fraction_of_floor,
                    "speed_up": self.speed_up(row),
                    "valid": self.verdicts[row.backend].right,
                    "error": row.error,
                }
            )
        return {
            "kind": "operator",
            "valid": self.valid,
            "settings": asdict(self.settings),
            "environment": self.environment,
            "bandwidth_gb_per_second": self.bandwidth / 1e9,
            "correctness": {name: str(verdict) for name, verdict in self.verdicts.items()},
            "baseline": self.baseline,
            "rows": rows,
        }


def measure_operator(
    settings: OperatorSettings | None = None, progress: Callable[[str], None] = lambda message: None
) -> OperatorReport:
    """Measure every available backend's scan and whole `ss2d`, forward and backward, at the stages of VMamba-T.

    Every backend is judged before anything is timed. Flags and random generators are left as they were.

    On CUDA a sweep over several sets of inputs, together larger than the cache, is captured as a graph and replayed, so
    that neither the cache nor Python's own time is measured.

    Returns:
        a row for each stage, backend and pass. A backend that fails at one has the reason in its row.

    Raises:
        ValueError: settings that do not fit the device.
    """
    settings = settings or OperatorSettings()
    device = checked_device(settings.device)
    on_cuda = device.type == "cuda"
    settings = replace(
        settings,
        device=str(device),
        batch=settings.batch or (128 if on_cuda else 1),
        dtype=settings.dtype or ("bf16" if on_cuda else "fp32"),
    )
    dtype = DTYPES[settings.dtype]
    names = [name for name, status in backends(device).items() if status.available]
    facts = environment(device)
    with as_current(device), numeric_flags(settings.tf32), own_random_numbers(device), torch.no_grad():
        progress("judging the backends")
        verdicts = {name: judge(name, device, dtype) for name in names}
        progress("copying, for the bandwidth")
        report = OperatorReport(settings, facts, _bandwidth(device, settings.repeats), verdicts)
        for shape in _stages(settings):
            inputs = _Inputs(shape, dtype, device)
            results = in_turn(
                {
                    (f"stage {shape.stage}", backend, work): _preparation(inputs, backend, work, settings.round_seconds)
                    for backend in names
                    for work in PASSES
                },
                settings.repeats,
                lambda message: progress(f"operator: {message}"),
            )
            for (_, backend, work), result in results.items():
                floor = _floor_bytes(shape, dtype, work)
                row = OperatorRow(shape, backend, work, None if floor is None else floor / report.bandwidth)
                if isinstance(result, str):
                    row.error = result
                else:
                    row.seconds = result
                report.rows.append(row)
            del inputs
            free_memory()
    return report


def _stages(settings: OperatorSettings) -> list[Shape]:
    shapes = []
    side, C = math.ceil(settings.size / 4), _STAGE_1_CHANNELS
    for stage in range(1, 5):
        E = C * _SSM_RATIO[settings.d_state]
        shapes.append(Shape(stage, settings.batch, side, side, E, math.ceil(C / 16), settings.d_state))
        side, C = math.ceil(side / 2), 2 * C
    return shapes


def _floor_bytes(shape: Shape, dtype: torch.dtype, work: str) -> int | None:
    """Bytes of x, p and y once; backward: of gy, x and p, and of the gradients of x and p. Weights are next to none."""
    x, p = shape.x_and_p()
    numbers = {"scan forward": 2 * x + p, "scan backward": 3 * x + 2 * p}.get(work)
    return None if numbers is None else numbers * dtype.itemsize


def _bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second, read and written, of a copy far larger than any cache."""
    numbers = 2**29 if device.type == "cuda" else 2**26
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    one_round = Stopwatch(device).rounds(lambda: target.copy_(source), seconds=0.05)
    return 2 * source.nbytes / Measurement.of([one_round() for _ in range(repeats)]).median


class _Inputs:
    """Random inputs of one stage: so many sets that going through all of them leaves nothing in the cache.

    There are 32 at most: inputs smaller than 1/32 of a cache take the time of launches, not of their bytes.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        self.device = device
        B, H, W, E, R, N = shape.B, shape.H, shape.W, shape.E, shape.R, shape.N
        self.x_proj_weight = (torch.randn(K, R + 2 * N, E, device=device) * E**-0.5).to(dtype)
        self.weights = [
            torch.randn(K, E, R, device=device) * R**-0.5,
            2 * torch.rand(K, E, device=device) - 4,
            -torch.rand(K * E, N, device=device) - 0.5,
            torch.ones(K * E, device=device),
        ]
        x_numbers, p_numbers = shape.x_and_p()
        in_set = (2 * x_numbers + p_numbers) * dtype.itemsize
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self.sets = [
            (
                torch.randn(B, H, W, E, device=device).to(dtype),
                torch.randn(B, H, W, K * (R + 2 * N), device=device).to(dtype),
                torch.randn(B, H, W, E, device=device).to(dtype),
            )
            for _ in range(min(_MOST_SETS, 1 + 2 * cache // in_set))
        ]


def _preparation(inputs: _Inputs, backend: str, work: str, seconds: float) -> Callable[[], Round]:
    def prepare() -> Round:
        calls = [_call(inputs, x, p, gy, backend, work) for x, p, gy in inputs.sets]
        if inputs.device.type != "cuda":
            return Stopwatch(inputs.device).rounds(calls[0], seconds)
        one_sweep = Stopwatch(inputs.device).rounds(_captured(calls, inputs.device), seconds)
        return lambda: one_sweep() / len(calls)  # holds the calls, and with them the tensors that the graph reads

    return prepare


def _call(inputs: _Inputs, x: Tensor, p: Tensor, gy: Tensor, backend: str, work: str) -> Step:
    """One pass over one set of inputs."""
    scan, scan_backward = torch.ops.vmamba.ss2d_scan, torch.ops.vmamba.ss2d_scan_backward
    if work == "scan forward":
        return lambda: scan(x, p, *inputs.weights, ROUTES, backend, False)
    if work == "scan backward":
        _, states = scan(x, p, *inputs.weights, ROUTES, backend, True)
        return lambda: scan_backward(gy, x, p, *inputs.weights, states, ROUTES, backend)
    if work == "ss2d forward":
        return lambda: ss2d(x, inputs.x_proj_weight, *inputs.weights, routes=ROUTES, backend=backend)

    leaves = [t.detach().requires_grad_() for t in (x, inputs.x_proj_weight, *inputs.weights)]

    @torch.enable_grad()
    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ss2d(*leaves, routes=ROUTES, backend=backend), leaves, gy)

    return forward_and_backward


def _captured(calls: list[Step], device: torch.device) -> Step:
    """The calls, one after another, as one CUDA graph."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # a capture may not compile kernels or set up libraries
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # a capture that fails would leave its own stream the current one
    with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay
