"""The Triton backend, for CUDA devices: fused kernels for SS2D and its convolution. Only these files import
triton, and at the first call.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Joined",
    "compile_ahead",
    "conv_backward",
    "conv_forward",
    "scan_backward",
    "scan_forward",
    "scan_states",
    "ss2d_backward",
    "ss2d_forward",
    "ss2d_states",
    "unavailable",
]

# asked once, here: torch.compile of torch 2.10 cannot trace the question
_INSTALLED = importlib.util.find_spec("triton") is not None

STEPS = 16  # of a tile: the rows of the smallest tensor-core product

# States are kept for backward up to this N. A state before each tile is for N = 1 half the memory of x in bf16, for N
# = 16 eight times x: there the backward walks forward once more instead.
_KEPT_N = 2

# Output channels up to which a strided convolution is one kernel with its norm: 96 -> 192 channels at 56 x 56, 128
# images, 0.093 ms. Beyond, at 192 -> 384, it takes what cuDNN's convolution and a norm take, and for one image twice.
_FUSED_CONV = 256

SCAN_STEPS = 128  # of the 1-D scan between two states that are kept for its backward


def unavailable(device_type: str) -> str | None:
    """Why the kernels cannot run on a device of that type, or None if they can."""
    if device_type != "cuda":
        return f"its kernels run on CUDA devices, not on {device_type}"
    if not _INSTALLED:
        return "the package triton is not installed"
    return None


def compile_ahead():
    from . import launch

    return launch.compile_ahead()


def ss2d_states(x: Tensor, A: Tensor, routes: str) -> tuple[int, ...]:
    """Shape of the states kept for backward: (B, K, T, N, E), one before each of a walk's T tiles; (0,) for none."""
    B, H, W, E = x.shape
    KE, N = A.shape
    if N > _KEPT_N or x.dtype == torch.float64:
        return (0,)
    return (B, KE // E, (H * W + STEPS - 1) // STEPS, N, E)


def ss2d_forward(x, p, dt_weight, dt_bias, A, D, routes, keep):
    from . import ss2d

    return ss2d.ss2d_forward(x, p, dt_weight, dt_bias, A, D, routes, keep and A.shape[1] <= _KEPT_N)


def ss2d_backward(gy, x, p, dt_weight, dt_bias, A, D, states, routes):
    from . import ss2d

    return ss2d.ss2d_backward(gy, x, p, dt_weight, dt_bias, A, D, states, routes)


def scan_states(u: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    """Shape of the states kept for backward: (batch, K*E, ceil(L / 128), N), one before each 128 steps, or (0,)."""
    n_states = -(-u.shape[2] // SCAN_STEPS)
    if u.numel() == 0 or n_states == 1 or u.dtype == torch.float64:
        return (0,)
    return (u.shape[0], u.shape[1], n_states, A.shape[1])


def scan_forward(u, delta, A, B, C, D, delta_bias, delta_softplus, keep):
    from . import scan1d

    return scan1d.scan_forward(u, delta, A, B, C, D, delta_bias, delta_softplus, keep)


def scan_backward(gy, u, delta, A, B, C, D, delta_bias, states, delta_softplus):
    from . import scan1d

    return scan1d.scan_backward(gy, u, delta, A, B, C, D, delta_bias, states, delta_softplus)


def conv_forward(x, weight, bias, activation):
    from . import dwconv

    return dwconv.conv_forward(x, weight, bias, activation)


def conv_backward(gy, x, weight, bias, activation):
    from . import dwconv

    return dwconv.conv_backward(gy, x, weight, bias, activation)


class Joined:
    """The functions of `ops.inference` and `ops.training` (see there)."""

    @staticmethod
    def norm_linear(x, norm_weight, norm_bias, eps, weight, bias, dtype):
        from . import dense

        return dense.norm_linear(x, norm_weight, norm_bias, eps, weight, bias, dtype)

    @staticmethod
    def norm_mlp(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, dtype):
        from . import dense

        return dense.norm_mlp(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, dtype, x.dtype)

    @staticmethod
    def norm_mlp_kept(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, scale, dtype):
        from . import dense

        return dense.norm_mlp_kept(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, scale, dtype)

    @staticmethod
    def linear_residual(y, weight, bias, residual):
        from . import dense

        return dense.linear_residual(y, weight, bias, residual, residual.dtype)

    @staticmethod
    def depthwise_silu(x, weight, bias):
        from . import dwconv

        return dwconv.conv_forward(x, weight, bias, "silu")

    @staticmethod
    def ss2d_norm(x, x_proj_weight, dt_weight, dt_bias, A_log, D, routes, norm_weight, norm_bias, eps):
        from . import dense, ss2d

        p = dense.linear(x, x_proj_weight.flatten(0, 1))
        return ss2d.ss2d_norm_forward(x, p, dt_weight, dt_bias, A_log, D, routes, norm_weight, norm_bias, eps)

    @staticmethod
    def ss2d_residual(
        x, x_proj_weight, dt_weight, dt_bias, A_log, D, routes, norm_weight, norm_bias, eps, weight, bias, residual
    ):
        from . import dense, ss2d

        p = dense.linear(x, x_proj_weight.flatten(0, 1))
        scan, norm = (x, p, dt_weight, dt_bias, A_log, D, routes), (norm_weight, norm_bias, eps)
        if dense.takes_parts(x, weight):
            parts = ss2d.few_outputs(*scan)
            if parts is not None:
                return dense.norm_linear_residual(parts, *norm, weight, bias, residual)
        return dense.linear_residual(ss2d.ss2d_norm_forward(*scan, *norm), weight, bias, residual, residual.dtype)

    @staticmethod
    def conv_norm_gelu(image, weight, bias, norm_weight, norm_bias, eps, dtype):
        from . import stem

        return stem.conv_norm_gelu(image, weight, bias, norm_weight, norm_bias, eps, dtype)

    @staticmethod
    def conv_norm(x, weight, bias, norm_weight, norm_bias, eps, dtype, out_dtype):
        from . import dense, stem

        if weight.shape[0] <= _FUSED_CONV:
            return stem.conv_norm(x, weight, bias, norm_weight, norm_bias, eps, dtype, out_dtype)
        images = x.permute(0, 3, 1, 2).to(dtype)
        y = F.conv2d(images, weight.to(dtype), bias.to(dtype), stride=2, padding=1).permute(0, 2, 3, 1)
        return dense.layer_norm(y.contiguous(), norm_weight, norm_bias, eps, out_dtype)

    @staticmethod
    def conv_norm_kept(x, weight, bias, norm_weight, norm_bias, eps, gelu, dtype, out_dtype):
        from . import stem

        return stem.conv_norm_kept(x, weight, bias, norm_weight, norm_bias, eps, gelu, dtype, out_dtype)
