"""The operators, registered: one schema, a fake for tracing, FLOP formulas, and autograd functions around them.

    vmamba::ss2d_scan, vmamba::ss2d_scan_backward              the 2-D scan of all routes
    vmamba::selective_scan, vmamba::selective_scan_backward    the 1-D scan
    vmamba::depthwise_conv3x3, vmamba::depthwise_conv3x3_backward

Gradients come from `torch.autograd.Function`s around the operators rather than from `torch.library.register_autograd`,
which breaks `torch.func.grad` and returns silently wrong forward-mode derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .dispatch import BACKENDS, choose

__all__ = ["DepthwiseConv3x3", "SS2DScan", "SelectiveScan", "apply", "is_transformed", "ss2d_flops"]

_SS2D = "Tensor x, Tensor p, Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D"
_SCAN = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias"

torch.library.define("vmamba::ss2d_scan", f"({_SS2D}, str routes, str backend, bool keep) -> (Tensor, Tensor)")
torch.library.define(
    "vmamba::ss2d_scan_backward",
    f"(Tensor gy, {_SS2D}, Tensor states, str routes, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "vmamba::selective_scan", f"({_SCAN}, bool delta_softplus, str backend, bool keep) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "vmamba::selective_scan_backward",
    f"(Tensor gy, {_SCAN}, Tensor states, bool delta_softplus, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "vmamba::depthwise_conv3x3", "(Tensor x, Tensor weight, Tensor? bias, str activation, str backend) -> Tensor"
)
torch.library.define(
    "vmamba::depthwise_conv3x3_backward",
    "(Tensor gy, Tensor x, Tensor weight, Tensor? bias, str activation, str backend) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("vmamba::ss2d_scan", "default")
@torch.no_grad()
def _ss2d_scan(x, p, dt_weight, dt_bias, A, D, routes, backend, keep):
    chosen = BACKENDS[choose(backend, x.device.type)]
    return chosen.ss2d_forward(x, p, dt_weight, dt_bias, A, D, routes, keep)


@torch.library.impl("vmamba::ss2d_scan_backward", "default")
@torch.no_grad()
def _ss2d_scan_backward(gy, x, p, dt_weight, dt_bias, A, D, states, routes, backend):
    chosen = BACKENDS[choose(backend, x.device.type)]
    return chosen.ss2d_backward(gy, x, p, dt_weight, dt_bias, A, D, states, routes)


@torch.library.impl("vmamba::selective_scan", "default")
@torch.no_grad()
def _selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, backend, keep):
    chosen = BACKENDS[choose(backend, u.device.type)]
    return chosen.scan_forward(u, delta, A, B, C, D, delta_bias, delta_softplus, keep)


@torch.library.impl("vmamba::selective_scan_backward", "default")
@torch.no_grad()
def _selective_scan_backward(gy, u, delta, A, B, C, D, delta_bias, states, delta_softplus, backend):
    chosen = BACKENDS[choose(backend, u.device.type)]
    return chosen.scan_backward(gy, u, delta, A, B, C, D, delta_bias, states, delta_softplus)


@torch.library.impl("vmamba::depthwise_conv3x3", "default")
@torch.no_grad()
def _depthwise_conv3x3(x, weight, bias, activation, backend):
    # contiguous whichever backend runs: the one answer that the fake can give
    return BACKENDS[choose(backend, x.device.type)].conv_forward(x, weight, bias, activation).contiguous()


@torch.library.impl("vmamba::depthwise_conv3x3_backward", "default")
@torch.no_grad()
def _depthwise_conv3x3_backward(gy, x, weight, bias, activation, backend):
    gradients = BACKENDS[choose(backend, x.device.type)].conv_backward(gy, x, weight, bias, activation)
    return tuple(t.contiguous() for t in gradients)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.register_fake("vmamba::ss2d_scan")
def _(x, p, dt_weight, dt_bias, A, D, routes, backend, keep):
    shape = BACKENDS[choose(backend, x.device.type)].ss2d_states(x, A, routes) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("vmamba::ss2d_scan_backward")
def _(gy, x, p, dt_weight, dt_bias, A, D, states, routes, backend):
    return tuple(t.new_empty(t.shape) for t in (x, p, dt_weight, dt_bias, A, D))


@torch.library.register_fake("vmamba::selective_scan")
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, backend, keep):
    shape = BACKENDS[choose(backend, u.device.type)].scan_states(u, A, B) if keep else (0,)
    last_state = u.new_empty((u.shape[0], u.shape[1], A.shape[1]), dtype=_state_dtype(u))
    return u.new_empty(u.shape), last_state, u.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("vmamba::selective_scan_backward")
def _(gy, u, delta, A, B, C, D, delta_bias, states, delta_softplus, backend):
    optional = (u.new_empty(0) if t is None else t.new_empty(t.shape) for t in (D, delta_bias))
    return (*(t.new_empty(t.shape) for t in (u, delta, A, B, C)), *optional)


@torch.library.register_fake("vmamba::depthwise_conv3x3")
def _(x, weight, bias, activation, backend):
    return x.new_empty(x.shape)


@torch.library.register_fake("vmamba::depthwise_conv3x3_backward")
def _(gy, x, weight, bias, activation, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _scan_flops(steps: int, N: int) -> int:
    """Operations of `steps` channel steps: 9 for each state (as the Mamba papers count), 2 for the skip D u."""
    return steps * (9 * N + 2)


def ss2d_flops(x, dt_weight, A) -> int:
    """Operations of the 2-D scan with delta's projection inside, from the arguments' shapes."""
    pixels, (K, E, R) = x[0] * x[1] * x[2], dt_weight
    return _scan_flops(pixels * K * E, A[1]) + 2 * pixels * K * E * R


@register_flop_formula(torch.ops.vmamba.ss2d_scan)
def _(x, p, dt_weight, dt_bias, A, D, *args, out_shape=None, **kwargs) -> int:
    return ss2d_flops(x, dt_weight, A)


@register_flop_formula(torch.ops.vmamba.ss2d_scan_backward)
def _(gy, x, p, dt_weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * ss2d_flops(x, dt_weight, args[1])  # as for a linear layer, twice the forward's


@register_flop_formula(torch.ops.vmamba.selective_scan)
def _(u, delta, A, *args, out_shape=None, **kwargs) -> int:
    return _scan_flops(u[0] * u[1] * u[2], A[1])


@register_flop_formula(torch.ops.vmamba.selective_scan_backward)
def _(gy, u, delta, A, *args, out_shape=None, **kwargs) -> int:
    return 2 * _scan_flops(u[0] * u[1] * u[2], A[1])


@register_flop_formula(torch.ops.vmamba.depthwise_conv3x3)
def _(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * 9 * math.prod(x)


@register_flop_formula(torch.ops.vmamba.depthwise_conv3x3_backward)
def _(gy, x, weight, *args, out_shape=None, **kwargs) -> int:
    # as torch counts a convolution's: the gradients of x and of the weight
    return 2 * 2 * 9 * math.prod(x)


def is_transformed() -> bool:
    """Whether a function transform (vmap, grad, forward mode) looks on."""
    # while torch.compile traces, the question is about the tracer, and the answer always yes
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`; where nobody asks for gradients its operator alone, which spares the host 50 us.

    So much takes `torch.autograd.Function` to bind the arguments of a function that has a `setup_context`.
    """
    recorded = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    if recorded or torch.compiler.is_compiling() or is_transformed():
        return function.apply(*args)
    return function.forward(*args)


