"""A few steps of the optimiser on one batch: does the loss fall, and with which learning rate does it."""

from __future__ import annotations

import math

from .patient import Patient
from .verdict import Level, Verdict
from .wording import listed, number, plural

__all__ = ["examine_learning_rate", "has_learned", "trial"]

STEPS = 10
# fewer say nothing: the first steps of Adam may raise the loss before they lower it
FEWEST_STEPS = 4
FACTORS = (1 / 3, *(10.0**-power for power in range(1, 9)))


def trial(patient: Patient, factor: float = 1.0, clip: float | None = None) -> list[float]:
    """The losses of up to :data:`STEPS` steps on the batch, the random numbers of each being the same.

    ``factor`` is on the learning rate; ``clip`` None clips as the subject does. Ends at the first loss that is not
    finite, and after :data:`FEWEST_STEPS` when there is no more time. The subject is put back before, not after.
    """
    subject = patient.subject
    patient.restore()
    for group in subject.optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    usual = subject.clip_norm
    subject.clip_norm = usual if clip is None else clip
    losses: list[float] = []
    try:
        for step in range(STEPS):
            patient.seed()
            losses.append(float(patient.step()))
            if not math.isfinite(losses[-1]) or (step + 1 >= FEWEST_STEPS and not patient.has_time()):
                break
    finally:
        subject.clip_norm = usual
    return losses


def has_exploded(losses: list[float]) -> bool:
    """Not finite, or at the end still far above the beginning: a spike that is over is none."""
    if not all(map(math.isfinite, losses)):
        return True
    return min(losses[-3:]) > 2 * abs(losses[0]) + 1


def has_learned(losses: list[float]) -> bool:
    """The loss at the end is below that of the beginning."""
    return all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def examine_learning_rate(patient: Patient) -> list[Verdict]:
    """Steps with the optimiser's learning rate, and where the loss explodes with smaller ones."""
    subject = patient.subject
    if subject.optimizer is None:
        return []
    found = _outside(patient)
    rate = max(group["lr"] for group in subject.optimizer.param_groups)
    before = [p.detach().clone() for p in subject.model.parameters()]
    clip = patient.facts.get("clip")
    losses = trial(patient, clip=clip)
    changed = any(bool((a != b).any()) for a, b in zip(before, subject.model.parameters(), strict=True))
    if not changed:
        return [
            Verdict(
                Level.PROBLEM,
                "optimiser changes nothing",
                f"After {plural(len(losses), 'step')} at a learning rate of {number(rate)} every parameter is as it "
                "was.",
                "Make the optimiser from the parameters of the model that is trained, after the model is complete, and "
                "look at the learning rate.",
                {"lr": rate},
            ),
        ]
    if not has_exploded(losses):
        course = f"from {number(losses[0])} to {number(losses[-1])} in {len(losses)} steps on one batch"
        figures = {"lr": rate, "losses": losses}
        message = f"At {number(rate)} the loss goes {course}."
        return found or [Verdict(Level.OK, "learning rate", message, figures=figures)]
    sane = _sane_rate(patient, rate, clip)
    if sane is None:
        remedy = "No rate down to a hundred-millionth of it lowers the loss: look at loss, targets and gradients."
    else:
        remedy = f"Set it to {number(sane)}, with which the loss of this batch falls, and warm up to it."
    return [
        *found,
        Verdict(
            Level.PROBLEM,
            "learning rate too high",
            f"At a learning rate of {number(rate)} the loss goes from {number(losses[0])} to {number(losses[-1])} in "
            f"{plural(len(losses), 'step')} on one and the same batch.",
            remedy,
            {"lr": rate, "losses": losses, "sane": sane},
        ),
    ]


def _sane_rate(patient: Patient, rate: float, clip: float | None) -> float | None:
    for factor in FACTORS:
        if not patient.has_time():
            break
        if has_learned(trial(patient, factor, clip)):
            return rate * factor
    return None


def _outside(patient: Patient) -> list[Verdict]:
    inside = {id(p) for group in patient.subject.optimizer.param_groups for p in group["params"]}
    outside = [n for n, p in patient.subject.model.named_parameters() if p.requires_grad and id(p) not in inside]
    if not outside:
        return []
    return [
        Verdict(
            Level.WARNING,
            "parameters outside the optimiser",
            f"{plural(len(outside), 'parameter')} that want a gradient are not in the optimiser: {listed(outside)}.",
            "Add them to the optimiser, or freeze them with requires_grad_(False). Make the optimiser after the last "
            "layer was replaced.",
            {"parameters": outside},
        )
    ]
