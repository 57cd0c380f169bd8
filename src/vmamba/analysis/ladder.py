"""The acceleration ladder: VMamba-T from plain torch to the fused operator, and from the first network to the last.

Source: VMamba (arXiv 2401.10166v4), section 4.3, steps (a) to (g), and their figures on an A100.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..layers import SS2D
from ..models import VMambaConfig
from ..ops import backends
from ..ops.judge import Verdict, error, judge
from .complexity import Complexity, measure_complexity
from .measuring import checked_device, environment, reason
from .rungs import BackendRung, RungSS2D, on_rung
from .throughput import DTYPES, ModelRow, ModelSettings, conditions, filled_in, measure_case

__all__ = ["RUNGS", "LadderReport", "LadderRow", "Published", "Rung", "climb_ladder", "make_rung"]

TASKS = ("inference", "training")

# A layer on a rung may lose in fp32 what its longer chain of sums may, and in a half precision twice what the layer
# itself loses in it.
FP32_TOLERANCE = 1e-5
HALF_FACTOR = 2.0


@dataclass(frozen=True)
class Published:
    """The paper's figures: images a second on an A100 in fp32 with batch 128, ImageNet-1K top-1 or its change."""

    inference: int | None = None
    training: int | None = None
    top1: str = ""


@dataclass(frozen=True)
class Rung:
    """One step.

    name: ours. step: the paper's letter, "" where it has none. change: from the rung before. base: a named model, and
    changes: fields of `VMambaConfig` that differ from it. backend: how SS2D is computed; None: as the package does.
    """

    name: str
    step: str
    change: str
    base: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    backend: BackendRung | None = None
    published: Published = Published()


_VANILLA, _LAST = "vanilla_vmamba_tiny", "vmamba_tiny_s1l8"
_D = {"depths": (2, 2, 2, 2), "d_state": 16, "ssm_ratio": 2.0, "ssm_gate": True, "ssm_conv": 0}
_D_DEEPER = _D | {"depths": (2, 2, 5, 2), "ssm_ratio": 1.0}

RUNGS: tuple[Rung, ...] = (
    Rung(
        "plain",
        "vanilla",
        "plain torch: routes, einsum and a chunked scan in fp32",
        _VANILLA,
        backend=BackendRung("portable", low_precision=False, linear=False),
        published=Published(426, None, "82.2"),
    ),
    Rung(
        "triton",
        "(a)",
        "the scan in Triton, routes materialised",
        _VANILLA,
        backend=BackendRung("triton", low_precision=False, linear=False),
        published=Published(467, 165),
    ),
    Rung(
        "low",
        "(b)",
        "low precision in, fp32 state",
        _VANILLA,
        backend=BackendRung("triton", low_precision=True, linear=False),
        published=Published(464, 184),
    ),
    Rung(
        "linear",
        "(c)",
        "linear instead of einsum, no permutes",
        _VANILLA,
        backend=BackendRung("triton", low_precision=True, linear=True),
        published=Published(638, 195),
    ),
    Rung("fused", "", "ours: routes walked in place, one operator", _VANILLA),
    Rung(
        "d",
        "(d)",
        "MLP in, convolution out, depths 2,2,2,2",
        _LAST,
        _D,
        published=Published(813, None, "-0.6"),
    ),
    Rung("d+", "", "ssm-ratio 1, depths 2,2,5,2", _LAST, _D_DEEPER),
    Rung(
        "e",
        "(e)",
        "no gate",
        _LAST,
        _D_DEEPER | {"ssm_gate": False},
        published=Published(1179, None, "+0.6"),
    ),
    Rung(
        "f-",
        "",
        "N 1, ssm-ratio 2",
        _LAST,
        _D_DEEPER | {"ssm_gate": False, "d_state": 1, "ssm_ratio": 2.0},
    ),
    Rung("f", "(f)", "convolution back: VMamba-T[s2l5]", "vmamba_tiny_s2l5", published=Published(1340, 464, "82.5")),
    Rung("g", "(g)", "ssm-ratio 1, depths 2,2,8,2: VMamba-T[s1l8]", _LAST, published=Published(1686, 571, "82.6")),
)


def make_rung_config(rung: Rung) -> VMambaConfig:
    """The architecture of a rung."""
    return timm.create_model(rung.base, **rung.changes, device="meta").config


