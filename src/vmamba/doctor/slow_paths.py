"""Paths that work and are silently slow: the portable scan on a machine with a GPU, a GPU that nobody uses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..layers import SS2D
from ..ops import backends
from ..ops.dispatch import BackendStatus
from .environment import slow_variables
from .patient import Patient
from .verdict import Level, Verdict

__all__ = ["Offers", "examine_slow_paths", "judge_paths", "offers_of"]


@dataclass(frozen=True)
class Offers:
    """What a machine offers: the name of its GPU (None: it has none), the scan's backends on the subject's device."""

    gpu: str | None
    backends: Mapping[str, BackendStatus]


def offers_of(device: torch.device) -> Offers:
    """What this machine offers a model on ``device``."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Offers(gpu, backends(device))


def examine_slow_paths(patient: Patient) -> list[Verdict]:
    """Which backend the model's scans run on, whether there is a faster one, and switches that slow a step down."""
    subject = patient.subject
    found = [*(slow_variables(os.environ) if subject.device.type == "cuda" else ()), *_anomaly_detection()]
    scans = any(isinstance(module, SS2D) for module in subject.model.modules())
    return [*found, *judge_paths(subject.device, scans, offers_of(subject.device))]


def _anomaly_detection() -> list[Verdict]:
    if not torch.is_anomaly_enabled():
        return []
    return [
        Verdict(
            Level.WARNING,
            "anomaly detection is on",
            "torch.autograd.set_detect_anomaly is on: every operator writes its stack down, and backward looks for NaN "
            "after each, several times slower.",
            "Switch it off, or put it around the few steps in which you look for a NaN.",
        )
    ]


def judge_paths(device: torch.device, scans: bool, offers: Offers) -> list[Verdict]:
    """The verdict for a model on ``device``; ``scans``: it contains our scan, whose backends differ in speed."""
    if offers.gpu is not None and device.type == "cpu":
        return [
            Verdict(
                Level.WARNING,
                "GPU is not used",
                f"The model is on the CPU{', where its scans run on the portable backend' if scans else ''}, and the "
                f"machine has a GPU ({offers.gpu}).",
                "Move model and batches to it: model.to('cuda'), or run.device=cuda.",
                {"gpu": offers.gpu},
            )
        ]
    if not scans:
        return []
    chosen = next(name for name, status in offers.backends.items() if status.chosen)
    reasons = [f"{name}: {status.reason}" for name, status in offers.backends.items() if not status.available]
    if device.type == "cuda" and chosen != "triton":
        return [
            Verdict(
                Level.WARNING,
                "slow portable backend",
                f"On {offers.gpu} the scans run on the {chosen!r} backend, plain PyTorch, many times slower than the "
                f"kernels ({'; '.join(reasons)}).",
                "Install Triton as it comes with PyTorch for this GPU (pip install triton), and run `vmamba doctor` "
                "again: its first part says whether the kernels run.",
                {"backend": chosen, "reasons": reasons},
            )
        ]
    return [Verdict(Level.OK, "backend", f"Scans on {device} run on {chosen!r}.", figures={"backend": chosen})]
