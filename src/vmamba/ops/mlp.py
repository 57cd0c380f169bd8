"""The MLP of a block with its norm and residual sum as one operator that has gradients.

    out = x + scale fc2(gelu(h)),    h = fc1(LayerNorm(x))

In training, layer by layer, a block's MLP writes its normalised input, h and gelu(h) and keeps all three: of the 7.8 GB
that VMamba-T takes for 128 images, gelu(h) alone is 1.6. Here one kernel reads x and writes out and h, and only those
that cannot be made again cheaply are kept: x and h. The backward is plain torch operations, so that torch.compile
fuses what there is to fuse: gelu(h) is made in the pass that makes its gradient.

Source: VMamba (arXiv 2401.10166), figure 3, for what is computed together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .dispatch import BACKENDS, choose
from .inference import joined_dtype

__all__ = ["norm_mlp_kept", "training_dtype"]

# Wider, a block's products are the library's, which is then faster than one kernel for all of it: see
# `triton_backend.dense`.
_WIDEST = 192


def training_dtype(x: Tensor, width: int) -> torch.dtype | None:
    """The dtype in which `norm_mlp_kept` should compute on x (..., C) with `width` hidden channels, or None where
    layer by layer is better: in fp32, without kernels for it, while no gradients are recorded.
    """
    if not torch.is_grad_enabled() or x.shape[-1] > _WIDEST or x.shape[-1] % 32 or width % 64:
        return None
    return joined_dtype(x)


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
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "the backward of the joined MLP cannot be differentiated again: for second derivatives run the "
                "network in fp32, layer by layer"
            )
        x, norm_weight, norm_bias, weight1, weight2, scale, hidden = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return (*_backward(gout, x, norm_weight, norm_bias, weight1, weight2, scale, hidden, ctx.eps), *[None] * 3)


def _backward(gout, x, norm_weight, norm_bias, weight1, weight2, scale, hidden, eps) -> tuple[Tensor, ...]:
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


torch.library.define(
    "vmamba::norm_mlp_kept",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight1, Tensor bias1, Tensor weight2, "
    "Tensor bias2, Tensor? scale, ScalarType dtype) -> (Tensor, Tensor)",
)


@torch.library.impl("vmamba::norm_mlp_kept", "default")
@torch.no_grad()
def _norm_mlp_kept(x, *args):
    kernels = BACKENDS[choose("auto", x.device.type)].joined
    # contiguous whichever runs: the one answer that the fake can give
    return tuple(t.contiguous() for t in (plain_norm_mlp if kernels is None else kernels.norm_mlp_kept)(x, *args))


def plain_norm_mlp(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, scale, dtype):
    """What the operator is, by torch's own operations: (out, hidden)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), eps).to(dtype)
    hidden = F.linear(normed, weight1.to(dtype), bias1.to(dtype))
    y = F.linear(F.gelu(hidden), weight2.to(dtype), bias2.to(dtype))
    return x + (y if scale is None else y * scale.to(dtype).view(-1, *[1] * (x.ndim - 1))), hidden


@torch.library.register_fake("vmamba::norm_mlp_kept")
def _(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, scale, dtype):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], weight1.shape[0]), dtype=dtype)


@register_flop_formula(torch.ops.vmamba.norm_mlp_kept)
def _(x, norm_weight, norm_bias, eps, weight1, *args, out_shape=None, **kwargs) -> int:
    return 4 * math.prod(x) * weight1[0]
