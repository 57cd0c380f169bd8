"""Which module runs, and which module each node of the autograd graph belongs to: what names are found by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .position import Position
from .subject import Subject

__all__ = ["LOSS", "Watch", "custom_function", "named", "tensors_of"]

# the owner of the nodes that come after the model
LOSS = "the loss function"

Before = Callable[[str, nn.Module, Any], None]
After = Callable[[str, nn.Module, Any, Any], None]


class Watch:
    """Hooks on every module for one forward and backward pass; leave it to take them off.

    Attributes:
        called: the names of the modules that ran.
        owners: after :meth:`forward`, the name of the innermost module in whose forward each node was made.
        before, after: called around every module's forward: (name, module, inputs[, output]).
    """

    def __init__(
        self, subject: Subject, position: Position, *, before: Before | None = None, after: After | None = None
    ) -> None:
        self.subject = subject
        self.position = position
        self.before, self.after = before, after
        self.called: set[str] = set()
        self.owners: dict[Node, str] = {}
        self._handles: list[Any] = []
        # the modules that are running, and the grad_fns of their inputs: their graphs end there
        self._running: list[tuple[str, set[Node]]] = []

    def __enter__(self) -> Watch:
        for name, module in self.subject.model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave(name), with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        # a node's hook knows us and we know the node: no collector would find that circle
        self._handles.clear()
        self.owners.clear()

    def forward(self, precision: str | None = None) -> Any:
        """The subject's loss, noting where it is; nodes made after the model belong to :data:`LOSS`."""
        return self.made(lambda: self.subject.compute_loss(precision))

    def made(self, make: Callable[[], Any]) -> Any:
        """What ``make`` makes of the model, another end of its graph than the loss."""
        self.position.note("forward")
        result = make()
        for tensor in tensors_of(result):
            self._own(tensor.grad_fn, LOSS, set())
        return result

    def backward(
        self,
        loss: Tensor,
        *,
        before: Callable[[Node, str, tuple], None] | None = None,
        after: Callable[[Node, str, tuple, tuple], None] | None = None,
    ) -> None:
        """``loss.backward()``, noting where it is.

        ``before(node, owner, grad_outputs)`` and ``after(node, owner, grad_inputs, grad_outputs)`` are called around
        every node.
        """
        total, done = len(self.owners), 0

        def enter(node: Node, owner: str) -> Callable[[tuple], None]:
            def hook(grad_outputs: tuple) -> None:
                nonlocal done
                self.position.note("backward", f"{owner}|{node.name()}", done, total)
                done += 1
                if before is not None:
                    before(node, owner, grad_outputs)

            return hook

        def leave(node: Node, owner: str) -> Callable[[tuple, tuple], None]:
            return lambda grad_inputs, grad_outputs: after(node, owner, grad_inputs, grad_outputs)

        for node, owner in self.owners.items():
            self._handles.append(node.register_prehook(enter(node, owner)))
            if after is not None:
                self._handles.append(node.register_hook(leave(node, owner)))
        self.position.note("backward", "", 0, total)
        loss.backward()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple, named_arguments: dict) -> None:
            self.position.note("forward", name)
            self.called.add(name)
            inputs = (arguments, named_arguments)
            self._running.append((name, {t.grad_fn for t in tensors_of(inputs) if t.grad_fn is not None}))
            if self.before is not None:
                self.before(name, module, inputs)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple, named_arguments: dict, output: Any) -> None:
            _, ends = self._running.pop()
            for tensor in tensors_of(output):
                self._own(tensor.grad_fn, name, ends)
            if self.after is not None:
                self.after(name, module, (arguments, named_arguments), output)
            if self._running:
                self.position.note("forward", self._running[-1][0])
            else:
                self.position.note("loss", LOSS)

        return hook

    def _own(self, node: Node | None, name: str, ends: set[Node]) -> None:
        """``name`` owns ``node`` and what it came from, up to ``ends``, but for what modules inside it own already."""
        waiting, seen = [node], set(ends)
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            self.owners.setdefault(node, name)
            waiting += [following for following, _ in node.next_functions]


def named(owner: str) -> str:
    """The owner of a node, or a module's name, as messages say it."""
    if owner == LOSS:
        return owner
    return owner or "the model's own forward"


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, and in the fields of data classes such as model outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)
    elif hasattr(value, "__dataclass_fields__"):
        for field in value.__dataclass_fields__:
            yield from tensors_of(getattr(value, field))


def custom_function(node: Node) -> type[torch.autograd.Function] | None:
    """The class that made a node, where that is somebody's ``torch.autograd.Function``."""
    return getattr(type(node), "_forward_cls", None)
