"""Which module is to blame: parts of the model are replaced by identities until the trouble is gone."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .gradients import explodes
from .patient import Patient
from .verdict import Level, Verdict
from .watching import Watch, tensors_of

__all__ = ["StandIn", "culprit", "examine_parts", "examine_symptom", "parts_of", "search", "symptom"]

Troubled = Callable[[frozenset[str]], bool]
Children = Callable[[str], Sequence[str]]


class StandIn(nn.Module):
    """In the place of a module: hands its first input on where that has the output's shape, else numbers of that shape
    that depend on the input, so that the graph is not cut.

    Args:
        like: the module's output, tensors of it on the meta device; None where it never gave one: always hands on.
    """

    def __init__(self, like: Any = None) -> None:
        super().__init__()
        self.like = like

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        x = next(tensors_of((inputs, named_inputs)))
        return x if self.like is None else tree_map_only(Tensor, lambda like: _shaped(x, like), self.like)


def _shaped(x: Tensor, like: Tensor) -> Tensor:
    if x.shape == like.shape:
        return x
    flat, wanted = x.to(like.dtype).flatten(), like.numel()
    repeats = -(-wanted // max(flat.numel(), 1))
    return flat.repeat(repeats)[:wanted].view(like.shape)


def parts_of(model: nn.Module, name: str, outputs: Mapping[str, Any] | None = None) -> list[str]:
    """The children of the module ``name`` that may be replaced. In the place of those that are never called, such as
    lists of modules, their own; ``outputs`` None: of others it is not known what they give."""
    parts = []
    for child, module in model.get_submodule(name).named_children():
        full = f"{name}.{child}" if name else child
        never_called = outputs is not None and full not in outputs and any(True for _ in module.children())
        if never_called or isinstance(module, nn.ModuleList | nn.ModuleDict):
            parts += parts_of(model, full, outputs)
        elif not isinstance(module, nn.Identity):
            parts.append(full)
    return parts


def search(troubled: Troubled, children: Children) -> list[str]:
    """The smallest modules whose replacement makes the trouble go away; empty where none does.

    At every level, beginning with the children of the model (""), parts are replaced one after another until the
    trouble is gone; those of them that need not have been are put back; and what stays is looked into.

    Args:
        troubled: whether the trouble is there with these modules replaced.
        children: the parts of a module.
    """
    needed = _needed(troubled, children(""), frozenset())
    found: list[str] = []
    while needed:
        name = needed.pop(0)
        others = frozenset(needed) | frozenset(found)
        inside = _needed(troubled, children(name), others)
        if inside:
            needed = inside + needed
        else:
            found.append(name)
    # what had to go because a larger part beside it was gone
    for name in list(found):
        if len(found) > 1 and not troubled(frozenset(found) - {name}):
            found.remove(name)
    return found


def _needed(troubled: Troubled, parts: Sequence[str], replaced: frozenset[str]) -> list[str]:
    """Of ``parts``, those that must be replaced beside ``replaced``; empty where the trouble stays with all of them."""
    for part in parts:
        if not troubled(replaced | {part}):
            return [part]
    taken: list[str] = []
    for part in parts:
        taken.append(part)
        if len(taken) > 1 and not troubled(replaced | set(taken)):
            break
    else:
        return []
    for part in list(taken[:-1]):
        if not troubled(replaced | (set(taken) - {part})):
            taken.remove(part)
    return taken


def symptom(patient: Patient, replaced: Sequence[str] = (), outputs: Mapping[str, Any] | None = None) -> str:
    """What is wrong with one step, in a word: "" for nothing, "loss is not finite", "loss is detached", "gradient is
    not finite", "exploding gradient", or the error it raises."""
    patient.restore()
    leaves: list[Tensor] = list(patient.subject.model.parameters())
    subject = dataclasses.replace(patient.subject, batch=_wanting_gradients(patient.subject.batch, leaves))
    with _replaced(subject.model, replaced, outputs or {}):
        try:
            patient.position.note("forward")
            loss = subject.compute_loss(subject.precision)
            if not bool(loss.isfinite().all()):
                return "loss is not finite"
            if not loss.requires_grad:
                return "loss is detached"
            patient.position.note("backward")
            loss.backward()
        except Exception as error:  # the symptom that is looked for may be any
            return type(error).__name__
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    if not all(bool(g.isfinite().all()) for g in gradients):
        return "gradient is not finite"
    norms = (float(p.grad.float().norm()) for p in subject.model.parameters() if p.grad is not None)
    return "exploding gradient" if explodes(math.hypot(*norms), subject) else ""


