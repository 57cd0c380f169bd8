"""Speed and memory of whole networks, ours and any other timm model, side by side in one run."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models as _registers_our_names  # noqa: F401
from ..models import VMamba
from ..models.variants import check_name
from ..ops.judge import Verdict, judge
from ..tasks.optimisation import check_optimizer, fuse, make_optimizer
from .measuring import (
    Measurement,
    Round,
    Stopwatch,
    as_current,
    checked_device,
    environment,
    free_memory,
    in_turn,
    numeric_flags,
    own_random_numbers,
)

__all__ = ["ModelReport", "ModelRow", "ModelSettings", "measure_models"]

TASKS = ("inference", "latency", "training")
MODES = ("eager", "compile", "graphs")
# (of the weights, of autocast)
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.float32, torch.bfloat16),
    "fp16": (torch.float32, torch.float16),
    "bf16-weights": (torch.bfloat16, None),
}
CHANNELS_LAST = ("auto", "on", "off")

# what is measured of each task when nobody says
_MODES_ON_CUDA = {"inference": ("eager", "compile"), "latency": MODES, "training": ("eager", "compile")}

# a network with that many convolutions wider than a pixel is a convolutional one
_CONVOLUTIONS_OF_A_CONVNET = 8


@dataclass(frozen=True)
class ModelSettings:
    """What to measure and how. `None` stands for the device's own default, which the report fills in.

    device: "auto" (CUDA where there is one), "cpu" or "cuda".
    tasks: some of `TASKS`.
        inference: forward of a batch. latency: forward of one image, from the call to the finished result.
        training: forward, cross-entropy and backward of a batch; with `optimizer` also its step.
    modes: some of `MODES`, for every task; None: eager on the CPU, eager and compiled on CUDA, for latency graphs too.
        graphs is torch.compile(mode="reduce-overhead").
    batch: images in a batch; None: 128 on CUDA, 8 on the CPU. size: height and width in pixels.
    dtype: one of `DTYPES`: fp32; bf16 or fp16, autocast over fp32 weights; bf16-weights. None: bf16 on CUDA, fp32 else.
    tf32: whether matrix products and convolutions in fp32 may use TF32.
    channels_last: one of `CHANNELS_LAST`; "auto": for convolutional networks (ours lays its tensors out itself).
    optimizer: the one whose step a training step includes, by timm's name (AdamW is fused on CUDA); None: none is.
    repeats: rounds, each measuring every model once; the figures are medians over them.
    round_seconds: about how long one model is measured in one round.

    Raises:
        ValueError: for a value that is none of these.
    """

    device: str = "auto"
    tasks: tuple[str, ...] = TASKS
    modes: tuple[str, ...] | None = None
    batch: int | None = None
    size: int = 224
    dtype: str | None = None
    tf32: bool = False
    channels_last: str = "auto"
    optimizer: str | None = None
    repeats: int = 7
    round_seconds: float = 0.3

    def __post_init__(self) -> None:
        for name, known in (("tasks", TASKS), ("modes", MODES)):
            for value in getattr(self, name) or ():
                _choice(name, value, known)
        if not self.tasks:
            raise ValueError(f"tasks must name at least one of {', '.join(TASKS)}")
        _choice("dtype", self.dtype, (None, *DTYPES))
        _choice("channels_last", self.channels_last, CHANNELS_LAST)
        if self.optimizer is not None:
            check_optimizer(self.optimizer)
        for name in ("batch", "size", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.modes and "graphs" in self.modes and checked_device(self.device).type != "cuda":
            raise ValueError("the mode graphs needs CUDA: leave it out, or choose a CUDA device")


@dataclass
class ModelRow:
    """One model at one task in one mode. Either `seconds` (a step) or `error` is set.

    peak_memory: bytes on the device while a step runs, of this model alone: weights, gradients, activations. None on
    the CPU, and for graphs, whose memory is taken once and kept.
    """

    task: str
    model: str
    mode: str
    batch: int
    channels_last: bool | None = None
    seconds: Measurement | None = None
    peak_memory: int | None = None
    error: str | None = None

    @property
    def images_per_second(self) -> float | None:
        return None if self.seconds is None else self.batch / self.seconds.median


@dataclass
class ModelReport:
    """Figures with the conditions they were taken under.

    `verdict` says whether the scan that our models use was right; where it was not the figures are invalid, and
    `relative` gives none.
    """

    settings: ModelSettings
    environment: dict[str, Any]
    verdict: Verdict
    rows: list[ModelRow] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        return self.verdict.right

    @property
    def baseline(self) -> str:
        """The model the others are compared with: the first."""
        return self.rows[0].model

    def relative(self, row: ModelRow) -> float | None:
        """Speed of `row` over that of the first model at the same task and mode; None if either has no valid figure."""
        first = next(r for r in self.rows if (r.model, r.task, r.mode) == (self.baseline, row.task, row.mode))
        if not self.valid or row.seconds is None or first.seconds is None:
            return None
        return first.seconds.median / row.seconds.median

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times in milliseconds, memory in GB of 1e9 bytes."""
        rows = []
        for row in self.rows:
            times = (None,) * 3 if row.seconds is None else (1000 * s for s in row.seconds)
            rows.append(
                {
                    "task": row.task,
                    "model": row.model,
                    "mode": row.mode,
                    "batch": row.batch,
                    "channels_last": row.channels_last,
                    **dict(zip(("median_ms", "low_ms", "high_ms"), times, strict=True)),
                    "images_per_second": row.images_per_second,
                    "peak_memory_gb": None if row.peak_memory is None else row.peak_memory / 1e9,
                    "relative": self.relative(row),
                    "error": row.error,
                }
            )
        return {
            "kind": "models",
            "valid": self.valid,
            "settings": asdict(self.settings),
            "environment": self.environment,
            "correctness": str(self.verdict),
            "baseline": self.baseline,
            "rows": rows,
        }


