"""The forward pass and the loss: does it run, is it a finite scalar, does it hang on the graph."""

from __future__ import annotations

import traceback
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .patient import Patient
from .stacks import is_users
from .verdict import Level, Verdict
from .watching import Watch, named, tensors_of
from .wording import listed, number

__all__ = ["Finiteness", "examine_loss", "failure"]

LARGEST_HALF = 65504.0


class LabelOutOfRange(Exception):
    """Raised in the place of a cross-entropy that would fail, or on a GPU stop the whole process."""

    def __init__(self, lowest: int, highest: int, classes: int, ignored: int) -> None:
        super().__init__(f"labels {lowest} to {highest}, {classes} classes")
        self.lowest, self.highest, self.classes, self.ignored = lowest, highest, classes, ignored


class CheckLabels(TorchFunctionMode):
    """Looks at the labels of every cross-entropy before it is computed."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.cross_entropy, F.nll_loss):
            scores, labels, *_ = (*args, *(kwargs[name] for name in ("input", "target") if name in kwargs))
            # ignore_index is the third argument after the weight and a deprecated flag
            ignored = kwargs.get("ignore_index", args[4] if len(args) > 4 else -100)
            if not labels.is_floating_point():
                _check_labels(scores, labels, ignored)
        return func(*args, **kwargs)


def _check_labels(scores: Tensor, labels: Tensor, ignored: int) -> None:
    classes = scores.shape[1 if scores.ndim > 1 else 0]
    counted = labels[labels != ignored]
    if counted.numel():
        lowest, highest = int(counted.min()), int(counted.max())
        if lowest < 0 or highest >= classes:
            raise LabelOutOfRange(lowest, highest, classes, ignored)


class Finiteness:
    """Finds the first module whose output is not finite: hooks run from the inside outwards, so it is the smallest."""

    def __init__(self) -> None:
        self.culprit: str | None = None
        self.message = ""
        self.figures: dict[str, Any] = {}
        self._largest = 0.0
        self.dtype: torch.dtype | None = None

    def after(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.culprit is not None:
            return
        for tensor in tensors_of(output):
            if not tensor.is_floating_point() or tensor.is_meta or bool(tensor.isfinite().all()):
                continue
            reached = [float(t.detach().abs().max()) for t in tensors_of(inputs) if t.is_floating_point() and t.numel()]
            largest = max(reached, default=0.0)
            nans, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            self.culprit, self.dtype = name, tensor.dtype
            self.figures = {"module": name, "nan": nans, "inf": infinite, "largest_input": largest}
            self.message = (
                f"{named(name)} ({type(module).__name__}) is the first module whose output is not finite: {nans} NaN "
                f"and {infinite} Inf of {tensor.numel()} values, from inputs of at most {number(largest)}"
            )


def examine_loss(patient: Patient) -> list[Verdict]:
    """Forward pass and loss, once, looking at every module."""
    broken = [name for name, p in patient.subject.model.named_parameters() if not bool(p.isfinite().all())]
    if broken:
        return [
            Verdict(
                Level.PROBLEM,
                "parameter is not finite",
                f"Before the first step these parameters already hold NaN or Inf: {listed(broken)}.",
                "The checkpoint was written after the training broke down, or the initialisation divides by zero: go "
                "back to an earlier checkpoint, or initialise these again.",
                {"parameters": broken},
            )
        ]
    finiteness, cuts = Finiteness(), _Cuts()

    def after(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        finiteness.after(name, module, inputs, output)
        cuts.after(name, module, inputs, output)

    with Watch(patient.subject, patient.position, after=after) as watch:
        try:
            with CheckLabels():
                loss = watch.forward()
        except LabelOutOfRange as error:
            return [_label_out_of_range(error)]
        except Exception as error:  # the user's code may raise anything
            return [failure(error, patient)]
        return [_judge(loss, finiteness, cuts)]


class _Cuts:
    """Finds the first module from which on the graph is cut: what goes in or its weights want a gradient, and nothing
    that comes out does. None where the model's own output still hangs on the graph."""

    def __init__(self) -> None:
        self.culprit: str | None = None
        self.recording = True

    def after(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not name and any(t.requires_grad for t in tensors_of(output)):
            self.culprit = None
            return
        wanted = any(p.requires_grad for p in module.parameters()) or any(t.requires_grad for t in tensors_of(inputs))
        given = [t for t in tensors_of(output) if t.is_floating_point()]
        if self.culprit is None and wanted and given and not any(t.requires_grad for t in given):
            self.culprit, self.recording = name, torch.is_grad_enabled()


def _judge(loss: Any, finiteness: Finiteness, cuts: _Cuts) -> Verdict:
    if not isinstance(loss, Tensor):
        return Verdict(
            Level.PROBLEM,
            "loss is not a tensor",
            f"The loss is a {type(loss).__name__}, from which there is no way back to the parameters.",
            "Return the tensor itself: no .item(), float() or numpy() before backward().",
        )
    if loss.numel() != 1:
        return Verdict(
            Level.PROBLEM,
            "loss is not a scalar",
            f"The loss has shape {tuple(loss.shape)}; backward() starts from one number.",
            "Reduce it: loss.mean(), or reduction='mean' in the loss function.",
            {"shape": list(loss.shape)},
        )
    if not loss.requires_grad:
        return _detached(cuts)
    if finiteness.culprit is not None and not bool(loss.isfinite()):
        if finiteness.dtype == torch.float16:
            return Verdict(
                Level.PROBLEM,
                "fp16 overflow",
                f"{finiteness.message}; it computes in fp16, whose largest number is {LARGEST_HALF:.0f}.",
                "Train in bf16 (run.precision=bf16), whose range is that of fp32, or keep this module in fp32.",
                finiteness.figures,
            )
        return Verdict(
            Level.PROBLEM,
            "output is not finite",
            f"{finiteness.message}.",
            "Look in this module for a division by zero, a logarithm or root of a number that is not positive, or an "
            "exponential without a maximum taken off; add an epsilon or a clamp there.",
            finiteness.figures,
        )
    if not bool(loss.isfinite()):
        return Verdict(
            Level.PROBLEM,
            "loss is not finite",
            f"The loss is {float(loss)} although all outputs of the model are finite: it arises in the loss function.",
            "Use the forms that take logits (cross_entropy, binary_cross_entropy_with_logits), and guard logarithms "
            "and divisions with an epsilon.",
        )
    return Verdict(Level.OK, "loss", f"A finite scalar, {number(float(loss))}.", figures={"loss": float(loss)})


def _detached(cuts: _Cuts) -> Verdict:
    if cuts.culprit is None:
        message = "the outputs of the model do, but the loss function cuts it, or there is no parameter to train."
    else:
        switched_off = "" if cuts.recording else ", where torch.no_grad() or inference_mode() is on"
        message = f"from {named(cuts.culprit)} on no result wants a gradient{switched_off}."
    return Verdict(
        Level.PROBLEM,
        "loss is detached",
        f"The loss does not hang on the graph: {message}",
        "Look there for .detach(), .data, .item(), numpy, torch.no_grad(), argmax, torch.tensor(...) or "
        "requires_grad_(False), and take it away.",
        {"module": cuts.culprit},
    )


def _label_out_of_range(error: LabelOutOfRange) -> Verdict:
    wrong = error.highest if error.highest >= error.classes else error.lowest
    return Verdict(
        Level.PROBLEM,
        "label out of range",
        f"A label is {wrong}, but the output has {error.classes} classes: labels must be 0 to {error.classes - 1}.",
        f"Make the last layer as wide as there are classes, count labels from 0, and give pixels without a label the "
        f"ignored index (here {error.ignored}). On a GPU this stops the process with 'device-side assert'.",
        {"lowest": error.lowest, "highest": error.highest, "classes": error.classes},
    )


def failure(error: BaseException, patient: Patient) -> Verdict:
    """An error that the user's step raised, as a verdict: the phase, the module, the line."""
    place, text = patient.position.read(), " ".join(str(error).split())
    known = _known_failure(text)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    line = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    owner = place.where.partition("|")[0]
    where = f", in {named(owner)}" if owner else ""
    # torch's messages go on with advice of their own
    text = text.partition(". ")[0][:300]
    name, remedy = known or (
        f"{place.phase} fails",
        "Run the step by itself with this batch and put right what the error says.",
    )
    return Verdict(
        Level.PROBLEM,
        name,
        f"In {place.phase}{where}: {type(error).__name__}: {text}{line}",
        remedy,
        {"phase": place.phase, "module": owner, "error": type(error).__name__},
    )


def _known_failure(text: str) -> tuple[str, str] | None:
    for sign, name, remedy in _FAILURES:
        if sign in text:
            return name, remedy
    return None


_MOVE = (
    "Move what this module makes or is given to the device of its weights: tensor.to(weight.device), or "
    "register_buffer for what it keeps."
)
_FAILURES = (
    (
        "backward through the graph a second time",
        "graph is used twice",
        "Something is kept from one step to the next with its graph, such as a hidden state: detach() it between "
        "steps. Do not call backward() twice on one loss; add the losses up first.",
    ),
    (
        "modified by an inplace operation",
        "tensor changed in place",
        "Write a new tensor in the place of the in-place operation (x = x + y, not x += y; ReLU(inplace=False)) in "
        "the module named here.",
    ),
    ("on the same device", "mixed devices", _MOVE),
    ("is not on the expected device", "mixed devices", _MOVE),
    (
        "Expected more than 1 value per channel",
        "batch too small for BatchNorm",
        "Take batches of at least 2 in training (drop_last=True for the last one), or GroupNorm or LayerNorm instead.",
    ),
    (
        "out of memory",
        "out of memory",
        "Make the batch smaller (with run.accumulate the step stays the same), switch on run.grad_checkpointing, or "
        "train in bf16.",
    ),
)