def _wanting_gradients(batch: Any, leaves: list[Tensor]) -> Any:
    """The batch with inputs that want a gradient, so that one goes as far where no weights are left before the trouble;
    what to look at afterwards is added to ``leaves``."""

    def wanting(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().clone().requires_grad_())
        # models may write into their input, which is forbidden for a leaf
        return leaves[-1].clone()

    if isinstance(batch, list | tuple) and len(batch) == 2:
        return type(batch)((tree_map_only(Tensor, wanting, batch[0]), batch[1]))
    return batch


def examine_parts(patient: Patient, runs_forward: bool) -> list[Verdict]:
    """The tree of parts and their classes, as a verdict that the parent reads."""
    outputs = _outputs(patient) if runs_forward else None
    model = patient.subject.model
    names = [name for name, _ in model.named_modules()]
    figures = {"parts": {name: parts_of(model, name, outputs) for name in names}, "kinds": _kinds(model)}
    return [Verdict(Level.OK, "parts", "", figures=figures)]


def _kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


def examine_symptom(patient: Patient, replaced: Sequence[str], runs_forward: bool) -> list[Verdict]:
    """One step with modules replaced, as a verdict that the parent reads: for trouble that ends the process.

    runs_forward: the forward pass comes back, so that one may ask what the modules give.
    """
    found = symptom(patient, replaced, _outputs(patient) if runs_forward else None)
    return [Verdict(Level.OK, "symptom", found)]


def culprit(patient: Patient) -> list[Verdict]:
    """Bisect in this process: for trouble that comes back as a symptom."""
    trouble = symptom(patient)
    if not trouble:
        return [_nothing()]
    outputs = _outputs(patient)
    model = patient.subject.model

    def troubled(replaced: frozenset[str]) -> bool:
        # any trouble counts: where a stand-in breaks the step, nothing is learned from it
        return bool(symptom(patient, sorted(replaced), outputs))

    return [verdict_of(search(troubled, lambda name: parts_of(model, name, outputs)), trouble, _kinds(model))]


def verdict_of(found: Sequence[str], trouble: str, kinds: Mapping[str, str]) -> Verdict:
    """The verdict of a search; ``kinds`` are the classes of the modules."""
    if not found:
        return Verdict(
            Level.WARNING,
            "no culprit found",
            f"The trouble ({trouble}) stays whatever part of the model is replaced by an identity.",
            "Look at the loss function and at the forward of the model itself, outside its parts.",
            {"trouble": trouble},
        )
    whole = " and ".join(f"{name} ({kinds[name]})" for name in found)
    return Verdict(
        Level.PROBLEM,
        "culprit",
        f"With {whole} replaced by {'an identity' if len(found) == 1 else 'identities'} the trouble ({trouble}) is "
        "gone, and with nothing smaller.",
        f"Look for the cause in {' and '.join(found)}.",
        {"modules": list(found), "trouble": trouble},
    )


def _nothing() -> Verdict:
    return Verdict(Level.OK, "bisect", "One step shows no trouble that replacing modules could take away.")


@contextlib.contextmanager
def _replaced(model: nn.Module, names: Sequence[str], outputs: Mapping[str, Any]) -> Iterator[None]:
    before = {}
    try:
        for name in names:
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            before[name] = owner, child, owner._modules[child]
            owner._modules[child] = _stand_in(before[name][2], name, outputs)
        yield
    finally:
        for owner, child, module in before.values():
            owner._modules[child] = module


def _stand_in(module: nn.Module, name: str, outputs: Mapping[str, Any]) -> nn.Module:
    """In the place of a sequence a sequence, since models count its parts and walk through them."""
    stand_in = StandIn(outputs.get(name))
    if not isinstance(module, nn.Sequential):
        return stand_in
    parts = ((child, _stand_in(part, f"{name}.{child}", outputs)) for child, part in module.named_children())
    sequence = nn.Sequential(OrderedDict(parts))
    sequence.forward = stand_in.forward
    return sequence


def _outputs(patient: Patient) -> dict[str, Any]:
    """What every module that is called gives, its tensors on the meta device: shapes and dtypes."""
    outputs = {}

    def after(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[name] = tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), output)

    patient.restore()
    with Watch(patient.subject, patient.position, after=after) as watch, contextlib.suppress(Exception):
        watch.forward(patient.subject.precision)
    return outputs