def measure_models(
    models: Sequence[str] | Mapping[str, nn.Module],
    settings: ModelSettings | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> ModelReport:
    """Measure networks side by side: of each task all models in turn, several rounds, medians.

    The scan is judged before anything is timed. Flags, random generators and the modules given are left as they were.

    Args:
        models: names that `timm.create_model` takes, with random weights; or modules by name for images of three
            channels, which are copied.
        settings: what and how.
        progress: told what happens, a line each time.

    Returns:
        a row for each task, model and mode. A model that fails (out of memory, does not compile) has the reason in its
        row.

    Raises:
        ValueError: no models, an unknown name, or settings that do not fit the device.
    """
    settings = settings or ModelSettings()
    device = checked_device(settings.device)
    settings = filled_in(settings, device)
    sources = dict(models) if isinstance(models, Mapping) else dict.fromkeys(models)
    if not sources:
        raise ValueError("name at least one model to measure")
    for name, module in sources.items():
        if module is None:
            check_name(name)
    facts = environment(device)
    weights, autocast = DTYPES[settings.dtype]
    with conditions(device, settings.tf32):
        progress("judging the scan")
        report = ModelReport(settings, facts, judge(facts["scan_backend"], device, autocast or weights))
        for task in settings.tasks:
            modes = settings.modes or (_MODES_ON_CUDA[task] if device.type == "cuda" else ("eager",))
            cases = {
                (task, name, mode): _Case(name, module, task, mode, settings, device)
                for name, module in sources.items()
                for mode in modes
            }
            results = in_turn(
                {key: case.prepare for key, case in cases.items()},
                settings.repeats,
                lambda message, task=task: progress(f"{task}: {message}"),
            )
            for key, case in cases.items():
                result = results[key]
                if isinstance(result, str):
                    case.row.error = result
                else:
                    case.row.seconds = result
                report.rows.append(case.row)
            free_memory()
    return report


@contextmanager
def conditions(device: torch.device, tf32: bool) -> Iterator[None]:
    """What figures are taken under: flags, random numbers, room for compiled cases; put back afterwards."""
    with as_current(device), numeric_flags(tf32), own_random_numbers(device), _compiles_every_case():
        yield


def measure_case(
    name: str, module: nn.Module | None, task: str, mode: str, settings: ModelSettings, device: torch.device
) -> ModelRow:
    """One model at one task in one mode, on its own, under the `conditions` that the caller has set.

    Args:
        name: what timm calls it, or of a `module`, which is copied, what it is called.
        task: one of `TASKS`. mode: one of `MODES`. settings: `filled_in` for `device`.

    Returns:
        the row; if it fails (out of memory, does not compile) with the reason.
    """
    case = _Case(name, module, task, mode, settings, device)
    result = in_turn({(name,): case.prepare}, settings.repeats, lambda message: None)[(name,)]
    if isinstance(result, str):
        case.row.error = result
    else:
        case.row.seconds = result
    free_memory()
    return case.row


class _Case:
    """One model at one task in one mode: makes the model, and the step that is timed."""

    def __init__(
        self, name: str, module: nn.Module | None, task: str, mode: str, settings: ModelSettings, device: torch.device
    ):
        self.module, self.settings, self.device = module, settings, device
        self.row = ModelRow(task, name, mode, batch=1 if task == "latency" else settings.batch)

    def prepare(self) -> Round:
        on_cuda = self.device.type == "cuda"
        gc.collect()
        held_before = torch.cuda.memory_allocated(self.device) if on_cuda else 0
        step = self._step()
        watch = Stopwatch(self.device)
        one_round = watch.rounds(step, self.settings.round_seconds, latency=self.row.task == "latency")
        if on_cuda and self.row.mode != "graphs":
            torch.cuda.reset_peak_memory_stats(self.device)
            step()
            watch.synchronize()
            self.row.peak_memory = torch.cuda.max_memory_allocated(self.device) - held_before
        return one_round

    def _step(self) -> Callable[[], object]:
        settings, row = self.settings, self.row
        size = (settings.size, settings.size)
        model = copy.deepcopy(self.module) if self.module is not None else make_model(row.model, size)
        model.zero_grad(set_to_none=True)  # gradients of a module given would count as memory of a step
        images = torch.randn(row.batch, 3, *size, device=self.device)
        row.channels_last = settings.channels_last == "on" or (
            settings.channels_last == "auto" and _is_convolutional(model)
        )
        layout = torch.channels_last if row.channels_last else torch.preserve_format
        weights, _ = DTYPES[settings.dtype]
        model = model.to(self.device, weights, memory_format=layout).train(row.task == "training")
        images = images.to(weights, memory_format=layout)
        network: Callable[[Tensor], Tensor] = model
        if row.mode != "eager":
            if isinstance(model, VMamba):
                with torch.set_grad_enabled(row.task == "training"), self._autocast():
                    model.compile_ahead(images)
            # sizes are fixed in a benchmark: one compilation for exactly this batch
            network = torch.compile(model, dynamic=False, mode="reduce-overhead" if row.mode == "graphs" else None)
        if row.task != "training":
            return self._forward(network, images)
        return self._training_step(model, network, images)

    def _forward(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], object]:
        @torch.no_grad()
        def step() -> None:
            self._begin()
            with self._autocast():
                network(images)

        return step

    def _training_step(
        self, model: nn.Module, network: Callable[[Tensor], Tensor], images: Tensor
    ) -> Callable[[], object]:
        classes = torch.zeros(len(images), dtype=torch.long, device=self.device)
        optimizer = None
        if self.settings.optimizer:
            # so small a rate that the weights stay what they are: the labels mean nothing
            optimizer = make_optimizer(model, self.settings.optimizer, lr=1e-8, weight_decay=0.05)
            fuse(optimizer)

        @torch.enable_grad()
        def step() -> None:
            self._begin()
            model.zero_grad(set_to_none=True)
            with self._autocast():
                loss = F.cross_entropy(network(images).float(), classes)
            loss.backward()
            if optimizer is not None:
                optimizer.step()

        return step

    def _begin(self) -> None:
        if self.row.mode == "graphs":
            # what the last replay returned may be overwritten
            torch.compiler.cudagraph_mark_step_begin()

    def _autocast(self) -> AbstractContextManager:
        _, dtype = DTYPES[self.settings.dtype]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


