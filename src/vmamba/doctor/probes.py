"""The examinations by name, in the order in which they are made, and the process that makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .batch import examine_batch, examine_devices
from .bisect import culprit, examine_parts, examine_symptom
from .functions import examine_custom_functions
from .gradients import examine_gradients
from .growth import examine_growth
from .learning import examine_learning_rate
from .loader import examine_loader
from .losses import examine_loss, failure
from .memory import examine_memory
from .patient import Patient
from .position import Position
from .precision import examine_precision
from .processes import examine_processes
from .session import Job, Source
from .slow_paths import examine_slow_paths
from .timing import examine_time
from .verdict import Level, Verdict

__all__ = ["ORDER", "PROBES", "work"]

PROBES: dict[str, Callable[..., list[Verdict]]] = {
    "loader": examine_loader,
    "devices": examine_devices,
    "batch": examine_batch,
    "slow paths": examine_slow_paths,
    "loss": examine_loss,
    "gradients": examine_gradients,
    "custom functions": examine_custom_functions,
    "precision": examine_precision,
    "learning rate": examine_learning_rate,
    "memory": examine_memory,
    "time": examine_time,
    "growth": examine_growth,
    "processes": examine_processes,
    "bisect": culprit,
    "parts": examine_parts,
    "symptom": examine_symptom,
}
# after a problem of the first ones the later ones would only repeat it
GATES = ("loader", "devices", "batch", "loss")
# and after an error in one of these, or a gradient that is not finite, the later ones would find it again
STEPS = ("gradients", "learning rate", "memory")
ORDER = tuple(name for name in PROBES if name not in ("bisect", "parts", "symptom"))


def work(source: Source, jobs: Sequence[Job], position: Position, time_limit: float, tell: Callable[..., None]) -> None:
    """The child: load the subject, make the examinations, tell of each when it begins and ends."""
    patient = Patient(source.load(), position, time_limit)
    for index, job in enumerate(jobs):
        tell(began=index)
        patient.begin()
        try:
            verdicts = PROBES[job.name](patient, *job.arguments)
        except Exception as error:  # whatever a user's step raises in one of many passes
            verdicts = [failure(error, patient)]
        broken = any(verdict.level is Level.PROBLEM for verdict in verdicts)
        # with no batch there is nothing to examine
        stop = broken and (job.name in GATES[1:] or (job.name == "loader" and patient.subject.batch is None))
        stop = stop or (job.name in STEPS and any(_repeats(verdict) for verdict in verdicts))
        tell(ended=index, verdicts=[_plain(verdict) for verdict in verdicts], stop=stop)
        if stop:
            return


def _repeats(verdict: Verdict) -> bool:
    return "error" in verdict.figures or verdict.name == "gradient is not finite"


def _plain(verdict: Verdict) -> dict[str, Any]:
    return verdict.as_dict()
