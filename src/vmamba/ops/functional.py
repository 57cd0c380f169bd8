"""The public operators: what they compute, what they take, and the checks before any work starts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import convolution
from .dispatch import BACKENDS, choose
from .library import DepthwiseConv3x3, SelectiveScan, SS2DScan, apply
from .reference import selective_scan_reference, ss2d_scan_reference
from .routes import ROUTES

__all__ = ["depthwise_conv3x3", "selective_scan", "ss2d"]

CONV_ACTIVATIONS = ("silu", "none")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba along L, in the arguments and order of mamba-ssm's `selective_scan_fn`.

        delta = softplus(delta + delta_bias)                       softplus where `delta_softplus`
        h_l   = exp(delta_l A) h_{l-1} + delta_l B_l u_l           h_{-1} = 0
        y_l   = <C_l, h_l> + D u_l
        y     = y * silu(z)                                        where z is given

    Args:
        u: (batch, K*E, L), the sequence of each channel; fp64, fp32, bf16 or fp16.
        delta: (batch, K*E, L), step sizes.
        A: (K*E, N), real, negative. Keep it in fp32.
        B, C: input and output maps, (batch, K, N, L): channel c reads group c // E. Also (batch, N, L), one group, and
            (K*E, N), the same at every step and for every batch entry.
        D: (K*E,), the skip, or None.
        z: (batch, K*E, L), a gate, or None.
        delta_bias: (K*E,), or None.
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: return the state after the last step too. No gradient flows through it.
        backend: "auto", "reference", or a name in `vmamba.ops.backends()`.

    Returns:
        y (batch, K*E, L) in u's dtype; with `return_last_state` also h (batch, K*E, N), fp32 (fp64 for fp64 input). The
        state is kept in fp32 whatever u's dtype.

    Raises:
        TypeError: for a complex A or a dtype that is not floating point.
        ValueError: for shapes or devices that do not fit each other, or an unknown backend.
        RuntimeError: for a backend that cannot run on u's device.

    Source: Mamba (arXiv 2312.00752), section 3.
    """
    _check_floating({"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias})
    if u.ndim != 3 or u.shape[-1] == 0:
        raise ValueError(f"u must be (batch, channels, L) with L >= 1, got {tuple(u.shape)}")
    batch, channels, length = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A must be ({channels}, N), one row for each channel of u, got {tuple(A.shape)}")
    N = A.shape[1]
    _check_shape("delta", delta, u.shape, "that of u")
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            _check_shape(name, vector, (channels,), "one number for each channel of u")
    if z is not None:
        _check_shape("z", z, u.shape, "that of u")
    B, C = (_grouped(name, m, batch, channels, N, length) for name, m in (("B", B), ("C", C)))
    if B.shape[1] != C.shape[1]:
        groups = max(B.shape[1], C.shape[1])
        if groups % B.shape[1] or groups % C.shape[1]:
            raise ValueError(f"B has {B.shape[1]} groups and C {C.shape[1]}: neither number divides the other")
        B, C = (m.repeat_interleave(groups // m.shape[1], dim=1) for m in (B, C))
    _check_same_device(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    if backend == "reference":
        y, last_state = selective_scan_reference(u, delta, A, B, C, D, delta_bias, delta_softplus)
    else:
        tensors = (u, delta, A, B, C, D, delta_bias)
        y, last_state, _ = apply(
            SelectiveScan, *tensors, delta_softplus, _checked_backend(backend, u), _needs_gradient(*tensors)
        )
    if z is not None:
        y = y * F.silu(z)
    return (y, last_state) if return_last_state else y


def ss2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    routes: str = "cross2d",
    backend: str = "auto",
) -> Tensor:
    """SS2D: the selective scan of an image along K routes, each put back at its pixels, and added.

    For each route k, with the pixels l in the order in which it walks them:

        p      = x_proj_weight_k x                                  R + 2N numbers a pixel: delta's code, B, C
        delta  = softplus(dt_weight_k p[:R] + dt_bias_k)
        h_l    = exp(delta_l A_k) h_{l-1} + delta_l B_l x_l
        y_l    = <C_l, h_l> + D_k x_l

    The projection is one matrix product over the image as it lies, and each route is walked in place: the K scanned
    copies of x are never built.

    Args:
        x: (B, H, W, E), channels last; fp64, fp32, bf16 or fp16. Under autocast the projection runs in the low
            precision.
        x_proj_weight: (K, R + 2N, E).
        dt_weight: (K, E, R).
        dt_bias: (K, E).
        A: (K*E, N), negative; -exp(A_log). Keep it in fp32.
        D: (K*E,), the skip.
        routes: where the routes walk, K = 4 of them.
            "cross2d": row-major, column-major, and both reversed (VMamba).
            "unidi": row-major four times. "bidi": row-major twice, reversed twice.
            "cascade2d": see `_cascade`.
        backend: "auto", "reference", or a name in `vmamba.ops.backends()`.

    Returns:
        (B, H, W, E) in x's dtype. State, A, delta and softplus are fp32 inside (fp64 for fp64 input).

    Raises:
        TypeError: for a dtype that is not floating point.
        ValueError: for shapes or devices that do not fit each other, unknown routes or an unknown backend.
        RuntimeError: for a backend that cannot run on x's device.

    Source: VMamba (arXiv 2401.10166), section 4.2.
    """
    known = (*ROUTES, "cascade2d")
    if routes not in known:
        raise ValueError(f"unknown routes {routes!r}: choose one of {', '.join(known)}")
    _check_floating(
        {"x": x, "x_proj_weight": x_proj_weight, "dt_weight": dt_weight, "dt_bias": dt_bias, "A": A, "D": D}
    )
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (B, H, W, E), channels last, with H, W, E >= 1, got {tuple(x.shape)}")
    E, K = x.shape[3], 4
    if dt_weight.ndim != 3 or dt_weight.shape[:2] != (K, E):
        raise ValueError(f"dt_weight must be ({K}, {E}, R) for x {tuple(x.shape)}, got {tuple(dt_weight.shape)}")
    if A.ndim != 2 or A.shape[0] != K * E or A.shape[1] == 0:
        raise ValueError(f"A must be ({K * E}, N) for x {tuple(x.shape)}, got {tuple(A.shape)}")
    R, N = dt_weight.shape[2], A.shape[1]
    _check_shape("x_proj_weight", x_proj_weight, (K, R + 2 * N, E), "(K, R + 2N, E)")
    _check_shape("dt_bias", dt_bias, (K, E), "(K, E)")
    _check_shape("D", D, (K * E,), "(K*E,)")
    _check_same_device(x=x, x_proj_weight=x_proj_weight, dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D)
    if backend != "reference":
        _checked_backend(backend, x)
    if routes == "cascade2d":
        return _cascade(x, x_proj_weight, dt_weight, dt_bias, A, D, backend)
    p = F.linear(x, x_proj_weight.flatten(0, 1))
    if backend == "reference":
        return ss2d_scan_reference(x, p, dt_weight, dt_bias, A, D, routes)
    tensors = (x, p, dt_weight, dt_bias, A, D)
    return apply(SS2DScan, *tensors, routes, backend, _needs_gradient(*tensors))[0]


def depthwise_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "silu", *, backend: str = "auto"
) -> Tensor:
    """A depthwise 3x3 convolution, zero-padded by 1, of channels-last images, and its activation.

        y = act(bias + sum over taps of weight x)

    Under autocast x, weight and bias are taken in the autocast dtype, as for any convolution.

    Args:
        x: (B, H, W, E), channels last; fp64, fp32, bf16 or fp16.
        weight: (E, 1, 3, 3), as in `torch.nn.Conv2d` with groups=E, in x's dtype.
        bias: (E,) in x's dtype, or None.
        activation: "silu" or "none".
        backend: "auto", or a name in `vmamba.ops.backends()`; one without kernels for this runs torch's convolution.

    Returns:
        (B, H, W, E) in x's dtype; sums and activation are fp32 inside (fp64 for fp64 input).

    Raises:
        TypeError: for a dtype that is not floating point, or dtypes that differ.
        ValueError: for shapes or devices that do not fit each other, an unknown activation or an unknown backend.
        RuntimeError: for a backend that cannot run on x's device.

    Source: VMamba (arXiv 2401.10166), figure 3: the convolution before SS2D.
    """
    if activation not in CONV_ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(CONV_ACTIVATIONS)}")
    _check_floating({"x": x, "weight": weight, "bias": bias})
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (B, H, W, E), channels last, with H, W, E >= 1, got {tuple(x.shape)}")
    E, device_type = x.shape[3], x.device.type
    _check_shape("weight", weight, (E, 1, 3, 3), "one 3x3 kernel for each channel of x")
    if bias is not None:
        _check_shape("bias", bias, (E,), "one number for each channel of x")
    _check_same_device(x=x, weight=weight, bias=bias)
    x, weight, bias = _as_autocast(x, weight, bias)
    if BACKENDS[choose(backend, device_type)].conv_forward is convolution.conv:
        return convolution.conv(x, weight, bias, activation)
    return apply(DepthwiseConv3x3, x, weight, bias, activation, backend)


def _as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    """The three in autocast's dtype, but for fp64, where it is enabled; else an error if their dtypes differ."""
    tensors = [x, weight, bias]
    device_type = x.device.type
    # "meta" has no autocast, and to ask whether it is enabled would raise
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        tensors = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
    for name, tensor in zip(("weight", "bias"), tensors[1:], strict=True):
        if tensor is not None and tensor.dtype != tensors[0].dtype:
            raise TypeError(f"x is {x.dtype} and {name} {tensor.dtype}: convert one of them, or use torch.autocast")
    return tensors


def _cascade(
    x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, backend: str
) -> Tensor:
    """The cascaded routes: every row scanned on its own, both ways, then every column of what came out.

    Before each of the two, a LayerNorm over channels without affine, eps 1e-5. Rows use the weights of routes 0
    (forward) and 1 (backward), columns those of 2 and 3. The backward scan's output is added as it comes, not flipped
    back to its pixels: a quirk of the official code that its ablation's weights were trained with, kept for parity.
    """
    # rows of the image as it lies, then rows of its transpose
    for routes in (slice(0, 2), slice(2, 4)):
        x = F.layer_norm(x, x.shape[-1:], eps=1e-5)
        x = scan_rows_both_ways(x, x_proj_weight, dt_weight, dt_bias, A, D, routes, backend).transpose(1, 2)
    return x


def scan_rows_both_ways(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    routes: slice,
    backend: str = "auto",
) -> Tensor:
    """One half of the cascaded routes: every row (B, H, [W], E) on its own, with the weights of the two routes that
    `routes` takes out of K. The backward scan's output is added unflipped, see `_cascade`. (B, H, W, E).
    """
    K, E, R = dt_weight.shape
    N = A.shape[1]
    A, D = A.unflatten(0, (K, E)), D.unflatten(0, (K, E))
    batch, height = x.shape[:2]
    sequences = x.flatten(0, 1)  # (B*H, W, E)
    both_ways = (sequences, sequences.flip(1))
    codes = [F.linear(u, w).split([R, N, N], dim=-1) for u, w in zip(both_ways, x_proj_weight[routes], strict=True)]
    deltas = [F.linear(code, w) for (code, _, _), w in zip(codes, dt_weight[routes], strict=True)]
    y = selective_scan(
        torch.cat(both_ways, dim=-1).transpose(1, 2),
        torch.cat(deltas, dim=-1).transpose(1, 2),
        A[routes].flatten(0, 1),
        torch.stack([B.transpose(1, 2) for _, B, _ in codes], dim=1),
        torch.stack([C.transpose(1, 2) for _, _, C in codes], dim=1),
        D[routes].flatten(),
        delta_bias=dt_bias[routes].flatten(),
        delta_softplus=True,
        backend=backend,
    )
    merged = y.unflatten(1, (2, E)).sum(1)  # (B*H, E, W)
    return merged.unflatten(0, (batch, height)).transpose(2, 3)


def _grouped(name: str, m: Tensor, batch: int, channels: int, N: int, length: int) -> Tensor:
    """B or C as (batch, groups, N, L)."""
    if m.ndim == 2:
        _check_shape(name, m, (channels, N), "(channels, N), the same at every step")
        return m[None, :, :, None].expand(batch, -1, -1, length)
    if m.ndim == 3:
        m = m[:, None]
    if m.ndim != 4 or (m.shape[0], m.shape[2], m.shape[3]) != (batch, N, length):
        raise ValueError(f"{name} must be (batch, K, N, L) = ({batch}, K, {N}, {length}), got {tuple(m.shape)}")
    if m.shape[1] == 0 or channels % m.shape[1]:
        raise ValueError(f"{name} has {m.shape[1]} groups, which do not divide the {channels} channels of u")
    return m


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _checked_backend(backend: str, x: Tensor) -> str:
    """`backend`, after an error if it cannot run; "auto" stays, so that a traced program fits any device."""
    if backend != "auto":
        choose(backend, x.device.type)
    return backend


def _check_floating(tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_complex():
            raise TypeError(f"{name} is complex ({tensor.dtype}): only real scans are supported, pass a real {name}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}: convert it, as in {name}.float()")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, {meaning}, got {tuple(tensor.shape)}")


def _check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {listed}")
