"""Half precision: does fp16 overflow, where does its loss scale settle, and does bf16 cure it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .losses import LARGEST_HALF, Finiteness
from .patient import Patient
from .verdict import Level, Verdict
from .watching import Watch
from .wording import number, plural

__all__ = ["examine_precision"]

# what torch.amp.GradScaler starts with; it halves the scale at every overflow and skips the step
FIRST_SCALE = 2.0**16
# a scale below 1 makes small gradients smaller still
LEAST_SCALE = 1.0


def examine_precision(patient: Patient) -> list[Verdict]:
    """Only where the subject trains in fp16."""
    if patient.subject.precision != "fp16":
        return []
    finiteness, largest = Finiteness(), _Largest()

    def after(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        finiteness.after(name, module, inputs, output)
        largest.after(name, module, inputs, output)

    with Watch(patient.subject, patient.position, after=after) as watch:
        loss = watch.forward("fp16").detach()
    if not bool(loss.isfinite()):
        what = finiteness.message or f"The loss is {float(loss)}, all outputs are finite"
        return [_overflow(f"Under fp16 (largest number {LARGEST_HALF:.0f}) {what}.", patient, finiteness.figures)]
    scale, skipped = FIRST_SCALE, 0
    while not _scaled_gradients_are_finite(patient, scale):
        scale, skipped = scale / 2, skipped + 1
        if scale < LEAST_SCALE:
            message = f"Under fp16 the gradients overflow at every loss scale from {FIRST_SCALE:.0f} down to 1."
            return [_overflow(message, patient, {"scale": scale})]
    message = (
        f"fp16: the loss scale settles at {scale:.0f} after {plural(skipped, 'skipped step')}; the largest output is "
        f"{number(largest.value)} of {LARGEST_HALF:.0f}, in {largest.name or 'the model'}."
    )
    return [Verdict(Level.OK, "precision", message, figures={"scale": scale, "skipped": skipped})]


class _Largest:
    """The module with the largest output, whose distance from 65504 is the room that is left."""

    def __init__(self) -> None:
        self.name, self.value = "", 0.0

    def after(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dtype == torch.float16 and output.numel():
            value = float(output.detach().abs().max())
            if value > self.value:
                self.name, self.value = name, value


def _scaled_gradients_are_finite(patient: Patient, scale: float) -> bool:
    patient.restore()
    patient.position.note("forward")
    loss = patient.subject.compute_loss("fp16")
    patient.position.note("backward")
    (loss.float() * scale).backward()
    gradients = [p.grad for p in patient.subject.model.parameters() if p.grad is not None]
    return all(bool(g.isfinite().all()) for g in gradients)


def _overflow(message: str, patient: Patient, figures: dict[str, Any]) -> Verdict:
    patient.restore()
    patient.position.note("forward")
    loss = patient.subject.compute_loss("bf16")
    cured = bool(loss.detach().isfinite())
    if cured:
        patient.position.note("backward")
        loss.backward()
        norms = [float(p.grad.float().norm()) for p in patient.subject.model.parameters() if p.grad is not None]
        cured = math.isfinite(sum(norms))
    if cured:
        remedy = (
            "Train in bf16, in which loss and gradients of this batch are finite (run.precision=bf16); or run this "
            "module in fp32 (torch.autocast(..., enabled=False))."
        )
    else:
        remedy = "bf16 does not cure it: look at the size of inputs and weights, and normalise before this module."
    return Verdict(Level.PROBLEM, "fp16 overflow", message, remedy, {**figures, "bf16_cures": cured})
