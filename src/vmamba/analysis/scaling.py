"""How cost and accuracy grow with the image: FLOPs, time and memory of networks side by side, and the slopes.

Source: VMamba (arXiv 2401.10166v4), the comparison of networks over input sizes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..models.variants import check_name
from ..ops.judge import Verdict, judge
from .complexity import Complexity, measure_complexity
from .measuring import checked_device, environment, reason
from .throughput import DTYPES, ModelRow, ModelSettings, conditions, filled_in, make_model, measure_case

__all__ = [
    "PUBLISHED_VMAMBA_T",
    "Accuracy",
    "ScalingReport",
    "ScalingRow",
    "Slope",
    "accuracy_by_size",
    "check_scaling",
    "fit_slope",
    "measure_scaling",
]

# VMamba-T[s1l8] as trained at 224 px: size -> images a second on an A100 at batch 32, ImageNet-1K top-1
PUBLISHED_VMAMBA_T = {
    224: (1490, 82.60),
    288: (947, 82.95),
    384: (566, 82.41),
    512: (340, 80.92),
    640: (214, 78.60),
    768: (149, 74.66),
}

BATCH_SIZE_AT = 224  # pixels at which a batch is `settings.batch`


@dataclass
class ScalingRow:
    """One model at one size at one task.

    complexity: for one image, or None where the model does not take that size. measured: time of a batch and memory.
    weight_bytes: of one parameter.
    """

    model: str
    size: int
    task: str
    complexity: Complexity | None
    measured: ModelRow
    weight_bytes: int = 4

    @property
    def milliseconds(self) -> float | None:
        """Of one image of the batch."""
        seconds = self.measured.seconds
        return None if seconds is None else 1000 * seconds.median / self.measured.batch

    @property
    def megabytes(self) -> float | None:
        """Of one image of the batch: what a step takes beyond weights and gradients, in 1e6 bytes. CUDA only."""
        peak = self.measured.peak_memory
        if peak is None or self.complexity is None:
            return None
        held = self.weight_bytes * self.complexity.parameters * (2 if self.task == "training" else 1)
        return max(0.0, peak - held) / 1e6 / self.measured.batch


class Slope(NamedTuple):
    """How fast a quantity grows with the pixels H*W: the exponent; 1 is linear, 2 quadratic.

    fit: least squares on log-log over all sizes. last: between the two largest sizes. sizes: how many there were.
    """

    model: str
    quantity: str
    fit: float
    last: float
    sizes: int


class Accuracy(NamedTuple):
    """Percent at one size, or why there is none."""

    size: int
    top1: float | None
    top5: float | None
    error: str = ""


@dataclass
class ScalingReport:
    """Figures with the conditions they were taken under. `rows` grow size by size; `accuracy` is added by the caller.

    `verdict` says whether the scan that our models use was right; where it was not, nothing was measured.
    """

    settings: ModelSettings
    environment: dict[str, Any]
    verdict: Verdict
    models: tuple[str, ...]
    sizes: tuple[int, ...]
    rows: list[ScalingRow] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        return self.verdict.right

    def points(self, model: str, quantity: str) -> list[tuple[int, float]]:
        """(size, value) of a model where there is a value. quantity: one of `quantities`."""
        kind, _, task = quantity.partition(" ")
        points = {}
        for row in self.rows:
            if row.model != model or (task and row.task != task):
                continue
            if kind == "macs":
                value = row.complexity and row.complexity.macs
            else:
                value = row.milliseconds if kind == "time" else row.megabytes
            if value:
                points[row.size] = value
        return sorted(points.items())

    @property
    def quantities(self) -> list[str]:
        """ "macs", and "time TASK" and "memory TASK" for each task."""
        return ["macs", *(f"{kind} {task}" for kind in ("time", "memory") for task in self.settings.tasks)]

    @property
    def slopes(self) -> list[Slope]:
        """Of every model and quantity that has two sizes or more."""
        found = []
        for quantity in self.quantities:
            for model in self.models:
                points = self.points(model, quantity)
                if len(points) >= 2:
                    found.append(Slope(model, quantity, fit_slope(points), fit_slope(points[-2:]), len(points)))
        return found

    def records(self) -> list[dict[str, Any]]:
        """A plain record for each row."""
        return [_record(row) for row in self.rows]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times and memory of one image, in milliseconds and 1e6 bytes."""
        return {
            "kind": "scaling",
            "valid": self.valid,
            "settings": asdict(self.settings),
            "environment": self.environment,
            "correctness": str(self.verdict),
            "models": list(self.models),
            "sizes": list(self.sizes),
            "rows": self.records(),
            "slopes": [slope._asdict() for slope in self.slopes],
            "accuracy": [entry._asdict() for entry in self.accuracy],
            "published_vmamba_tiny_s1l8": {
                str(size): {"images_per_second_a100_batch_32": speed, "top1": top1}
                for size, (speed, top1) in PUBLISHED_VMAMBA_T.items()
            },
        }


