"""The backward pass: does it run, is every gradient there, finite and of a sensible size."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .learning import has_learned, trial
from .losses import failure
from .patient import Patient
from .subject import Subject
from .verdict import Level, Verdict
from .watching import Watch, custom_function, named
from .wording import listed, number, plural

__all__ = ["examine_gradients", "explodes"]

# the norm of the whole gradient of a freshly initialised network is 1 to 100; beyond this clipping at the usual 1 to 5
# changes nearly every step
EXPLODING = 1e3
CLIPS = (5.0, 1.0, 0.1)
# of the largest norm: a branch that starts with a factor of a millionth is no alarm
VANISHING = 1e-9
# a layer that starts at zero holds the gradient of what is before it at zero for the first step
ZERO_STEPS = 3


class _Backward:
    """What is seen at the nodes: the first to make a gradient infinite, and custom functions that return None."""

    def __init__(self) -> None:
        self.culprit: tuple[str, str] | None = None
        self.nones: dict[tuple[str, str], set[int]] = {}

    def after(self, node: Node, owner: str, grad_inputs: tuple, grad_outputs: tuple) -> None:
        given = [t for t in grad_outputs if t is not None]
        if self.culprit is None and not _finite(grad_inputs) and _finite(given):
            self.culprit = owner, node.name()
        cls = custom_function(node)
        if cls is not None and given:
            for index, (following, _) in enumerate(node.next_functions):
                if following is not None and index < len(grad_inputs) and grad_inputs[index] is None:
                    self.nones.setdefault((cls.__qualname__, owner), set()).add(index)


def examine_gradients(patient: Patient) -> list[Verdict]:
    """One backward pass, looking at every node of the graph."""
    model, backward = patient.subject.model, _Backward()
    with Watch(patient.subject, patient.position) as watch:
        loss = watch.forward()
        try:
            watch.backward(loss, after=backward.after)
        except Exception as error:  # custom functions raise what they like
            return [failure(error, patient)]
        called = set(watch.called)
    if backward.culprit is not None:
        return [_not_finite(*backward.culprit, model)]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    norms = {name: float(p.grad.detach().float().norm()) for name, p in trained.items() if p.grad is not None}
    found = []
    for (function, owner), indices in backward.nones.items():
        found.append(_returns_none(function, owner, sorted(indices), without))
    if without and not found:
        found.append(_without_gradient(without, model, called))
    total = math.hypot(*norms.values())
    largest = max(norms, key=lambda name: norms[name], default="")
    figures = {"norm": total, "largest": largest}
    clip = patient.subject.clip_norm
    if explodes(total, patient.subject):
        found.append(_exploding(patient, total, largest, norms))
    zeros = _dead(norms)
    zeros, small = _stays_small(patient, zeros) if zeros else ([], [])
    if zeros:
        found.append(_zero(zeros, figures))
    if small:
        found.append(_vanishes(small, norms, largest, figures))
    if found:
        return found
    clipped = f", clipped to {number(clip)}" if 0 < clip < total else ""
    return [
        Verdict(
            Level.OK,
            "gradients",
            f"All {plural(len(norms), 'parameter')} have one, finite; norm {number(total)}{clipped}.",
            figures=figures,
        )
    ]


def explodes(norm: float, subject: Subject) -> bool:
    """Whether the whole gradient has a norm that nothing clips and that is far beyond what networks learn with."""
    return not math.isfinite(norm) or (norm > EXPLODING and not 0 < subject.clip_norm < norm)


def _finite(tensors: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor) and t.is_floating_point())


def _not_finite(owner: str, operation: str, model: nn.Module) -> Verdict:
    return Verdict(
        Level.PROBLEM,
        "gradient is not finite",
        f"In backward {named(owner)}{_class_of(owner, model)} is the first to turn a finite gradient into NaN or Inf, "
        f"in {operation}; the loss itself is finite.",
        "Roots, norms and powers have no gradient at 0 and divisions none by 0: add an epsilon inside the root. A "
        "torch.where after the operation does not help; clamp what goes in.",
        {"module": owner, "operation": operation},
    )


def _class_of(owner: str, model: nn.Module) -> str:
    module = dict(model.named_modules()).get(owner)
    return "" if module is None or not owner else f" ({type(module).__name__})"


def _returns_none(function: str, owner: str, indices: list[int], without: list[str]) -> Verdict:
    places = listed([f"input {index}" for index in indices])
    lost = f"; without any gradient are {listed(without)}" if without else ""
    return Verdict(
        Level.PROBLEM,
        "custom function returns None",
        f"{function}.backward in {named(owner)} returns None for {places}, which wants a gradient{lost}.",
        f"Return a gradient for every input that ctx.needs_input_grad names, in the order of forward's arguments; "
        f"None is for those that are no tensors. Check it with torch.autograd.gradcheck({function}.apply, ...).",
        {"function": function, "module": owner, "inputs": indices, "parameters": without},
    )


def _without_gradient(without: list[str], model: nn.Module, called: set[str]) -> Verdict:
    unused = [name for name in without if name.rpartition(".")[0] not in called]
    why = "their modules never ran" if len(unused) == len(without) else "nothing of the loss depends on them"
    return Verdict(
        Level.WARNING,
        "parameters without gradient",
        f"{plural(len(without), 'parameter')} of {len(list(model.parameters()))} got no gradient, since {why}: "
        f"{listed(without)}.",
        "Use the branch, remove it, or freeze it with requires_grad_(False). DistributedDataParallel waits for these "
        "gradients and stops in the second step ('Expected to have finished reduction'), unless "
        "find_unused_parameters=True.",
        {"parameters": without, "never ran": unused},
    )


def _exploding(patient: Patient, total: float, largest: str, norms: dict[str, float]) -> Verdict:
    # the learning rate is then judged with it
    clip = patient.facts["clip"] = _taming_clip(patient)
    if clip is None:
        advice = "Clip the gradient (clip_grad_norm_, optim.clip_norm), beginning with 1, and"
    else:
        advice = (
            f"Clip the gradient at {number(clip)} (clip_grad_norm_, optim.clip_norm={number(clip)}): with it the loss "
            "of this batch falls. And"
        )
    return Verdict(
        Level.WARNING,
        "exploding gradient",
        f"The norm of the gradient is {number(total)}; the largest share is that of {largest} "
        f"({number(norms[largest])}).",
        f"{advice} look at the initialisation and the normalisation of the layers around {largest.rpartition('.')[0]}.",
        {"norm": total, "largest": largest, "clip": clip},
    )


def _taming_clip(patient: Patient) -> float | None:
    """The largest of a few values to clip at with which some steps lower the loss; None where none does."""
    if patient.subject.optimizer is None:
        return None
    for clip in CLIPS:
        if not patient.has_time():
            break
        if has_learned(trial(patient, clip=clip)):
            return clip
    return None


def _dead(norms: dict[str, float]) -> list[str]:
    """Parameters with next to no gradient in modules where no other has one: a single one may have nothing to say, such
    as a scan's time constants on an image of one pixel."""
    # beside a gradient that explodes all others are small
    largest = max(norms.values(), default=0.0)
    least = VANISHING * largest if largest <= EXPLODING else 0.0
    alive = {name.rpartition(".")[0] for name, norm in norms.items() if norm > least}
    return [name for name in norms if name.rpartition(".")[0] not in alive]


