"""Operators without gradients that join what a block does between two large tensors: fewer kernels, fewer bytes.

A block of VMamba is, without them, a dozen memory-bound kernels around its scan and matrix products. Each function here
takes the residual stream as it is (fp32 under autocast) and computes in `dtype`, with statistics and sums in fp32;
weights may be of another floating dtype and are cast where they are read. On a device whose backend has no kernels for
them, they are the plain torch operations that they are defined by.

Source: VMamba (arXiv 2401.10166), figure 3, for what they compute together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import convolution
from .dispatch import BACKENDS, choose
from .library import ss2d_flops

__all__ = [
    "conv_norm",
    "conv_norm_gelu",
    "depthwise_silu",
    "linear_residual",
    "norm_linear",
    "norm_mlp",
    "ss2d_norm",
    "ss2d_residual",
]


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm(x) weight^T + bias: (..., C) -> (..., C') in `dtype`; weight (C', C), bias (C',) or None."""
    return torch.ops.vmamba.norm_linear(x, norm_weight, norm_bias, eps, weight, bias, dtype)


def norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """x + weight2 gelu(weight1 LayerNorm(x) + bias1) + bias2: (..., C) -> (..., C) in x's dtype, GELU exact.

    weight1 (hidden, C), bias1 (hidden,), weight2 (C, hidden), bias2 (C,).
    """
    return torch.ops.vmamba.norm_mlp(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, dtype)


def linear_residual(y: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + y weight^T + bias: y (..., E), residual (..., C) -> (..., C) in residual's dtype; computed in y's."""
    return torch.ops.vmamba.linear_residual(y, weight, bias, residual)


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(conv(x) + bias), depthwise 3x3, padded by 1: (B, H, W, E) in x's dtype; weight (E, 1, 3, 3), bias (E,)."""
    return torch.ops.vmamba.depthwise_silu(x, weight, bias)


def ss2d_norm(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    routes: str,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """LayerNorm of what the 2-D scan gives, (B, H, W, E) in x's dtype, in which x is projected too.

    A_log (K*E, N) is log(-A); the rest as in `ss2d`.
    """
    return torch.ops.vmamba.ss2d_norm(
        x, x_proj_weight, dt_weight, dt_bias, A_log, D, routes, norm_weight, norm_bias, eps
    )


def ss2d_residual(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    routes: str,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
) -> Tensor:
    """residual + ss2d_norm(x, ...) weight^T + bias: x (B, H, W, E), residual (B, H, W, C), in the latter's dtype.

    weight (C, E), bias (C,) or None; the rest as in `ss2d_norm`.
    """
    return torch.ops.vmamba.ss2d_residual(
        x, x_proj_weight, dt_weight, dt_bias, A_log, D, routes, norm_weight, norm_bias, eps, weight, bias, residual
    )


def conv_norm_gelu(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """gelu(LayerNorm(conv(image) + bias)), the convolution 3x3 of stride 2, padded by 1.

    (B, C, H, W) -> (B, ceil(H/2), ceil(W/2), C') in `dtype`; weight (C', C, 3, 3).
    """
    return torch.ops.vmamba.conv_norm_gelu(image, weight, bias, norm_weight, norm_bias, eps, dtype)


def conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """LayerNorm(conv(x) + bias), the convolution 3x3 of stride 2, padded by 1, computed in `dtype`.

    (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C') in `out_dtype`; weight (C', C, 3, 3).
    """
    return torch.ops.vmamba.conv_norm(x, weight, bias, norm_weight, norm_bias, eps, dtype, out_dtype)


class Plain:
    """What the operators are: torch's own operations, one after another."""

    @staticmethod
    def norm_linear(x, norm_weight, norm_bias, eps, weight, bias, dtype):
        x = _layer_norm(x, norm_weight, norm_bias, eps, dtype)
        return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def norm_mlp(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, dtype):
        h = Plain.norm_linear(x, norm_weight, norm_bias, eps, weight1, bias1, dtype)
        return Plain.linear_residual(F.gelu(h), weight2, bias2, x)

    @staticmethod
    def linear_residual(y, weight, bias, residual):
        return residual + F.linear(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype))

    @staticmethod
    def depthwise_silu(x, weight, bias):
        return convolution.conv(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), "silu")

    @staticmethod
    def ss2d_norm(x, x_proj_weight, dt_weight, dt_bias, A_log, D, routes, norm_weight, norm_bias, eps):
        p = F.linear(x, x_proj_weight.flatten(0, 1).to(x.dtype))
        # fp32 (or better): exp of a rounded A_log would move every time constant
        A = -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
        y, _ = torch.ops.vmamba.ss2d_scan(x, p, dt_weight, dt_bias, A, D, routes, "auto", False)
        return _layer_norm(y, norm_weight, norm_bias, eps, x.dtype)

    @staticmethod
    def ss2d_residual(x, *args):
        *scan, weight, bias, residual = args
        return Plain.linear_residual(Plain.ss2d_norm(x, *scan), weight, bias, residual)

    @staticmethod
    def conv_norm_gelu(image, weight, bias, norm_weight, norm_bias, eps, dtype):
        x = image.permute(0, 2, 3, 1)
        return F.gelu(Plain.conv_norm(x, weight, bias, norm_weight, norm_bias, eps, dtype, dtype))

    @staticmethod
    def conv_norm(x, weight, bias, norm_weight, norm_bias, eps, dtype, out_dtype):
        y = F.conv2d(x.permute(0, 3, 1, 2).to(dtype), weight.to(dtype), bias.to(dtype), stride=2, padding=1)
        return _layer_norm(y.permute(0, 2, 3, 1), norm_weight, norm_bias, eps, out_dtype)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(dtype)


_NORM = "Tensor norm_weight, Tensor norm_bias, float eps"
_SS2D = "Tensor x, Tensor x_proj_weight, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, str routes"
_SCHEMAS = {
    "norm_linear": f"(Tensor x, {_NORM}, Tensor weight, Tensor? bias, ScalarType dtype) -> Tensor",
    "norm_mlp": f"(Tensor x, {_NORM}, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, ScalarType dtype)"
    " -> Tensor",
    "linear_residual": "(Tensor y, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
    "depthwise_silu": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "ss2d_norm": f"({_SS2D}, {_NORM}) -> Tensor",
    "ss2d_residual": f"({_SS2D}, {_NORM}, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
    "conv_norm_gelu": f"(Tensor image, Tensor weight, Tensor bias, {_NORM}, ScalarType dtype) -> Tensor",
    "conv_norm": f"(Tensor x, Tensor weight, Tensor bias, {_NORM}, ScalarType dtype, ScalarType out_dtype) -> Tensor",
}


def _register(name: str) -> None:
    @torch.library.impl(f"vmamba::{name}", "default")
    @torch.no_grad()
    def _(first, *args):
        kernels = BACKENDS[choose("auto", first.device.type)].joined
        # contiguous whichever runs: the one answer that the fake can give
        return getattr(kernels or Plain, name)(first, *args).contiguous()


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"vmamba::{_name}", _schema)
    _register(_name)


