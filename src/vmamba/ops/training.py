"""Operators with gradients that join what a network does between two large tensors.

    norm_mlp_kept     the MLP of a block with its norm and residual sum
    conv_norm_kept    a convolution of the stem or between stages with its norm, and GELU where there is one

In training, layer by layer, a block's MLP writes its normalised input, h = fc1(LayerNorm(x)) and gelu(h), and keeps all
three: of the 7.8 GB that VMamba-T takes for 128 images, gelu(h) alone is 1.6. Here one kernel reads x and writes the
result and h, and only x and h are kept; the rest is made again. The backwards are plain torch operations, so that
torch.compile fuses what there is to fuse: gelu(h) is made in the pass that makes its gradient.

Source: VMamba (arXiv 2401.10166), figure 3 and section 4.3, for what is computed together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .dispatch import BACKENDS, choose

__all__ = ["WIDEST_CONV", "WIDEST_MLP", "conv_norm_kept", "norm_mlp_kept"]

# Channels up to which one kernel for all of it is faster than the library's products and what is between them (C of an
# MLP, output channels of a convolution): see `triton_backend`.
WIDEST_MLP = 192
WIDEST_CONV = 256

_SECOND_ORDER = (
    "the backward of a joined operator cannot be differentiated again: for second derivatives run the network in fp32, "
    "layer by layer"
)


def norm_mlp_kept(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x + scale (weight2 gelu(weight1 LayerNorm(x) + bias1) + bias2), with gradients for everything but scale.

    Args:
        x: (B, ..., C), any float dtype.
        norm_weight, norm_bias: (C,). eps: added to the variance.
        weight1: (N, C). bias1: (N,). weight2: (C, N). bias2: (C,). Any float dtypes, cast to `dtype` in products.
        scale: (B,), a factor for each image, as stochastic depth has, or None for 1.
        dtype: of the products; norm, GELU and sums are fp32.

    Returns:
        (B, ..., C) in x's dtype.

    Raises:
        NotImplementedError: when second derivatives are asked for.
    """
    tensors = (x, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    return NormMlp.apply(*tensors, scale, eps, dtype)[0]


def conv_norm_kept(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    gelu: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """act(LayerNorm(conv(x) + bias)), the convolution 3x3 of stride 2, padded by 1, with gradients.

    Args:
        x: (B, C, H, W) of any strides, any float dtype.
        weight: (C', C, 3, 3). bias, norm_weight, norm_bias: (C',). Any float dtypes. eps: added to the variance.
        gelu: whether the activation is GELU, or none.
        dtype: of the convolution; norm and GELU are fp32.
        out_dtype: of the result.

    Returns:
        (B, ceil(H/2), ceil(W/2), C').

    Raises:
        NotImplementedError: when second derivatives are asked for.
    """
    return ConvNorm.apply(x, weight, bias, norm_weight, norm_bias, eps, gelu, dtype, out_dtype)[0]


def _refuse_second_order() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(_SECOND_ORDER)


class NormMlp(torch.autograd.Function):
    """`vmamba::norm_mlp_kept` with gradients."""

    @staticmethod
    def forward(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale, eps, dtype):
        return torch.ops.vmamba.norm_mlp_kept(
            x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, scale, dtype
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, norm_weight, norm_bias, weight1, _, weight2, _, scale, ctx.eps, ctx.dtype = inputs
        hidden = output[1]
        ctx.mark_non_differentiable(hidden)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight1, weight2, scale, hidden)

    @staticmethod
    def backward(ctx, gout, _):
        _refuse_second_order()
        x, norm_weight, norm_bias, weight1, weight2, scale, hidden = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return (
                *_mlp_backward(gout, x, norm_weight, norm_bias, weight1, weight2, scale, hidden, ctx.eps),
                *[None] * 3,
            )


def _mlp_backward(gout, x, norm_weight, norm_bias, weight1, weight2, scale, hidden, eps) -> tuple[Tensor, ...]:
    """The gradients of x, norm_weight, norm_bias, weight1, bias1, weight2 and bias2."""
    dtype, (C, N) = hidden.dtype, weight2.shape
    gy = gout if scale is None else gout * scale.to(gout.dtype).view(-1, *[1] * (x.ndim - 1))
    gy, h = gy.to(dtype).view(-1, C), hidden.view(-1, N)
    ga = gy @ weight2.to(dtype)
    gh = torch.ops.aten.gelu_backward(ga, h)
    wide = torch.promote_types(x.dtype, torch.float32)
    gweight2, gbias2 = gy.t() @ F.gelu(h), gy.sum(0, dtype=wide)
    weight, bias = norm_weight.to(wide), norm_bias.to(wide)
    normed, mean, rstd = torch.ops.aten.native_layer_norm(x.to(wide), [C], weight, bias, eps)
    gweight1, gbias1 = gh.t() @ normed.to(dtype).view(-1, C), gh.sum(0, dtype=wide)
    gnormed = (gh @ weight1.to(dtype)).view(x.shape)
    gx, gnorm_weight, gnorm_bias = torch.ops.aten.native_layer_norm_backward(
        gnormed.to(wide), x.to(wide), [C], mean, rstd, weight, bias, [True, True, True]
    )
    gx = (gout.to(wide) + gx).to(x.dtype)
    return (
        gx, gnorm_weight.to(norm_weight.dtype), gnorm_bias.to(norm_bias.dtype),
        gweight1.to(weight1.dtype), gbias1.to(weight1.dtype), gweight2.to(weight2.dtype), gbias2.to(weight2.dtype),
    )  # fmt: skip


class ConvNorm(torch.autograd.Function):
    """`vmamba::conv_norm_kept` with gradients."""

    @staticmethod
    def forward(x, weight, bias, norm_weight, norm_bias, eps, gelu, dtype, out_dtype):
        return torch.ops.vmamba.conv_norm_kept(x, weight, bias, norm_weight, norm_bias, eps, gelu, dtype, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, norm_weight, norm_bias, _, ctx.gelu, ctx.dtype, _ = inputs
        _, normed, rstd = output
        ctx.mark_non_differentiable(normed, rstd)
        ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, normed, rstd)

    @staticmethod
    def backward(ctx, gout, *_):
        _refuse_second_order()
        x, weight, bias, norm_weight, norm_bias, normed, rstd = ctx.saved_tensors
        wide, dtype = torch.promote_types(gout.dtype, torch.float32), ctx.dtype
        scale = norm_weight.to(wide)
        n, g = normed.to(wide), gout.to(wide)
        if ctx.gelu:
            g = torch.ops.aten.gelu_backward(g, n * scale + norm_bias.to(wide))
        gnorm_weight, gnorm_bias = (g * n).sum((0, 1, 2)), g.sum((0, 1, 2))
        g = g * scale
        g = rstd[..., None] * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
        # as torch convolves it: the image, and what its gradient is taken of, channels last
        image = x.to(dtype).contiguous(memory_format=torch.channels_last)
        gx, gweight, gbias = torch.ops.aten.convolution_backward(
            g.to(dtype).permute(0, 3, 1, 2), image, weight.to(dtype), [weight.shape[0]],
            [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [ctx.needs_input_grad[0], True, True],
        )  # fmt: skip
        return (
            None if gx is None else gx.to(x.dtype), gweight.to(weight.dtype), gbias.to(bias.dtype),
            gnorm_weight.to(norm_weight.dtype), gnorm_bias.to(norm_bias.dtype), *[None] * 4,
        )  # fmt: skip


torch.library.define(
    "vmamba::conv_norm_kept",
    "(Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps, bool gelu, "
    "ScalarType dtype, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "vmamba::norm_mlp_kept",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight1, Tensor bias1, Tensor weight2, "
    "Tensor bias2, Tensor? scale, ScalarType dtype) -> (Tensor, Tensor)",
)


@torch.library.impl("vmamba::norm_mlp_kept", "default")
@torch.no_grad()
def _norm_mlp_kept(x, *args):
    kernels = BACKENDS[choose("auto", x.device.type)].joined
    kept = None if kernels is None else kernels.norm_mlp_kept(x, *args)
    # contiguous whichever runs: the one answer that the fake can give
    return tuple(t.contiguous() for t in kept or plain_norm_mlp(x, *args))


def plain_norm_mlp(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, scale, dtype):
    """What the operator is, by torch's own operations: (out, hidden)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), eps).to(dtype)
    hidden = F.linear(normed, weight1.to(dtype), bias1.to(dtype))
    y = F.linear(F.gelu(hidden), weight2.to(dtype), bias2.to(dtype))
    return x + (y if scale is None else y * scale.to(dtype).view(-1, *[1] * (x.ndim - 1))), hidden


@torch.library.impl("vmamba::conv_norm_kept", "default")
@torch.no_grad()
def _conv_norm_kept(x, *args):
    kernels = BACKENDS[choose("auto", x.device.type)].joined
    return tuple(t.contiguous() for t in (plain_conv_norm if kernels is None else kernels.conv_norm_kept)(x, *args))


def plain_conv_norm(x, weight, bias, norm_weight, norm_bias, eps, gelu, dtype, out_dtype):
    """What the operator is, by torch's own operations: (out, the normalised convolution, 1 / its deviation)."""
    wide = torch.promote_types(dtype, torch.float32)
    y = F.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), stride=2, padding=1).permute(0, 2, 3, 1).to(wide)
    y = y - y.mean(-1, keepdim=True)
    rstd = torch.rsqrt(y.square().mean(-1) + eps)
    normed = y * rstd[..., None]
    out = normed * norm_weight.to(wide) + norm_bias.to(wide)
    return (F.gelu(out) if gelu else out).to(out_dtype), normed.to(dtype), rstd


@torch.library.register_fake("vmamba::conv_norm_kept")
def _(x, weight, bias, norm_weight, norm_bias, eps, gelu, dtype, out_dtype):
    pixels = (x.shape[0], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)
    out, normed = (x.new_empty((*pixels, weight.shape[0]), dtype=d) for d in (out_dtype, dtype))
    return out, normed, x.new_empty(pixels, dtype=torch.promote_types(dtype, torch.float32))


@torch.library.register_fake("vmamba::norm_mlp_kept")
def _(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, scale, dtype):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], weight1.shape[0]), dtype=dtype)


@register_flop_formula(torch.ops.vmamba.norm_mlp_kept)
def _(x, norm_weight, norm_bias, eps, weight1, *args, out_shape=None, **kwargs) -> int:
    return 4 * math.prod(x) * weight1[0]


@register_flop_formula(torch.ops.vmamba.conv_norm_kept)
def _(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(out_shape[0]) * math.prod(weight[1:])