def make_rung(rung: Rung, **options: Any) -> nn.Module:
    """The network of a rung, with random weights; `options` go to `timm.create_model`."""
    model = timm.create_model(rung.base, **rung.changes, **options)
    return model if rung.backend is None else on_rung(model, rung.backend)


@dataclass
class LadderRow:
    """A rung with its figures. complexity: of the network for one image. measured: a row for each task and mode, as
    they are finished. unavailable: why the rung cannot be measured here, "" if it can.
    """

    rung: Rung
    complexity: Complexity
    measured: list[ModelRow] = field(default_factory=list)
    unavailable: str = ""

    def at(self, task: str, mode: str) -> ModelRow | None:
        return next((row for row in self.measured if (row.task, row.mode) == (task, mode)), None)


@dataclass
class LadderReport:
    """Rungs with the conditions that their figures were taken under.

    `verdict` says whether the scan that our models use was right; where it was not, nothing was measured.
    """

    settings: ModelSettings
    environment: dict[str, Any]
    verdict: Verdict
    rows: list[LadderRow]

    @property
    def valid(self) -> bool:
        return self.verdict.right

    def records(self) -> list[dict[str, Any]]:
        """A plain record for each rung, task and mode, measured, not yet measured, or unavailable with the reason."""
        return [
            _record(row, row.at(task, mode) or self._not_there(row, task, mode))
            for row in self.rows
            for task in self.settings.tasks
            for mode in self.settings.modes
        ]

    def _not_there(self, row: LadderRow, task: str, mode: str) -> ModelRow:
        return ModelRow(task, row.rung.name, mode, self.settings.batch, error=row.unavailable or "not measured")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times in milliseconds, memory in GB of 1e9 bytes."""
        return {
            "kind": "ladder",
            "valid": self.valid,
            "settings": asdict(self.settings),
            "environment": self.environment,
            "correctness": str(self.verdict),
            "rungs": [
                {
                    "name": row.rung.name,
                    "step": row.rung.step,
                    "change": row.rung.change,
                    **row.complexity._asdict(),
                    "published_a100_fp32": asdict(row.rung.published),
                    "unavailable": row.unavailable,
                    "measured": [_measured(case) for case in row.measured],
                }
                for row in self.rows
            ],
        }


def climb_ladder(
    settings: ModelSettings | None = None,
    rungs: Sequence[str] | None = None,
    *,
    time_limit: float | None = None,
    progress: Callable[[str], None] = lambda message: None,
    finished: Callable[[LadderReport], None] = lambda report: None,
) -> LadderReport:
    """Measure the rungs, inference and training, each on its own.

    The scan is judged first, then each rung's SS2D against the layer in fp64; a rung that is wrong is not timed. The
    fastest rungs are measured first, all of them in one mode before the next, so that what a time limit cuts off is
    the slowest. Flags and random generators are left as they were.

    Args:
        settings: tasks other than inference and training are not measured. `modes` None: eager, and on CUDA compiled.
        rungs: names out of `RUNGS`; None: all.
        time_limit: seconds after which no measurement begins any more.
        progress: told what happens, a line each time. finished: given the report after each measurement.

    Raises:
        ValueError: an unknown rung, or settings that do not fit the device.
    """
    start = time.monotonic()
    settings = settings or ModelSettings(tasks=TASKS, repeats=3)
    device = checked_device(settings.device)
    modes = settings.modes or (("eager", "compile") if device.type == "cuda" else ("eager",))
    tasks = tuple(task for task in settings.tasks if task in TASKS)
    if not tasks:
        raise ValueError(f"the ladder is measured in {' and '.join(TASKS)}, not in {', '.join(settings.tasks)}")
    settings = filled_in(replace(settings, modes=modes, tasks=tasks), device)
    chosen = _chosen(rungs)
    facts = environment(device)
    weights, autocast = DTYPES[settings.dtype]
    with conditions(device, settings.tf32):
        progress("judging the scan")
        verdict = judge(facts["scan_backend"], device, autocast or weights)
        rows = []
        for rung in chosen:
            progress(f"counting {rung.name}")
            rows.append(LadderRow(rung, _complexity(rung, settings.size), unavailable=_unavailable(rung, device)))
        report = LadderReport(settings, facts, verdict, rows)
        if not report.valid:
            return report
        for row in rows:
            if row.rung.backend is not None and not row.unavailable:
                progress(f"checking {row.rung.name}")
                row.unavailable = check_rung(row.rung.backend, device, autocast or weights)
        finished(report)
        for mode in modes:
            for row in reversed(rows):
                for task in () if row.unavailable else tasks:
                    case = ModelRow(task, row.rung.name, mode, settings.batch)
                    if time_limit is not None and time.monotonic() - start > time_limit:
                        case.error = f"not measured: the time limit of {time_limit:g} s was over"
                    else:
                        progress(f"{row.rung.name}: {task}, {mode} ({time.monotonic() - start:.0f} s)")
                        case = measure_case(row.rung.name, make_rung(row.rung), task, mode, settings, device)
                    row.measured.append(case)
                    finished(report)
    return report


def check_rung(rung: BackendRung, device: torch.device, dtype: torch.dtype) -> str:
    """Why a rung must not be timed on that device in that dtype, or "": its layer's output and gradients against fp64.

    In fp32 within `FP32_TOLERANCE`; in a half precision, under autocast, within `HALF_FACTOR` times what the layer as
    the package computes it loses.
    """
    try:
        exact = _layer_results(lambda layer: layer, torch.device("cpu"), torch.float64)
        half = dtype in (torch.bfloat16, torch.float16)
        allowed = FP32_TOLERANCE
        if half:
            own = _layer_results(lambda layer: layer, device, dtype)
            allowed = HALF_FACTOR * max(map(error, own, exact))
        found = _layer_results(lambda layer: RungSS2D(layer, rung), device, dtype if half else torch.float32)
        worst = max(map(error, found, exact))
    # a kernel can fail in any way: the other rungs are still to be measured
    except Exception as failure:
        return f"failed: {reason(failure)}"
    return "" if worst <= allowed else f"wrong: error {worst:.1e} > {allowed:.1e} against fp64"


def _layer_results(wrap: Callable[[SS2D], nn.Module], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y and the gradients of x and all parameters, on the CPU, of a small layer as the vanilla network's are."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        layer = SS2D(32, d_state=16, ssm_ratio=2.0, gate=True, conv_bias=True)
    x, gy = (torch.randn(2, 9, 14, 32, generator=generator) for _ in range(2))
    half = dtype in (torch.bfloat16, torch.float16)
    weights = torch.float32 if half else dtype
    module = wrap(copy.deepcopy(layer)).to(device, weights)
    x = x.to(device, weights).requires_grad_()
    with torch.enable_grad(), torch.autocast(device.type, dtype, enabled=half):
        y = module(x)
    gradients = torch.autograd.grad(y, [x, *module.parameters()], gy.to(device, y.dtype))
    return tuple(t.detach().cpu() for t in (y, *gradients))


def _chosen(names: Sequence[str] | None) -> list[Rung]:
    known = {rung.name: rung for rung in RUNGS}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"no rung {', '.join(unknown)}: there are {', '.join(known)}")
    return [rung for rung in RUNGS if names is None or rung.name in names]


def _complexity(rung: Rung, size: int) -> Complexity:
    # what the network is, not how it is computed: the rungs' own chains have copies and casts that count nothing
    return measure_complexity(timm.create_model(rung.base, **rung.changes, device="meta"), (1, 3, size, size))


def _unavailable(rung: Rung, device: torch.device) -> str:
    if rung.backend is None:
        return ""
    return backends(device)[rung.backend.scan].reason


def _record(row: LadderRow, case: ModelRow) -> dict[str, Any]:
    return {
        "rung": row.rung.name,
        "step": row.rung.step,
        "change": row.rung.change,
        **row.complexity._asdict(),
        **_measured(case),
        "published_images_per_second_a100_fp32": getattr(row.rung.published, case.task),
        "published_top1": row.rung.published.top1,
    }


def _measured(row: ModelRow) -> dict[str, Any]:
    times = (None,) * 3 if row.seconds is None else (1000 * s for s in row.seconds)
    return {
        "task": row.task,
        "mode": row.mode,
        "batch": row.batch,
        **dict(zip(("median_ms", "low_ms", "high_ms"), times, strict=True)),
        "images_per_second": row.images_per_second,
        "peak_memory_gb": None if row.peak_memory is None else row.peak_memory / 1e9,
        "error": row.error,
    }