def _half(size):
    return (size + 1) // 2


@torch.library.register_fake("vmamba::norm_linear")
def _(x, norm_weight, norm_bias, eps, weight, bias, dtype):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("vmamba::norm_mlp")
def _(x, *args):
    return x.new_empty(x.shape)


@torch.library.register_fake("vmamba::linear_residual")
def _(y, weight, bias, residual):
    return residual.new_empty(residual.shape)


@torch.library.register_fake("vmamba::depthwise_silu")
def _(x, *args):
    return x.new_empty(x.shape)


@torch.library.register_fake("vmamba::ss2d_norm")
def _(x, *args):
    return x.new_empty(x.shape)


@torch.library.register_fake("vmamba::ss2d_residual")
def _(x, *args):
    residual = args[-1]
    return residual.new_empty(residual.shape)


@torch.library.register_fake("vmamba::conv_norm_gelu")
def _(image, weight, bias, norm_weight, norm_bias, eps, dtype):
    B, _, H, W = image.shape
    return image.new_empty((B, _half(H), _half(W), weight.shape[0]), dtype=dtype)


@torch.library.register_fake("vmamba::conv_norm")
def _(x, weight, bias, norm_weight, norm_bias, eps, dtype, out_dtype):
    B, H, W, _ = x.shape
    return x.new_empty((B, _half(H), _half(W), weight.shape[0]), dtype=out_dtype)


# as torch counts its own: the matrix products and convolutions alone


@register_flop_formula(torch.ops.vmamba.norm_linear)
def _(x, norm_weight, norm_bias, eps, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(torch.ops.vmamba.norm_mlp)
def _(x, norm_weight, norm_bias, eps, weight1, *args, out_shape=None, **kwargs) -> int:
    return 4 * math.prod(x) * weight1[0]


@register_flop_formula(torch.ops.vmamba.linear_residual)
def _(y, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(y) * weight[0]


@register_flop_formula(torch.ops.vmamba.depthwise_silu)
def _(x, *args, out_shape=None, **kwargs) -> int:
    return 2 * 9 * math.prod(x)


@register_flop_formula(torch.ops.vmamba.ss2d_norm)
def _(x, x_proj_weight, dt_weight, dt_bias, A_log, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x) * math.prod(x_proj_weight[:2]) + ss2d_flops(x, dt_weight, A_log)


@register_flop_formula(torch.ops.vmamba.ss2d_residual)
def _(x, x_proj_weight, dt_weight, dt_bias, A_log, D, *args, out_shape=None, **kwargs) -> int:
    columns = math.prod(x_proj_weight[:2]) + out_shape[-1]
    return 2 * math.prod(x) * columns + ss2d_flops(x, dt_weight, A_log)


@register_flop_formula([torch.ops.vmamba.conv_norm_gelu, torch.ops.vmamba.conv_norm])
def _(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])