def _one_by_one(function: type[torch.autograd.Function], size: int, in_dims: tuple, args: tuple) -> Any:
    """vmap by a loop over the mapped dimension: right for every choice of mapped arguments."""
    entries = [
        function.apply(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(entries[0], Tensor):
        return torch.stack(entries), 0
    outputs = tuple(torch.stack(parts) for parts in zip(*entries, strict=True))
    return outputs, (0,) * len(outputs)


_SECOND_ORDER = (
    "the scan's backward is hand-written and cannot be differentiated again: for second derivatives use "
    "backend='reference', which autograd differentiates any number of times"
)


class SS2DScan(torch.autograd.Function):
    """`vmamba::ss2d_scan` with gradients: (x, p, dt_weight, dt_bias, A, D, routes, backend, keep) -> (y, states)."""

    @staticmethod
    def forward(x, p, dt_weight, dt_bias, A, D, routes, backend, keep):
        return torch.ops.vmamba.ss2d_scan(x, p, dt_weight, dt_bias, A, D, routes, backend, keep)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.routes, ctx.backend, _ = inputs
        states = output[1]
        ctx.mark_non_differentiable(states)
        ctx.save_for_backward(*tensors, states)

    @staticmethod
    def backward(ctx, gy, _):
        gradients = apply(SS2DScanGradient, gy, *ctx.saved_tensors, ctx.routes, ctx.backend)
        return (*gradients, None, None, None)

    @staticmethod
    def vmap(info, in_dims, *args):
        if any(dim is not None for dim in in_dims[2:6]):
            return _one_by_one(SS2DScan, info.batch_size, in_dims, args)
        # only images are mapped: one call with all of them
        x, p = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(args[:2], in_dims, strict=False)
        )
        y, _ = SS2DScan.apply(x.flatten(0, 1), p.flatten(0, 1), *args[2:-1], False)
        return (y.unflatten(0, x.shape[:2]), y.new_empty(info.batch_size, 0, dtype=torch.float32)), (0, 0)


class SS2DScanGradient(torch.autograd.Function):
    """`vmamba::ss2d_scan_backward`, with a vmap and a clear refusal of second derivatives."""

    @staticmethod
    def forward(gy, x, p, dt_weight, dt_bias, A, D, states, routes, backend):
        return torch.ops.vmamba.ss2d_scan_backward(gy, x, p, dt_weight, dt_bias, A, D, states, routes, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(_SECOND_ORDER)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _one_by_one(SS2DScanGradient, info.batch_size, in_dims, args)


class SelectiveScan(torch.autograd.Function):
    """`vmamba::selective_scan` with gradients of y; the last state is returned without one, as mamba-ssm does.

    (u, delta, A, B, C, D, delta_bias, delta_softplus, backend, keep) -> (y, last_state, states).
    """

    @staticmethod
    def forward(u, delta, A, B, C, D, delta_bias, delta_softplus, backend, keep):
        return torch.ops.vmamba.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, backend, keep)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.delta_softplus, ctx.backend, _ = inputs
        _, last_state, states = output
        ctx.mark_non_differentiable(last_state, states)
        ctx.save_for_backward(*tensors, states)

    @staticmethod
    def backward(ctx, gy, *_):
        gradients = apply(SelectiveScanGradient, gy, *ctx.saved_tensors, ctx.delta_softplus, ctx.backend)
        D, delta_bias = ctx.saved_tensors[5:7]
        *gradients, gD, gbias = gradients
        return (*gradients, None if D is None else gD, None if delta_bias is None else gbias, None, None, None)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _one_by_one(SelectiveScan, info.batch_size, in_dims, args)


class SelectiveScanGradient(torch.autograd.Function):
    """`vmamba::selective_scan_backward`, with a vmap and a clear refusal of second derivatives."""

    @staticmethod
    def forward(gy, u, delta, A, B, C, D, delta_bias, states, delta_softplus, backend):
        return torch.ops.vmamba.selective_scan_backward(
            gy, u, delta, A, B, C, D, delta_bias, states, delta_softplus, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(_SECOND_ORDER)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _one_by_one(SelectiveScanGradient, info.batch_size, in_dims, args)


class DepthwiseConv3x3(torch.autograd.Function):
    """`vmamba::depthwise_conv3x3` with gradients: (x, weight, bias, activation, backend) -> y."""

    @staticmethod
    def forward(x, weight, bias, activation, backend):
        return torch.ops.vmamba.depthwise_conv3x3(x, weight, bias, activation, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.activation, ctx.backend = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx, gy):
        gx, gweight, gbias = apply(DepthwiseConv3x3Gradient, gy, *ctx.saved_tensors, ctx.activation, ctx.backend)
        return gx, gweight, None if ctx.saved_tensors[2] is None else gbias, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        if any(dim is not None for dim in in_dims[1:3]):
            return _one_by_one(DepthwiseConv3x3, info.batch_size, in_dims, args)
        # only images are mapped: one call with all of them
        x = args[0].movedim(in_dims[0], 0)
        return DepthwiseConv3x3.apply(x.flatten(0, 1), *args[1:]).unflatten(0, x.shape[:2]), 0


class DepthwiseConv3x3Gradient(torch.autograd.Function):
    """`vmamba::depthwise_conv3x3_backward`, with a vmap and a clear refusal of second derivatives."""

    @staticmethod
    def forward(gy, x, weight, bias, activation, backend):
        return torch.ops.vmamba.depthwise_conv3x3_backward(gy, x, weight, bias, activation, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "the backward of this convolution cannot be differentiated again: for second derivatives use "
            "backend='portable', which is torch's own convolution"
        )

    @staticmethod
    def vmap(info, in_dims, *args):
        return _one_by_one(DepthwiseConv3x3Gradient, info.batch_size, in_dims, args)
