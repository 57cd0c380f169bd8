"""Is a backend right? Its 2-D scan on small random problems, held to the reference in fp64: output and every gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .library import SS2DScan
from .reference import ss2d_scan_reference

__all__ = ["TOLERANCE", "Verdict", "error", "judge"]

# ||out - reference|| / ||reference||, the reference in fp64 on the same (rounded) inputs. fp64: the figure.
# fp32: ten roundings of 1.2e-7, what the reference loses in fp32 on small problems. bf16, fp16: one rounding of the
# result.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

_NAMES = ("y", "gx", "gp", "gdt_weight", "gdt_bias", "gA", "gD")


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


def judge(backend: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Verdict:
    """Hold one backend to the reference on two small problems, N = 1 and N = 16, of an awkward size.

    Args:
        backend: a name in `vmamba.ops.backends(device)`.
        device: where it runs; the reference runs on the CPU.
        dtype: of x and p, a key of `TOLERANCE`; weights are fp32 (fp64 for fp64).

    Returns:
        the worst of output and gradients over both problems. What the backend raises is told in the verdict.
    """
    worst = Verdict(backend, _name(dtype), 0.0, "y", TOLERANCE[dtype])
    for N in (1, 16):
        problem, gy = _problem(N, dtype)
        wanted = _results(lambda *inputs: ss2d_scan_reference(*inputs, "cross2d"), [t.double() for t in problem], gy)
        try:
            found = _results(
                lambda *inputs: SS2DScan.apply(*inputs, "cross2d", backend, True)[0], [t.to(device) for t in problem], gy
            )
        # a kernel can fail in any way, and a verdict is asked for, not an end
        except Exception as exception:
            return worst._replace(error=float("inf"), raised=f"{type(exception).__name__}: {exception}")
        for name, out, reference in zip(_NAMES, found, wanted, strict=True):
            if (e := error(out.cpu(), reference)) > worst.error:
                worst = worst._replace(error=e, where=f"{name}, N = {N}")
    return worst


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _problem(N: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """(x, p, dt_weight, dt_bias, A, D) and the gradient of y: sizes that no tile divides, decays of a trained model."""
    B, H, W, E, R, K = 2, 7, 13, 40, 3, 4
    generator = torch.Generator().manual_seed(N)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    pixels = [randn(B, H, W, E), randn(B, H, W, K * (R + 2 * N))]
    decay = -4 * torch.rand(K * E, N, generator=generator, dtype=torch.float64) - 0.1
    weights = [0.3 * randn(K, E, R), randn(K, E) - 2, decay, randn(K * E)]
    weights_dtype = torch.promote_types(dtype, torch.float32)
    problem = [t.to(dtype) for t in pixels] + [t.to(weights_dtype) for t in weights]
    return problem, randn(B, H, W, E).to(dtype)


def _results(scan, inputs: list[Tensor], gy: Tensor) -> tuple[Tensor, ...]:
    """y and its gradients with respect to the six inputs."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = scan(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, gy.to(y)))
