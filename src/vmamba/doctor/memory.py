"""Memory: what each module keeps for backward, and what is left over after every step, with who holds it."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .losses import failure
from .patient import Patient
from .verdict import Level, Verdict
from .watching import LOSS, Watch, named
from .wording import size

__all__ = ["examine_memory"]

STEPS = 20
# until optimiser and caches have what they need
WARM_UP = 2
FEWEST_STEPS = 6
# tensors without a graph, such as logged losses, may pile up to this many bytes a step
LITTLE = 4096


class _Saved:
    """A tensor that autograd keeps for backward; it lives as long as the graph that keeps it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass(frozen=True)
class _Left:
    """What there is after a step: tensors that graphs keep, nodes of graphs, tensors, bytes of both kinds."""

    saved: int
    saved_bytes: int
    nodes: int
    tensors: int
    tensor_bytes: int


def examine_memory(patient: Patient) -> list[Verdict]:
    """Up to :data:`STEPS` plain steps; then one forward pass that looks at every module."""
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        kept = _Saved(tensor)
        saved.add(kept)
        return kept

    done, history, known = 0, [], set()
    # what there is already is neither collected nor looked at again: that takes a second a step in a large process
    gc.collect()
    gc.freeze()
    try:
        with saved_tensors_hooks(pack, lambda kept: kept.tensor):
            while done < STEPS and (done < FEWEST_STEPS or patient.has_time()):
                try:
                    patient.step()
                except Exception as error:  # most often: the graph of the step before is gone
                    return [failure(error, patient)]
                done += 1
                history.append(_left(saved))
                if done == WARM_UP:
                    known = {id(t) for t in _live_tensors()}
        new = [t for t in _live_tensors() if id(t) not in known]
    finally:
        # who holds a tensor may have been there before
        gc.unfreeze()
    first, middle, last = history[WARM_UP], history[(WARM_UP + done) // 2], history[-1]
    steps = done - WARM_UP - 1

    def growth(quantity: str) -> float:
        """A step, where it grows from each third to the next."""
        low, between, high = (getattr(left, quantity) for left in (first, middle, last))
        return (high - low) / steps if low < between < high else 0.0

    figures = {"steps": done, "history": [vars(left) for left in history]}
    # half a node: what piles up only now and then is no leak of every step
    if growth("nodes") >= 0.5 or growth("saved") >= 0.5:
        holder = _holder_of_any(new, patient.subject.model, with_graph=True)
        return [_retained(growth, done, holder, figures)]
    if growth("tensor_bytes") >= LITTLE:
        holder = _holder_of_any(new, patient.subject.model, with_graph=False)
        return [_kept(growth("tensor_bytes"), done, holder, figures)]
    modules = _by_module(patient)
    total = sum(modules.values())
    most = [f"{named(name)} {size(count)}" for name, count in modules.most_common(3)]
    return [
        Verdict(
            Level.OK,
            "memory",
            f"{size(total)} are kept for backward, most by {', '.join(most)}; {done} steps leave nothing behind."
            if most
            else f"Nothing is kept for backward; {done} steps leave nothing behind.",
            figures={"steps": done, "kept": dict(modules.most_common())},
        )
    ]


def _left(saved: weakref.WeakSet[_Saved]) -> _Left:
    gc.collect()
    tensors = _live_tensors()
    held = list(saved)
    nodes = _nodes_of(tensors)
    return _Left(
        len(held),
        sum(k.tensor.nbytes for k in held),
        nodes,
        len(tensors),
        sum(t.nbytes for t in tensors if not t.is_meta),
    )


def _live_tensors() -> list[Tensor]:
    # by type, since isinstance would wake lazy objects up
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.layout == torch.strided]


def _nodes_of(tensors: list[Tensor]) -> int:
    """How many nodes the graphs have that live tensors hold."""
    waiting, seen = [t.grad_fn for t in tensors], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(seen)


def _by_module(patient: Patient) -> Counter[str]:
    """Bytes that are kept for backward by the innermost module that runs; a storage counts once, weights do not."""
    subject, stack, modules = patient.subject, [LOSS], Counter()
    counted = {p.untyped_storage().data_ptr() for p in subject.model.parameters() if not p.is_meta}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            kept.append(tensor)  # so that no other tensor gets its address
            modules[stack[-1]] += storage.nbytes()
        return tensor

    kept: list[Tensor] = []
    patient.restore()
    watch = Watch(
        subject,
        patient.position,
        before=lambda name, module, inputs: stack.append(name),
        after=lambda name, module, inputs, output: stack.pop(),
    )
    with watch, saved_tensors_hooks(pack, lambda tensor: tensor):
        watch.forward()
    return modules


