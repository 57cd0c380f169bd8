"""Is a backend right? What a network runs of it, on small random problems against fp64, outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import convolution
from .dispatch import BACKENDS
from .library import DepthwiseConv3x3, SS2DScan
from .reference import ss2d_scan_reference

__all__ = ["TOLERANCE", "Verdict", "error", "judge"]

# ||out - reference|| / ||reference||, the reference in fp64 on the same (rounded) inputs. fp64: the figure.
# fp32: ten roundings of 1.2e-7, what the reference loses in fp32 on small problems. bf16, fp16: one rounding of the
# result.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||; infinite for NaN."""
    difference = (out.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)
    return difference.item() if difference.isfinite() else float("inf")


class Verdict(NamedTuple):
    """What `judge` found: the largest error, where it was, what is allowed, and what was raised if anything was."""

    backend: str
    dtype: str
    error: float
    where: str
    tolerance: float
    raised: str = ""

    @property
    def right(self) -> bool:
        return not self.raised and self.error <= self.tolerance

    def __str__(self) -> str:
        subject = f"backend {self.backend!r} in {self.dtype}"
        if self.raised:
            return f"{subject} FAILED: {self.raised}"
        relation, outcome = ("<=", "right") if self.right else (">", "WRONG")
        figures = f"error {self.error:.1e} {relation} {self.tolerance:.0e}, at {self.where}"
        return f"{subject} {outcome} against the fp64 reference: {figures}"


class Trial(NamedTuple):
    """One problem: a backend's operator, what defines it, and its inputs by name."""

    title: str
    operator: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: dict[str, Tensor]
    gy: Tensor


def judge(backend: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Verdict:
    """Hold one backend to the references: its 2-D scan, and its depthwise convolution if it has one of its own.

    Args:
        backend: a name in `vmamba.ops.backends(device)`.
        device: where it runs; the references run on the CPU.
        dtype: of images, a key of `TOLERANCE`; the scan's weights are fp32 (fp64 for fp64).

    Returns:
        the worst of outputs and gradients over all problems. What the backend raises is told in the verdict.
    """
    worst = Verdict(backend, _name(dtype), 0.0, "", TOLERANCE[dtype])
    try:
        for trial in _trials(backend, dtype):
            inputs = trial.inputs.values()
            found = _results(trial.operator, [t.to(device) for t in inputs], trial.gy)
            wanted = _results(trial.reference, [t.double() for t in inputs], trial.gy)
            names = ("y", *(f"gradient of {name}" for name in trial.inputs))
            for name, out, reference in zip(names, found, wanted, strict=True):
                if (e := error(out.cpu(), reference)) >= worst.error:
                    worst = worst._replace(error=e, where=f"{name} of {trial.title}")
    # a kernel can fail in any way, and a verdict is asked for, not an end
    except Exception as exception:
        return worst._replace(error=float("inf"), raised=f"{type(exception).__name__}: {exception}")
    return worst


def _trials(backend: str, dtype: torch.dtype) -> Iterator[Trial]:
    """Sizes that no tile divides and one that tiles do, with steps and decays as in a trained network."""
    for N, sides, E in ((1, (7, 13), 40), (1, (16, 16), 64), (16, (7, 13), 40)):
        B, R, K = 2, 3, 4
        generator = torch.Generator().manual_seed(N)
        x, p, gy = (_randn(generator, B, *sides, c).to(dtype) for c in (E, K * (R + 2 * N), E))
        weights = {
            "dt_weight": 0.3 * _randn(generator, K, E, R),
            "dt_bias": _randn(generator, K, E) - 2,
            "A": -4 * torch.rand(K * E, N, generator=generator, dtype=torch.float64) - 0.1,
            "D": _randn(generator, K * E),
        }
        weights = {name: t.to(torch.promote_types(dtype, torch.float32)) for name, t in weights.items()}
        yield Trial(
            f"the scan, {sides[0]} x {sides[1]} x {E}, N = {N}",
            lambda *inputs: SS2DScan.apply(*inputs, "cross2d", backend, True)[0],
            lambda *inputs: ss2d_scan_reference(*inputs, "cross2d"),
            {"x": x, "p": p, **weights},
            gy,
        )
    if BACKENDS[backend].conv_forward is convolution.conv:
        return
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, gy = (
        _randn(generator, *s).to(dtype) for s in ((2, 7, 13, 40), (40, 1, 3, 3), (40,), (2, 7, 13, 40))
    )
    yield Trial(
        "the convolution",
        lambda *inputs: DepthwiseConv3x3.apply(*inputs, "silu", backend),
        lambda *inputs: convolution.conv(*inputs, "silu"),
        {"x": x, "weight": weight, "bias": bias},
        gy,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _results(operator: Callable[..., Tensor], inputs: list[Tensor], gy: Tensor) -> tuple[Tensor, ...]:
    """y and its gradients with respect to the inputs."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = operator(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, gy.to(y)))
