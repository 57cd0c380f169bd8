"""Custom autograd functions: does each backward compute the derivative of its forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .patient import Patient
from .verdict import Level, Verdict
from .watching import Watch, custom_function, named, tensors_of
from .wording import listed, number

__all__ = ["examine_custom_functions"]


@dataclass(frozen=True)
class _Accuracy:
    """For a dtype: the two steps of the differences, relative to what is stepped along, and the error allowed."""

    dtype: torch.dtype
    steps: tuple[float, float]
    tolerance: float


ACCURACIES = (_Accuracy(torch.float64, (1e-5, 1e-6), 1e-2), _Accuracy(torch.float32, (2e-2, 1e-2), 0.1))
DIRECTIONS = 2
# differences with the two steps that differ by more than this say that there is no derivative
CONSISTENT = 0.05


@dataclass
class _Call:
    """One call of a function: its arguments, detached copies of the tensors among them, and in which module."""

    function: type[Function]
    module: str
    arguments: tuple[Any, ...]
    wants: tuple[bool, ...]


@dataclass
class _Comparison:
    """Along random directions in one input: what the function's output does, what its gradient says, and by how much
    rounding can have moved the former."""

    differences: list[tuple[float, float]] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    noise: float = 0.0


def examine_custom_functions(patient: Patient) -> list[Verdict]:
    """Finite differences along random directions, in float64 where the function takes it, else in float32."""
    with Watch(patient.subject, patient.position) as watch:
        watch.forward()
        functions = {custom_function(node) for node in watch.owners} - {None}
    if not functions:
        return []
    patient.seed()
    calls: dict[type[Function], _Call] = {}
    with contextlib.ExitStack() as stack:
        for function in functions:
            stack.enter_context(_recorded(function, calls, patient))
        # the watch notes in which module we are
        with Watch(patient.subject, patient.position) as watch:
            watch.forward()
    wrong, right, unchecked = [], [], []
    for function, call in sorted(calls.items(), key=lambda item: item[0].__qualname__):
        patient.position.note("backward", f"{call.module}|{function.__qualname__}")
        comparisons = _compared(call) if patient.has_time() else None
        if comparisons is None:
            unchecked.append(function.__qualname__)
            continue
        found = [_judge(call, index, *comparison) for index, comparison in comparisons.items()]
        wrong += [verdict for verdict in found if verdict is not None]
        right.append(function.__qualname__)
    if wrong:
        return wrong
    notes = f"; not checked: {listed(unchecked)}" if unchecked else ""
    checked = f"The gradients of {listed(right)} agree with finite differences" if right else "None could be checked"
    return [Verdict(Level.OK, "custom functions", f"{checked}{notes}.", figures={"checked": right})]


@contextlib.contextmanager
def _recorded(function: type[Function], calls: dict[type[Function], _Call], patient: Patient) -> Iterator[None]:
    """Keep the arguments of the first call. It is `forward` that is replaced: many keep `apply` under another name."""
    own, forward = "forward" in vars(function), function.forward
    has_context = function.setup_context is Function.setup_context
    descriptor = vars(function).get("forward")

    def recording(*arguments: Any) -> Any:
        given = arguments[1:] if has_context else arguments
        if function not in calls:
            wants = tuple(isinstance(a, Tensor) and a.is_floating_point() and a.requires_grad for a in given)
            copies = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in given)
            calls[function] = _Call(function, patient.position.read().where, copies, wants)
        return forward(*arguments)

    function.forward = staticmethod(recording)
    try:
        yield
    finally:
        if own:
            function.forward = descriptor
        else:
            del function.forward


def _compared(call: _Call) -> dict[int, tuple[_Comparison, _Accuracy]] | None:
    """For each differentiable input the comparison; None where the function takes neither dtype."""
    for accuracy in ACCURACIES:
        try:
            return {i: (c, accuracy) for i, c in _compare(call, accuracy).items()}
        except Exception:  # a kernel for one dtype only raises what it likes; the next one is tried
            continue
    return None


def _compare(call: _Call, accuracy: _Accuracy) -> dict[int, _Comparison]:
    def prepared(argument: Any, wants: bool) -> Any:
        if not isinstance(argument, Tensor) or not argument.is_floating_point():
            return argument
        return argument.to(accuracy.dtype).requires_grad_(wants)

    inputs = [prepared(a, w) for a, w in zip(call.arguments, call.wants, strict=True)]
    generator = torch.Generator().manual_seed(0)

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device, tensor.dtype)

    def outputs(changed: dict[int, Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        given = [changed.get(i, value) for i, value in enumerate(inputs)]
        # a function may write into what it is given
        made = call.function.apply(*(v.clone() if isinstance(v, Tensor) else v for v in given))
        return [t for t in tensors_of(made) if t.is_floating_point()]

    first = outputs({})
    taken = [i for i, t in enumerate(first) if t.requires_grad]
    weights = {i: like(first[i]).double() for i in taken}

    def value(made: list[Tensor]) -> Tensor:
        return sum((made[i].double() * weights[i]).sum() for i in taken)

    wanted = [i for i, wants in enumerate(call.wants) if wants]
    gradients = torch.autograd.grad(value(first), [inputs[i] for i in wanted], allow_unused=True)
    compared = {}
    with torch.no_grad():
        for i, gradient in zip(wanted, gradients, strict=True):
            if gradient is None:
                continue  # said elsewhere
            # a sum of so much, rounded, over the smallest step
            terms = sum(float((first[j].double() * weights[j]).abs().sum()) for j in taken)
            noise = 10 * torch.finfo(accuracy.dtype).eps * terms / min(accuracy.steps)
            compared[i] = comparison = _Comparison(noise=noise)
            scale = float(inputs[i].abs().mean()) or 1.0
            for _ in range(DIRECTIONS):
                direction = like(inputs[i]) * scale
                comparison.gradients.append(float((gradient.double() * direction.double()).sum()))
                differences = []
                for step in accuracy.steps:
                    ahead, behind = (value(outputs({i: inputs[i] + s * direction})) for s in (step, -step))
                    differences.append(float(ahead - behind) / (2 * step))
                comparison.differences.append((differences[0], differences[1]))
    return compared


def _judge(call: _Call, index: int, comparison: _Comparison, accuracy: _Accuracy) -> Verdict | None:
    """A verdict where the gradient is wrong along every direction. Where the differences are 0 (rounding, signs) or do
    not settle there is no derivative, and the gradient is meant to be another."""
    worst = None
    for (coarse, fine), gradient in zip(comparison.differences, comparison.gradients, strict=True):
        size = max(abs(fine), abs(gradient))
        if fine == 0 or abs(coarse - fine) > CONSISTENT * max(abs(fine), abs(coarse)):
            return None
        if abs(fine - gradient) <= accuracy.tolerance * size + comparison.noise:
            return None
        worst = (fine, gradient)
    if worst is None:
        return None
    function, (change, gradient) = call.function.__qualname__, worst
    return Verdict(
        Level.PROBLEM,
        "custom function has a wrong gradient",
        f"{function} in {named(call.module)}: along a random direction in input {index} its output changes by "
        f"{number(change)}, its backward says {number(gradient)} ({number(gradient / change)} times as much).",
        f"Derive {function}.backward again and check it with torch.autograd.gradcheck in float64. If the gradient is "
        "meant to be another, as in gradient reversal, leave it.",
        {"function": function, "module": call.module, "input": index, "difference": change, "gradient": gradient},
    )