def _retained(growth: Any, done: int, holder: str, figures: dict[str, Any]) -> Verdict:
    held = f"{holder} holds" if holder else "something holds"
    return Verdict(
        Level.PROBLEM,
        "retained graph",
        f"Every step leaves its graph behind: {growth('nodes'):.0f} nodes and {size(growth('saved_bytes'))} of "
        f"activations a step over {done} steps; {held} them.",
        "Keep numbers or detached tensors from step to step (loss.item(), loss.detach()), not tensors with their "
        "graph; drop retain_graph=True where it is not needed.",
        {**figures, "holder": holder, "bytes_a_step": growth("saved_bytes")},
    )


def _kept(a_step: float, done: int, holder: str, figures: dict[str, Any]) -> Verdict:
    held = f" in {holder}" if holder else ""
    return Verdict(
        Level.WARNING,
        "tensors pile up",
        f"Every step leaves {size(a_step)} of tensors behind{held}, over {done} steps.",
        "Keep only what is needed, as numbers or on the CPU (.item(), .cpu()), and empty the list at every epoch.",
        {**figures, "holder": holder, "bytes_a_step": a_step},
    )


def _holder_of_any(tensors: list[Tensor], model: nn.Module, *, with_graph: bool) -> str:
    """Who holds one of the largest of the tensors, or of those with a graph; "" where nobody is found."""
    largest = sorted((t for t in tensors if t.grad_fn is not None or not with_graph), key=lambda t: -t.nbytes)
    # whoever looks holds them, too
    ours = {id(tensors), id(largest)}
    for index in range(min(len(largest), 5)):
        found = _holder(largest[index], model, ours)
        if found:
            return found
    return ""


def _holder(tensor: Tensor, model: nn.Module, ours: set[int]) -> str:
    """Follows who refers to the tensor, through containers, to an attribute, a global or a function."""
    attributes = {id(vars(module)): name for name, module in model.named_modules()}
    globals_of = {id(vars(m)): name for name, m in list(sys.modules.items()) if isinstance(m, types.ModuleType)}
    waiting: list[tuple[Any, str]] = [(tensor, "")]
    seen = {id(waiting), *ours}
    for _ in range(50):
        if not waiting:
            return ""
        value, what = waiting.pop(0)
        referrers = gc.get_referrers(value)
        seen.add(id(referrers))
        for referrer in referrers:
            if id(referrer) in seen or isinstance(referrer, types.FrameType):
                continue
            seen.add(id(referrer))
            if isinstance(referrer, dict):
                key = next((k for k, v in referrer.items() if v is value), None)
                if id(referrer) in attributes:
                    return _attribute(attributes[id(referrer)], key, what)
                if id(referrer) in globals_of:
                    return f"the global {key} of {globals_of[id(referrer)]}{what}"
                owner = next((o for o in gc.get_referrers(referrer) if getattr(o, "__dict__", None) is referrer), None)
                if owner is not None:
                    return f"{_name_of(owner)}.{key}{what}"
                waiting.append((referrer, what or f", a dict of {len(referrer)}"))
            elif isinstance(referrer, list | tuple | set) or type(referrer).__name__ == "deque":
                waiting.append((referrer, what or f", a {type(referrer).__name__} of {len(referrer)}"))
            elif isinstance(referrer, types.FunctionType):
                return f"the function {referrer.__qualname__}{what}"
            elif isinstance(referrer, types.CellType):
                waiting.append((referrer, what))
            elif not isinstance(referrer, Tensor):
                key = next((k for k, v in getattr(referrer, "__dict__", {}).items() if v is value), None)
                if key is not None:
                    names = {id(module): name for name, module in model.named_modules()}
                    if id(referrer) in names:
                        return _attribute(names[id(referrer)], key, what)
                    return f"{_name_of(referrer)}.{key}{what}"
    return ""


def _attribute(module: str, key: Any, what: str) -> str:
    return f"{f'{module}.{key}' if module else f'model.{key}'}{what}"


def _name_of(owner: Any) -> str:
    return owner.__qualname__ if isinstance(owner, type | types.FunctionType) else type(owner).__qualname__
