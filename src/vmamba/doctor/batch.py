"""Before anything runs: where model and batch are, and what is in them."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from .patient import Patient
from .subject import leaves
from .verdict import Level, Verdict
from .wording import listed, number, plural

__all__ = ["examine_batch", "examine_devices"]

# pixels as decoders give them reach 255; normalised ones about 3
LARGEST_PIXEL = 50.0


def examine_devices(patient: Patient) -> list[Verdict]:
    """Everything on one device."""
    subject = patient.subject
    places: dict[str, list[str]] = defaultdict(list)
    for kind in (subject.model.named_parameters, subject.model.named_buffers):
        for name, tensor in kind():
            places[str(tensor.device)].append(name)
    if "meta" in places:
        names = places["meta"]
        return [
            Verdict(
                Level.PROBLEM,
                "mixed devices" if len(places) > 1 else "model on the meta device",
                f"{plural(len(names), 'tensor')} of the model on the meta device, without values: {listed(names)}.",
                "Give them values: model.to_empty(device=...), then initialise or load weights; or build the model "
                "outside torch.device('meta').",
                {"devices": {place: len(found) for place, found in places.items()}},
            )
        ]
    if len(places) > 1:
        home = max(places, key=lambda place: len(places[place]))
        others = [f"{listed(names)} on {place}" for place, names in places.items() if place != home]
        return [
            Verdict(
                Level.PROBLEM,
                "mixed devices",
                f"The model is on {home}, but {'; '.join(others)}.",
                f"Call model.to({home!r}) after the model is complete. Tensors that a module makes should be buffers "
                "(register_buffer), and layers added later be moved, too.",
                {"devices": {place: len(found) for place, found in places.items()}},
            )
        ]
    home = next(iter(places), None)
    # a single number may stay on the CPU
    stray = [
        (name, str(tensor.device))
        for name, tensor, _ in leaves(subject.batch)
        if home is not None and str(tensor.device) != home and tensor.ndim
    ]
    if stray:
        return [
            Verdict(
                Level.PROBLEM,
                "mixed devices",
                f"The model is on {home}, but the batch's {listed([f'{name} on {place}' for name, place in stray])}.",
                f"Move every batch before the step: tensor.to({home!r}, non_blocking=True), nested ones too.",
                {"model": home, "batch": dict(stray)},
            )
        ]
    return [Verdict(Level.OK, "devices", f"Model and batch are on {home or 'no device'}.", figures={"device": home})]


def examine_batch(patient: Patient) -> list[Verdict]:
    """Inputs and targets there, finite, and of a size that networks take."""
    found = []
    tensors = list(leaves(patient.subject.batch))
    # an image without objects has empty boxes: only what the model looks at must not be empty
    empty = [name for name, tensor, role in tensors if role == "input" and tensor.numel() == 0]
    if empty or not tensors:
        what = f"{listed(empty)} of the batch" if empty else "The batch"
        found.append(
            Verdict(
                Level.PROBLEM,
                "batch is empty",
                f"{what} holds no numbers.",
                "Look at the collate function, and at the last batch of an epoch (drop_last=True).",
            )
        )
    for name, tensor, role in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            found.append(_not_finite(name, tensor, role))
    if found:
        return found
    for name, tensor, role in tensors:
        largest = float(tensor.abs().max()) if tensor.is_floating_point() and tensor.numel() else 0.0
        is_image = tensor.ndim >= 3 and (tensor.shape[-3] in (1, 3, 4) or tensor.shape[-1] in (1, 3, 4))
        if role == "input" and is_image and largest > LARGEST_PIXEL:
            found.append(
                Verdict(
                    Level.WARNING,
                    "input is not normalised",
                    f"The batch's {name} {tuple(tensor.shape)} reach {number(largest)}: networks expect images of "
                    "about mean 0 and deviation 1.",
                    "Divide by 255 and normalise with mean and standard deviation.",
                    {"largest": largest},
                )
            )
    if found:
        return found
    shapes = [f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for name, tensor, _ in tensors]
    return [Verdict(Level.OK, "batch", f"Finite: {listed(shapes, 4)}.")]


def _not_finite(name: str, tensor: Tensor, role: str) -> Verdict:
    nans, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    first = torch.nonzero(~tensor.isfinite())[0].tolist()
    holds = " and ".join(f"{count} {kind}" for count, kind in ((nans, "NaN"), (infinite, "Inf")) if count)
    remedy = {
        "input": "Find the sample and drop or repair it: a division by a standard deviation of 0, a damaged file and "
        "a logarithm of 0 are the usual sources. `vmamba data check` looks at every image.",
        "target": "Find the sample and drop or repair it. Targets from a logarithm or a division need a clamp first.",
    }
    return Verdict(
        Level.PROBLEM,
        f"{role} is not finite",
        f"The batch's {name} {tuple(tensor.shape)} hold {holds} in {tensor.numel()} values, the first at {first}.",
        remedy[role],
        {"tensor": name, "nan": nans, "inf": infinite, "first": first},
    )
