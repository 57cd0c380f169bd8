"""The dense parts of a block for inference, in bf16 or fp16: launching, and the choice of tiles.

Rows of C numbers, one a pixel: any shape (..., C), contiguous. x and residual may be fp32, bf16 or fp16 and need not be
of the computation's dtype; weights may be wider than it (fp32 under autocast) and are rounded inside the kernels. There
are no gradients. What is computed how is written in `dense_kernels`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dense_kernels import (
    linear_kernel,
    linear_resident_kernel,
    mlp_kernel,
    mlp_resident_kernel,
    norm_kernel,
)

__all__ = ["layer_norm", "linear_residual", "norm_linear", "norm_mlp"]

_COMPUTED = (torch.bfloat16, torch.float16)
_STREAMS = (torch.float32, torch.bfloat16, torch.float16)

# Up to so many rows the programs of a kernel that walks over rows would not fill the device's multiprocessors, and
# time goes into reading weights: there a tile is few rows and few columns.
_FEW_ROWS = 8192
_RESIDENT_BYTES = 160 * 1024  # of weights in shared memory; 227 KB a multiprocessor, the rest for rows on their way


class Tile(NamedTuple):
    """How a kernel cuts its work: rows and columns of a program, its warps, and loads in flight (1: no prefetch)."""

    rows: int
    columns: int
    warps: int
    stages: int
    depth: int = 64  # numbers of a row that a product takes at a time, where it does not take all


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last dimension of x (..., C), mean and variance in fp32, in dtype."""
    _check(x, dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _norm(x.contiguous(), weight, bias, eps, out)
    return out


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm(x) @ weight.T (+ bias), (..., C) to (..., N), in dtype.

    x (..., C); norm_weight, norm_bias (C,); weight (N, C); bias (N,). Raises TypeError for another dtype than bf16 and
    fp16, ValueError for shapes that do not fit.
    """
    _check(x, dtype, (norm_weight, norm_bias), (weight, bias))
    x, weight = x.contiguous(), weight.contiguous()
    (N, C), M = weight.shape, x.numel() // x.shape[-1]
    out = torch.empty((*x.shape[:-1], N), dtype=dtype, device=x.device)
    if M == 0:
        return out
    norm = (norm_weight, norm_bias, eps)
    if M <= _FEW_ROWS:
        _linear(x, weight, bias, out, norm=norm)
    elif _resident_share(C, N):
        _linear_resident(x, weight, bias, out, norm=norm)
    else:
        normalised = torch.empty(x.shape, dtype=dtype, device=x.device)
        (weight,) = _norm(x, *norm, normalised, (weight,))
        _linear(normalised, weight, bias, out)
    return out


def norm_mlp(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dtype: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x + fc2(gelu(fc1(LayerNorm(x)))), GELU exact, computed in dtype and summed in fp32, (..., C) in out_dtype.

    x (..., C); norm_weight, norm_bias, b2 (C,); w1 (N, C), b1 (N,), w2 (C, N). Raises TypeError for a dtype other than
    bf16 and fp16 or an out_dtype that is none of fp32, bf16 and fp16, ValueError for shapes that do not fit.
    """
    _check(x, dtype, (norm_weight, norm_bias), (w1, b1), (w2, b2), out_dtype=out_dtype)
    x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
    (N, C), M = w1.shape, x.numel() // x.shape[-1]
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    if M == 0:
        return out
    parts = _parts(C)
    constants = {"DOT": _dot_type(dtype, x), "FINE": dtype == torch.float16}
    norm = (norm_weight, norm_bias, eps)
    if M > _FEW_ROWS and parts and N % 64 == 0 and 4 * C * N <= _RESIDENT_BYTES:
        tile = Tile(rows=128, columns=64, warps=8, stages=2)
        programs = _multiprocessors(x)
        with _on_its_device(x):
            mlp_resident_kernel[(min(programs, triton.cdiv(M, tile.rows)),)](
                x, *norm, w1, b1, w2, b2, out, M, *parts, N, programs,
                tile.rows, tile.columns, tile.stages, **constants, num_warps=tile.warps,
            )  # fmt: skip
    elif M > _FEW_ROWS and parts and N % 64 == 0 and C <= 192:
        tile = Tile(rows=128, columns=64, warps=8, stages=3)
        with _on_its_device(x):
            mlp_kernel[(triton.cdiv(M, tile.rows),)](
                x, *norm, w1.to(dtype), b1, w2.to(dtype), b2, out, M, *parts, N,
                tile.rows, tile.columns, tile.stages, **constants, num_warps=tile.warps,
            )  # fmt: skip
    else:
        hidden = torch.empty((*x.shape[:-1], N), dtype=dtype, device=x.device)
        if M <= _FEW_ROWS:
            _linear(x, w1, b1, hidden, norm=norm, gelu=True)
        else:
            normalised = torch.empty(x.shape, dtype=dtype, device=x.device)
            w1, w2 = _norm(x, *norm, normalised, (w1, w2))
            _linear(normalised, w1, b1, hidden, gelu=True)
        _linear(hidden, w2, b2, out, residual=x)
    return out


def linear_residual(y: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, out_dtype: torch.dtype) -> Tensor:
    """residual + y @ weight.T (+ bias), the product in y's dtype and the sum in fp32, (..., N) in out_dtype.

    y (..., K) in bf16 or fp16; weight (N, K); bias (N,); residual (..., N). Raises as `norm_mlp` does.
    """
    _check(y, y.dtype, (weight, bias), out_dtype=out_dtype)
    if residual.dtype not in _STREAMS:
        raise TypeError(f"residual is {residual.dtype}, which is none of {_STREAMS}")
    if residual.shape != (*y.shape[:-1], weight.shape[0]):
        raise ValueError(f"residual has shape {tuple(residual.shape)}, the product {(*y.shape[:-1], weight.shape[0])}")
    out = torch.empty(residual.shape, dtype=out_dtype, device=y.device)
    y, weight, residual = y.contiguous(), weight.contiguous(), residual.contiguous()
    N, K = weight.shape
    M = out.numel() // N
    # beyond, the residual's tiles on their way and the weights do not fit twice
    if M > _FEW_ROWS and K <= 128 and _resident_share(K, N):
        _linear_resident(y, weight, bias, out, residual=residual)
    elif M > _FEW_ROWS:
        # each of many tiles would round the weights again
        _linear(y, weight.to(y.dtype), bias, out, residual=residual)
    elif M > 0:
        _linear(y, weight, bias, out, residual=residual)
    return out


def _check(x: Tensor, dtype: torch.dtype, *layers: tuple[Tensor, Tensor | None], out_dtype: torch.dtype | None = None):
    """The first layer takes rows of x, each other those that the last one makes."""
    if dtype not in _COMPUTED and layers:
        raise TypeError(f"these kernels compute in {' or '.join(map(str, _COMPUTED))}, not in {dtype}")
    for given in (x.dtype, dtype if out_dtype is None else out_dtype):
        if given not in _STREAMS:
            raise TypeError(f"{given} is none of {_STREAMS}")
    width = x.shape[-1]
    for weight, bias in layers:
        if weight.shape[-1] != width or (bias is not None and bias.shape != weight.shape[:1]):
            shapes = tuple(weight.shape), None if bias is None else tuple(bias.shape)
            raise ValueError(f"weight and bias of shapes {shapes} do not take rows of {width}")
        width = weight.shape[0]


def _dot_type(dtype: torch.dtype, x: Tensor) -> tl.dtype:
    """The type in which the tensor cores take numbers of a computation in dtype: its own."""
    # on the CPU runs Triton's interpreter, which cannot multiply bf16 matrices
    if dtype == torch.bfloat16 and x.is_cuda:
        return tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def _parts(C: int) -> tuple[int, int] | None:
    """C as a power of two, or as a sum of two, each at least what a product takes (16, and 32 for its columns)."""
    first = 1 << (C.bit_length() - 1)
    second = C - first
    return (first, second) if first >= 32 and (second == 0 or (second >= 16 and second & (second - 1) == 0)) else None


def _resident_share(C: int, N: int) -> int | None:
    """How many of N columns a program holds the weights of, two programs a multiprocessor; None where that is few."""
    if not _parts(C) or N % 32 or C > 256:
        return None
    share = N
    while 2 * C * share > _RESIDENT_BYTES // 2 and share % 64 == 0:
        share //= 2
    return share if 2 * C * share <= _RESIDENT_BYTES // 2 else None


def _linear_resident(x: Tensor, weight: Tensor, bias, out: Tensor, norm=None, residual=None) -> None:
    """norm(x) @ weight.T + bias + residual into out, for few enough weights."""
    N, C = weight.shape
    M = x.numel() // C
    share = _resident_share(C, N)
    rows = 64 if C > 128 or (residual is not None and residual.dtype == torch.float32) else 128
    tile = Tile(rows=rows, columns=min(64, share & -share), warps=4, stages=2)
    programs = max(1, 2 * _multiprocessors(x) // (N // share))
    norm_weight, norm_bias, eps = norm or (weight, weight, 0.0)
    with _on_its_device(x):
        linear_resident_kernel[(min(programs, triton.cdiv(M, tile.rows)), N // share)](
            x, norm_weight, norm_bias, eps, weight, weight if bias is None else bias,
            out if residual is None else residual, out, M,
            *_parts(C), N, share, norm is not None, bias is not None, residual is not None,
            programs, tile.rows, tile.columns, tile.stages, _dot_type(x.dtype if norm is None else out.dtype, x),
            num_warps=tile.warps,
        )  # fmt: skip


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, casts: tuple[Tensor, ...] = ()):
    """LayerNorm of x into out, and in the same launch up to two weights rounded to out's dtype."""
    C = x.shape[-1]
    M = x.numel() // C
    width = triton.next_power_of_2(C)
    wide = [w for w in casts if w.dtype != out.dtype]
    rounded = [torch.empty_like(w, dtype=out.dtype) for w in wide]
    rows = max(1, 4096 // width)
    n_rows, copy = triton.cdiv(M, rows), 4096
    programs = n_rows + sum(triton.cdiv(w.numel(), copy) for w in wide)
    pairs = [*zip(wide, rounded, strict=True), (weight, weight), (weight, weight)][:2]
    if programs:
        with _on_its_device(x):
            norm_kernel[(programs,)](
                x, weight, bias, eps, out, M, n_rows,
                *(part for w, r in pairs for part in (w, r, w.numel())),
                C, width, rows, copy, len(wide), num_warps=4,
            )  # fmt: skip
    done = iter(rounded)
    return tuple(w if w.dtype == out.dtype else next(done) for w in casts)


def _linear(x: Tensor, weight: Tensor, bias, out: Tensor, norm=None, gelu: bool = False, residual=None) -> None:
    """act(norm(x) @ weight.T + bias) + residual into out."""
    N, K = weight.shape
    M = x.numel() // K
    tile = _linear_tile(M, N, K)
    dtype = x.dtype if norm is None else out.dtype
    norm_weight, norm_bias, eps = norm or (weight, weight, 0.0)
    with _on_its_device(x):
        linear_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
            x, norm_weight, norm_bias, eps, weight, weight if bias is None else bias,
            out if residual is None else residual, out, M,
            K, N, norm is not None, bias is not None, gelu, residual is not None, triton.next_power_of_2(K),
            tile.rows, tile.columns, tile.depth, tile.stages, _dot_type(dtype, x), dtype == torch.float16,
            num_warps=tile.warps,
        )  # fmt: skip


def _linear_tile(M: int, N: int, K: int) -> Tile:
    if M > _FEW_ROWS:
        return Tile(rows=128, columns=128, warps=8, stages=3)
    rows = 16 if M <= 1024 else 32
    return Tile(rows=rows, columns=32 if rows == 16 else 64, warps=4, stages=4)


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _on_its_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