def _choice(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        listed = ", ".join(str(k) for k in known if k is not None)
        raise ValueError(f"{name}: unknown {value!r}; choose from {listed}")


def filled_in(settings: ModelSettings, device: torch.device) -> ModelSettings:
    """The settings with the device's own defaults where there is None."""
    on_cuda = device.type == "cuda"
    return replace(
        settings,
        device=str(device),
        batch=settings.batch or (128 if on_cuda else 8),
        dtype=settings.dtype or ("bf16" if on_cuda else "fp32"),
    )


def make_model(name: str, size: tuple[int, int], **options: Any) -> nn.Module:
    """A timm model with random weights for images of (H, W): some take the size as an argument, most take any size.

    Raises:
        ValueError: timm knows no such model.
    """
    check_name(name)
    if tuple(size) == timm.get_pretrained_cfg(name).input_size[-2:]:
        return timm.create_model(name, **options)
    try:
        return timm.create_model(name, img_size=tuple(size), **options)
    except TypeError:
        return timm.create_model(name, **options)


def _is_convolutional(model: nn.Module) -> bool:
    if isinstance(model, VMamba):
        return False
    wide = (m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1)
    return sum(1 for _ in wide) >= _CONVOLUTIONS_OF_A_CONVNET


def _compiles_every_case() -> AbstractContextManager:
    """Room for all cases in dynamo's cache, which holds 8 versions of a `forward`, models of one class together.

    Beyond that it would run them eagerly with a mere warning, and a figure would be of something else than it says.
    """
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True)
