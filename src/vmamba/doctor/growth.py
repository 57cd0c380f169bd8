"""How the work of each module grows with the length L of its input: loops that make backward quadratic.

Work is counted, not timed: the numbers that every operator reads and writes, views aside. A loaded machine does not
change the count, and a loop shows in it at lengths at which it does no harm yet.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

from .patient import Patient
from .subject import autocast
from .verdict import Level, Verdict
from .watching import LOSS, Watch, named, tensors_of
from .wording import listed, number

__all__ = ["examine_growth"]

# exponents: 1 is linear, 2 quadratic; at short lengths the linear part of a quadratic loop still weighs
SUPERLINEAR = 1.5
# a loop has as many more operators as L is longer
LOOP = 0.8
# what is less than this share of all work is left alone, and so is a loop of a few turns
SHARE, TURNS = 0.05, 100
# times of a loaded machine say little: seconds, and nearly quadratic
LONG_ENOUGH, SURELY_SUPERLINEAR = 1.0, 1.75
SAMPLES = 2
SHORTEST = 16


@dataclass
class _Work:
    """Of one length: numbers moved and operators run by each module, in the two directions, and seconds."""

    length: int
    moved: dict[str, Counter[str]] = field(default_factory=lambda: {"forward": Counter(), "backward": Counter()})
    operators: dict[str, Counter[str]] = field(default_factory=lambda: {"forward": Counter(), "backward": Counter()})
    seconds: dict[str, float] = field(default_factory=dict)


class _Count(TorchDispatchMode):
    """Books every operator to the module that runs."""

    def __init__(self, work: _Work) -> None:
        super().__init__()
        self.work = work
        self.direction = "forward"
        self.stack = [LOSS]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            owner = self.stack[-1]
            self.work.operators[self.direction][owner] += 1
            self.work.moved[self.direction][owner] += sum(t.numel() for t in tensors_of((args, result)))
        return result

    def before(self, name: str, *_: Any) -> None:
        self.stack.append(name)

    def after(self, *_: Any) -> None:
        self.stack.pop()

    def node(self, node: Node, owner: str, *_: Any) -> None:
        self.stack[-1] = owner


def examine_growth(patient: Patient) -> list[Verdict]:
    """Forward and backward of the model at several lengths of its input, from short to long while there is time."""
    inputs = _single_input(patient.subject.batch)
    if inputs is None:
        return _not_measured("the input is not one tensor")
    if inputs.ndim == 2 and inputs.is_floating_point():
        return _not_measured("vectors have no length")
    works: list[_Work] = []
    refused = "there was no time for a second length"
    for resized, length in _sizes(inputs):
        # quadratic: twice the length costs four times as much
        if works and not patient.has_time(sum(works[-1].seconds.values()) * (length / works[-1].length) ** 2 * 3):
            break
        patient.restore()
        try:
            works.append(_measure(patient, resized, length))
        except Exception as error:  # a model that takes one size only says so in its own way
            refused = f"at length {length} it raises {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if works:
                break
    if len(works) < 2:
        return _not_measured(refused)
    return _judge(patient.subject.model, works)


def _not_measured(why: str) -> list[Verdict]:
    return [Verdict(Level.OK, "growth with L", f"Not measured: {why}.")]


def _single_input(batch: Any) -> Tensor | None:
    inputs = batch[0] if isinstance(batch, list | tuple) and len(batch) == 2 else batch
    return inputs if isinstance(inputs, Tensor) and inputs.ndim >= 2 and len(inputs) else None


def _sizes(inputs: Tensor) -> Iterator[tuple[Tensor, int]]:
    """The first samples, at ever greater lengths: images (B, C, H, W) resized on both sides; sequences (B, L, ...) and,
    of tokens, (B, L) cut or repeated."""
    inputs = inputs[:SAMPLES].detach()
    if inputs.ndim == 4 and inputs.is_floating_point():
        for scale in (0.25, 0.5, 1, 2):
            size = [round(scale * side) for side in inputs.shape[2:]]
            if all(size):
                yield (inputs if scale == 1 else F.interpolate(inputs, size=size, mode="nearest")), math.prod(size)
    elif inputs.ndim in (2, 3):
        length = inputs.shape[1]
        # from far below, since a loop over a sixteenth of tens of thousands can take all the time there is
        for scale in (1 / 256, 1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2):
            wanted = round(scale * length)
            if wanted >= SHORTEST:
                yield torch.cat([inputs] * math.ceil(max(scale, 1)), dim=1)[:, :wanted], wanted


def _measure(patient: Patient, inputs: Tensor, length: int) -> _Work:
    work, subject = _Work(length), patient.subject
    patient.position.note("forward", f"|an input of length {length}")
    if subject.device.type == "cuda":  # kernels are compiled and algorithms chosen at a size that is met first
        _total(subject, inputs).backward()
        patient.restore()
    # once to time it, once to count
    _wait(subject.device)
    began = time.perf_counter()
    total = _total(subject, inputs)
    _wait(subject.device)
    work.seconds["forward"] = time.perf_counter() - began
    patient.position.note("backward", f"|an input of length {length}")
    total.backward()
    _wait(subject.device)
    work.seconds["backward"] = time.perf_counter() - began - work.seconds["forward"]
    patient.restore()
    count = _Count(work)
    with Watch(subject, patient.position, before=count.before, after=count.after) as watch, count:
        total = watch.made(lambda: _total(subject, inputs))
        count.direction, count.stack = "backward", [LOSS]
        watch.backward(total, before=count.node)
    return work


def _total(subject: Any, inputs: Tensor) -> Tensor:
    with autocast(subject.device, "fp32" if subject.precision == "fp16" else subject.precision):
        made = [t for t in tensors_of(subject.model(inputs)) if t.requires_grad]
    return sum(t.float().sum() for t in made)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _exponent(small: float, large: float, ratio: float) -> float:
    return math.log(large / small) / math.log(ratio) if small > 0 and large > 0 else 0.0


def _judge(model: nn.Module, works: list[_Work]) -> list[Verdict]:
    one, other = works[-2:]
    ratio = other.length / one.length
    # torch's own recurrent layers are loops inside
    recurrent = {name for name, module in model.named_modules() if isinstance(module, nn.RNNBase)}
    found, others = [], []
    lengths = [work.length for work in works]
    for direction in ("backward", "forward"):
        moved, operators = other.moved[direction], other.operators[direction]
        total = sum(moved.values())
        for owner in sorted(moved, key=lambda name: -moved[name]):
            if moved[owner] < SHARE * total or owner in recurrent or any(owner == v.figures["module"] for v in found):
                continue
            work = _exponent(one.moved[direction][owner], moved[owner], ratio)
            turns = _exponent(one.operators[direction][owner], operators[owner], ratio)
            figures = {
                "module": owner,
                "direction": direction,
                "exponent": work,
                "lengths": lengths,
                "moved": [w.moved[direction][owner] for w in works],
                "operators": [w.operators[direction][owner] for w in works],
                "seconds": [w.seconds[direction] for w in works],
            }
            if turns > LOOP and operators[owner] >= TURNS:
                found.append(_quadratic(figures) if work > SUPERLINEAR else _loop(figures))
            elif work > SUPERLINEAR:
                others.append(f"{named(owner)} {direction} as L^{number(work)}")
    if found:
        return found
    seconds = [sum(work.seconds.values()) for work in works]
    exponent = _exponent(seconds[-2], seconds[-1], ratio)
    if exponent > SURELY_SUPERLINEAR and seconds[-1] > LONG_ENOUGH and not others:
        return [_slow(exponent, lengths, seconds)]
    if others:
        message = f"Faster than linearly: {listed(others, 3)}, as attention does."
    else:
        message = f"No module's work grows faster than linearly between L = {lengths[0]} and {lengths[-1]}."
    return [Verdict(Level.OK, "growth with L", message, figures={"lengths": lengths, "seconds": seconds})]


def _quadratic(figures: dict[str, Any]) -> Verdict:
    times = ", ".join(f"{seconds:.2g}" for seconds in figures["seconds"])
    return Verdict(
        Level.PROBLEM,
        "quadratic loop",
        f"The {figures['direction']} pass of {named(figures['module'])} runs {figures['operators'][-1]} operators at "
        f"L = {figures['lengths'][-1]} and its work grows as L^{number(figures['exponent'])}: a Python loop that "
        f"touches the whole tensor at every step ({times} s at L = {listed([str(n) for n in figures['lengths']])}).",
        "Indexing x[:, i] in the loop makes backward fill a tensor of full size each time: take x.unbind(1) before the "
        "loop and torch.stack after it, which is linear; or call vmamba.ops.selective_scan, which has no loop.",
        figures,
    )


def _loop(figures: dict[str, Any]) -> Verdict:
    return Verdict(
        Level.WARNING,
        "Python loop over L",
        f"The {figures['direction']} pass of {named(figures['module'])} runs {figures['operators'][-1]} operators at "
        f"L = {figures['lengths'][-1]}, as many more as L is longer.",
        "Each costs microseconds whatever its size: replace the loop by one operator over the whole length, such as "
        "cumsum, a convolution or vmamba.ops.selective_scan.",
        figures,
    )


def _slow(exponent: float, lengths: list[int], seconds: list[float]) -> Verdict:
    times = ", ".join(f"{value:.2g}" for value in seconds)
    return Verdict(
        Level.WARNING,
        "grows faster than linearly",
        f"Forward and backward take {times} s at L = {listed([str(n) for n in lengths])}: as L^{number(exponent)}, "
        "inside an operator that hides what it does.",
        "Look at the module that the time verdict names first, and whether its operator has a faster implementation.",
        {"exponent": exponent, "lengths": lengths, "seconds": seconds},
    )