def _stays_small(patient: Patient, names: list[str]) -> tuple[list[str], list[str]]:
    """Of these parameters, those whose gradient stays exactly zero for some steps, and those where it stays tiny."""
    zeros = list(names)
    patient.restore()
    for step in range(ZERO_STEPS):
        if step and not patient.has_time():
            return [], []
        torch.manual_seed(step)
        patient.position.note("forward")
        loss = patient.subject.compute_loss()
        patient.position.note("backward")
        loss.backward()
        parameters = patient.subject.model.named_parameters()
        norms = {name: 0.0 if p.grad is None else float(p.grad.float().norm()) for name, p in parameters}
        zeros = [name for name in zeros if norms[name] == 0]
        still = set(_dead(norms))
        names = [name for name in names if name in still]
        patient.update()
    return zeros, [name for name in names if name not in zeros]


def _vanishes(small: list[str], norms: dict[str, float], largest: str, figures: dict[str, Any]) -> Verdict:
    least = min(norms[name] for name in small)
    return Verdict(
        Level.WARNING,
        "gradient vanishes",
        f"In {ZERO_STEPS} steps the gradient of {plural(len(small), 'parameter')} stayed below a billionth of the "
        f"largest, down to {number(least)} against {number(norms[largest])} of {largest}: {listed(small)}.",
        "Hardly anything reaches these layers: look after them for saturated activations in a row, such as sigmoids; "
        "take ReLU or GELU, normalisation and residual connections.",
        {**figures, "parameters": small},
    )


def _zero(zeros: list[str], figures: dict[str, Any]) -> Verdict:
    return Verdict(
        Level.WARNING,
        "gradient is always zero",
        f"In {ZERO_STEPS} steps the gradient of {plural(len(zeros), 'parameter')} was exactly 0: {listed(zeros)}.",
        "These do not learn: look for an activation after them that is saturated or dead, a mask or a factor that is "
        "0, and for targets of one kind only in the batch.",
        {**figures, "parameters": zeros},
    )