def fit_slope(points: Sequence[tuple[int, float]]) -> float:
    """Exponent e of value ~ (size * size)^e, by least squares on log-log over (size, value).

    Raises:
        ValueError: fewer than two different sizes.
    """
    xs = [2 * math.log(size) for size, _ in points]
    ys = [math.log(value) for _, value in points]
    mean_x, mean_y = sum(xs) / max(len(xs), 1), sum(ys) / max(len(ys), 1)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if not spread:
        raise ValueError("a slope needs at least two different sizes")
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def measure_scaling(
    models: Sequence[str] | Mapping[str, nn.Module],
    sizes: Sequence[int],
    settings: ModelSettings | None = None,
    *,
    time_limit: float | None = None,
    progress: Callable[[str], None] = lambda message: None,
    finished: Callable[[ScalingReport], None] = lambda report: None,
) -> ScalingReport:
    """FLOPs, time and memory of networks over image sizes, from the smallest size up.

    Batches hold about as many pixels at every size: `settings.batch` images at 224 px, at least one image.
    The scan is judged first. Flags, random generators and the modules given are left as they were.

    Args:
        models: names that timm knows, made anew for each size (`img_size` where they take it); or modules by name.
        sizes: height and width in pixels.
        settings: tasks other than inference and training are not measured; `modes`: one of them (None: eager);
            `size` has no meaning.
        time_limit: seconds after which no measurement begins any more; FLOPs are counted all the same.
        progress: told what happens, a line each time. finished: given the report after each measurement.

    Returns:
        a row for each size, model and task. One that fails (out of memory, a size that the model does not take) has
        the reason in its row.

    Raises:
        ValueError: no models or sizes, an unknown model, or settings that do not fit the device.
    """
    start = time.monotonic()
    settings = settings or ModelSettings(tasks=("inference", "training"), repeats=3)
    device = checked_device(settings.device)
    check_scaling(models, sizes, settings)
    modules = dict(models) if isinstance(models, Mapping) else dict.fromkeys(models)
    modes = settings.modes or ("eager",)
    settings = filled_in(replace(settings, modes=modes), device)
    facts = environment(device)
    weights, autocast = DTYPES[settings.dtype]
    with conditions(device, settings.tf32):
        progress("judging the scan")
        verdict = judge(facts["scan_backend"], device, autocast or weights)
        report = ScalingReport(settings, facts, verdict, tuple(modules), tuple(sorted(set(sizes))))
        if not report.valid:
            return report
        for size in report.sizes:
            at_size = replace(settings, size=size, batch=_batch(settings.batch, size))
            for name, module in modules.items():
                complexity, failure = _count(name, module, size)
                for task in settings.tasks:
                    row = ModelRow(task, name, modes[0], at_size.batch)
                    if failure:
                        row.error = failure
                    elif time_limit is not None and time.monotonic() - start > time_limit:
                        row.error = f"not measured: the time limit of {time_limit:g} s was over"
                    else:
                        progress(f"{name}: {size} px, {task} ({time.monotonic() - start:.0f} s)")
                        row = measure_case(name, module, task, modes[0], at_size, device)
                    report.rows.append(ScalingRow(name, size, task, complexity, row, weights.itemsize))
                    finished(report)
    return report


def check_scaling(
    models: Sequence[str] | Mapping[str, nn.Module], sizes: Sequence[int], settings: ModelSettings
) -> None:
    """Find out before anything is measured whether `measure_scaling` takes what it is asked for.

    Raises:
        ValueError: as `measure_scaling`.
    """
    if set(settings.tasks) - {"inference", "training"}:
        raise ValueError(f"scaling is measured in inference and training, not in {', '.join(settings.tasks)}")
    if settings.modes and len(settings.modes) != 1:
        raise ValueError(f"scaling is measured in one mode, not in {', '.join(settings.modes)}")
    if not models or not sizes:
        raise ValueError("name at least one model and one size")
    if min(sizes) < 1:
        raise ValueError(f"sizes must be positive, not {min(sizes)}")
    for name in models:
        if not isinstance(models, Mapping):
            check_name(name)


def accuracy_by_size(
    evaluate: Callable[[int], Mapping[str, float]],
    sizes: Sequence[int],
    progress: Callable[[str], None] = lambda message: None,
) -> list[Accuracy]:
    """Accuracy of one trained model over image sizes.

    Args:
        evaluate: given a size in pixels, gives "top1" and perhaps "top5" in percent.
        sizes: what to ask it for. One that it refuses with a ValueError (a model of a fixed size) or runs out of
            memory at has the reason.

    Raises:
        ValueError: no size could be measured; with the first reason.
    """
    entries = []
    for size in sorted(set(sizes)):
        progress(f"accuracy at {size} px")
        try:
            metrics = evaluate(size)
            entries.append(Accuracy(size, metrics["top1"], metrics.get("top5")))
        except (ValueError, torch.OutOfMemoryError) as error:
            entries.append(Accuracy(size, None, None, reason(error)))
    if entries and all(entry.top1 is None for entry in entries):
        raise ValueError(f"no size could be measured; at {entries[0].size} px: {entries[0].error}")
    return entries


def _batch(at_first: int, size: int) -> int:
    return max(1, round(at_first * BATCH_SIZE_AT**2 / size**2))


def _count(name: str, module: nn.Module | None, size: int) -> tuple[Complexity | None, str]:
    """Parameters and FLOPs for one image, and why there are none if there are none."""
    try:
        if module is None:
            with torch.device("meta"):
                module = make_model(name, (size, size))
        return measure_complexity(module, (1, 3, size, size)), ""
    # whatever a network raises at a size that it does not take: the others are still to be measured
    except Exception as error:
        return None, reason(error)


def _record(row: ScalingRow) -> dict[str, Any]:
    complexity, measured = row.complexity, row.measured
    times = (None, None) if measured.seconds is None else (1000 * s / measured.batch for s in measured.seconds[1:])
    return {
        "model": row.model,
        "size": row.size,
        "task": row.task,
        "mode": measured.mode,
        "batch": measured.batch,
        "parameters": complexity and complexity.parameters,
        "macs": complexity and complexity.macs,
        "flops": complexity and complexity.flops,
        "ms_an_image": row.milliseconds,
        **dict(zip(("low_ms_an_image", "high_ms_an_image"), times, strict=True)),
        "images_per_second": measured.images_per_second,
        "peak_memory_gb": None if measured.peak_memory is None else measured.peak_memory / 1e9,
        "memory_mb_an_image": row.megabytes,
        "error": measured.error,
    }
