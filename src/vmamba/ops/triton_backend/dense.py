"""The dense parts of a block, in bf16 or fp16: launching, and the choice of tiles.

Rows of C numbers, one a pixel: any shape (..., C), contiguous. x and residual may be fp32, bf16 or fp16 and need not be
of the computation's dtype; weights may be wider than it (fp32 under autocast) and are rounded inside the kernels. There
are no gradients. What is computed how is written in `dense_kernels`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dense_kernels import (
    linear_few_kernel,
    linear_kernel,
    linear_resident_kernel,
    mlp_kernel,
    mlp_resident_kernel,
    norm_kernel,
)

__all__ = ["layer_norm", "linear", "linear_residual", "norm_linear", "norm_mlp", "norm_mlp_kept"]

_COMPUTED = (torch.bfloat16, torch.float16)
_STREAMS = (torch.float32, torch.bfloat16, torch.float16)

# Few rows: a program takes few rows and few columns and reads the weights as they are, so they are read, and rounded,
# once for each of its rows' tiles. Measured with one image: all stages of VMamba-T are below both limits.
_FEW_ROWS = 4096
_FEW_ROWS_BYTES = 48 * 1024 * 1024
# Up to so many channels a program of few rows makes the norm of its rows itself: a launch of 2 us less. Not in an MLP,
# where programs are many: 196x384x1536 14.2 us.
_FEW_NORM = 1024
# From this depth on, products of many rows are left to the library: 25088x384x384 takes it 0.016 ms, the kernel here
# 0.022; 1536 to 384 0.044 and about 0.014 for the residual sum after it, the kernel 0.064.
_LIBRARY_DEPTH = 384
# From so many rows on they are enough for the kernel that holds all of an MLP's weights, which takes 9 us for 128 rows.
_RESIDENT_ROWS = 2048
_RESIDENT_BYTES = 160 * 1024  # of weights in shared memory; 227 KB a multiprocessor, the rest for rows on their way


class Tile(NamedTuple):
    """How a kernel cuts its work: rows and columns of a program, its warps, and loads in flight (1: no prefetch)."""

    rows: int
    columns: int
    warps: int
    stages: int
    depth: int = 64  # numbers of a row that a product takes at a time, where it does not take all


class FewTile(NamedTuple):
    """How `linear_few_kernel` cuts its work: rows and columns of a program, its warps, 16s of a share at once."""

    rows: int
    columns: int
    warps: int
    tiles: int


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, shift: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """LayerNorm over the last dimension of x (..., C), mean and variance in fp32, in dtype.

    shift: a row (C,) and where to put x plus it, a tensor like x.
    """
    _check(x, dtype)
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    C = x.shape[-1]
    width = triton.next_power_of_2(C)
    rows = max(1, 4096 // width)
    if x.numel():
        norm_kernel[(triton.cdiv(x.numel() // C, rows),)](
            x, weight, bias, eps, out, *(shift or (bias, out)), x.numel() // C,
            C, width, rows, shift is not None, num_warps=4,
        )  # fmt: skip
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
    if _few(M, N, C) and C <= _FEW_NORM:
        _linear_few(x, weight, bias, out, norm=norm)
    elif not _few(M, N, C) and _resident_share(C, N):
        _linear_resident(x, weight, bias, out, norm=norm)
    else:
        _product(layer_norm(x, *norm, dtype), weight, bias, out)
    return out


def norm_mlp(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dtype: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x + fc2(gelu(fc1(LayerNorm(x)))), GELU exact, computed in dtype, (..., C) in out_dtype.

    x (..., C); norm_weight, norm_bias, b2 (C,); w1 (N, C), b1 (N,), w2 (C, N). Raises TypeError for a dtype other than
    bf16 and fp16 or an out_dtype that is none of fp32, bf16 and fp16, ValueError for shapes that do not fit.
    """
    norm = (norm_weight, norm_bias, eps)
    _check(x, dtype, norm[:2], (w1, b1), (w2, b2), out_dtype=out_dtype)
    x = x.contiguous()
    (N, C), M = w1.shape, x.numel() // x.shape[-1]
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    if M == 0 or _mlp(x, norm, w1, b1, w2, b2, out, dtype):
        return out
    few = _few(M, N, C)
    hidden = torch.empty((*x.shape[:-1], N), dtype=dtype, device=x.device)
    # a library's product that adds to what is there already spares a pass for the residual sum
    is_shifted = not few and N >= _LIBRARY_DEPTH and x.dtype == out_dtype == dtype
    normed = layer_norm(x, *norm, dtype, shift=(b2, out) if is_shifted else None)
    # where each of many tiles would round the weights again, they are rounded once
    _linear(normed, (w1 if few else w1.to(dtype)).contiguous(), b1, hidden, gelu=True)
    if is_shifted:
        _add_product(hidden, w2, out)
    else:
        _product(hidden, w2.contiguous(), b2, out, residual=x)
    return out


def norm_mlp_kept(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, scale: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """x + scale fc2(gelu(h)) in x's dtype, and h = fc1(LayerNorm(x)) (..., N) in dtype; None where layers are faster.

    Arguments, and what is raised, as in `norm_mlp`; scale (x.shape[0],), a factor for each image, or None.
    """
    norm = (norm_weight, norm_bias, eps)
    _check(x, dtype, norm[:2], (w1, b1), (w2, b2))
    x = x.contiguous()
    N = w1.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    hidden = torch.empty((*x.shape[:-1], N), dtype=dtype, device=x.device)
    if x.numel() == 0 or _mlp(x, norm, w1, b1, w2, b2, out, dtype, hidden, scale):
        return out, hidden
    return None


def _mlp(
    x: Tensor, norm: tuple[Tensor, Tensor, float], w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, out: Tensor,
    dtype: torch.dtype, hidden: Tensor | None = None, scale: Tensor | None = None,
) -> bool:  # fmt: skip
    """The whole MLP as one kernel into out, and hidden where it is given; False where that does not pay."""
    (N, C), M = w1.shape, x.numel() // x.shape[-1]
    parts = _parts(C)
    resident = 4 * C * N <= _RESIDENT_BYTES
    if not parts or N % 64 or (not resident and C > 192):
        return False
    if _few(M, N, C) and (not resident or M < _RESIDENT_ROWS):
        return False
    tile = Tile(rows=128, columns=64, warps=8, stages=2 if resident else 3)
    tensors = (out, out if hidden is None else hidden, out if scale is None else scale)
    constants = {
        "DOT": _dot_type(dtype, x), "FINE": dtype == torch.float16,
        "KEEP": hidden is not None, "SCALED": scale is not None, "num_warps": tile.warps,
    }  # fmt: skip
    if resident:
        programs = _multiprocessors(x)
        mlp_resident_kernel[(min(programs, triton.cdiv(M, tile.rows)),)](
            x, *norm, w1.contiguous(), b1, w2.contiguous(), b2, *tensors, M, M // x.shape[0],
            *parts, N, programs, tile.rows, tile.columns, tile.stages, **constants,
        )  # fmt: skip
    else:
        mlp_kernel[(triton.cdiv(M, tile.rows),)](
            x, *norm, w1.to(dtype).contiguous(), b1, w2.to(dtype).contiguous(), b2, *tensors, M, M // x.shape[0],
            *parts, N, tile.rows, tile.columns, tile.stages, **constants,
        )  # fmt: skip
    return True


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, (..., K) to (..., N), in x's dtype, bf16 or fp16; weight (N, K). Raises as `norm_linear` does."""
    _check(x, x.dtype, (weight, None))
    x, weight = x.contiguous(), weight.contiguous()
    (N, K), M = weight.shape, x.numel() // x.shape[-1]
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    if _few(M, N, K):
        _linear_few(x, weight, None, out)
    else:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            torch.mm(x.view(M, K), weight.to(x.dtype).t(), out=out.view(M, N))
    return out


def linear_residual(y: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, out_dtype: torch.dtype) -> Tensor:
    """residual + y @ weight.T (+ bias), the product in y's dtype, (..., N) in out_dtype.

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
    # with more columns, the residual's tiles on their way and the weights do not fit twice
    if not _few(M, N, K) and K <= 128 and _resident_share(K, N):
        _linear_resident(y, weight, bias, out, residual=residual)
    elif M > 0:
        _product(y, weight, bias, out, residual=residual)
    return out


def takes_parts(x: Tensor, weight: Tensor) -> bool:
    """Whether `norm_linear_residual` takes maps like x (..., K) to (..., N); weight (N, K)."""
    N, K = weight.shape
    return K <= _FEW_NORM and _few(x.numel() // K, N, K)


def norm_linear_residual(
    parts: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
) -> Tensor:
    """residual + LayerNorm(sum of parts) @ weight.T (+ bias), in residual's dtype, where `takes_parts`.

    parts (P, ..., K) in bf16 or fp16; norm_weight, norm_bias (K,); weight (N, K); bias (N,); residual (..., N).
    """
    _check(parts, parts.dtype, (norm_weight, norm_bias), (weight, bias), out_dtype=residual.dtype)
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    norm = (norm_weight, norm_bias, eps)
    _linear_few(
        parts.contiguous(), weight.contiguous(), bias, out, norm, residual=residual.contiguous(),
        parts=parts.shape[0], dtype=parts.dtype,
    )  # fmt: skip
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
    linear_resident_kernel[(min(programs, triton.cdiv(M, tile.rows)), N // share)](
        x, norm_weight, norm_bias, eps, weight, weight if bias is None else bias,
        out if residual is None else residual, out, M,
        *_parts(C), N, share, norm is not None, bias is not None, residual is not None,
        programs, tile.rows, tile.columns, tile.stages, _dot_type(x.dtype if norm is None else out.dtype, x),
        num_warps=tile.warps,
    )  # fmt: skip


def _few(M: int, N: int, K: int) -> bool:
    """Whether a map of M rows from K to N numbers is cut into small tiles."""
    return M <= _FEW_ROWS and triton.cdiv(M, _few_rows(M)) * N * K * 4 <= _FEW_ROWS_BYTES


def _few_rows(M: int) -> int:
    return 16 if M <= 1024 else 32


def _product(x: Tensor, weight: Tensor, bias, out: Tensor, residual: Tensor | None = None) -> None:
    """x @ weight.T + bias + residual into out."""
    (N, K), M = weight.shape, x.numel() // x.shape[-1]
    if _few(M, N, K):
        _linear(x, weight, bias, out, residual=residual)
    elif K < _LIBRARY_DEPTH:
        _linear(x, weight.to(x.dtype), bias, out, residual=residual)
    elif residual is not None and bias is None and residual.dtype == out.dtype == x.dtype:
        # the product takes the residual in: 0.036 ms for 25088x384x384, with a sum after it 0.030 + 0.014
        out.copy_(residual)
        _add_product(x, weight, out)
    else:
        factors = x.view(M, K), weight.to(x.dtype).t()
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            y = out if residual is None else torch.empty(out.shape, dtype=x.dtype, device=x.device)
            if bias is None:
                torch.mm(*factors, out=y.view(M, N))
            else:
                torch.addmm(bias.to(x.dtype), *factors, out=y.view(M, N))
            if residual is not None:
                torch.add(residual, y, out=out)


def _add_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out += x @ weight.T by the library, all in one dtype but the weight."""
    rows = out.view(-1, out.shape[-1])
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        torch.addmm(rows, x.view(-1, x.shape[-1]), weight.to(x.dtype).t(), out=rows)


def _linear_few(
    x: Tensor, weight: Tensor, bias, out: Tensor, norm=None, residual=None, parts: int = 1,
    dtype: torch.dtype | None = None, tile: FewTile | None = None,
) -> None:  # fmt: skip
    """norm(x) @ weight.T + bias + residual into out, for few rows; x (parts, rows, K), their sum.

    Computed in dtype: if not given, that of out after a norm, else that of x.
    """
    N, K = weight.shape
    M = x.numel() // (parts * K)
    tile = tile or _few_tile(M, N, K, whole=norm is not None or parts > 1)
    dtype = dtype or (x.dtype if norm is None else out.dtype)
    norm_weight, norm_bias, eps = norm or (weight, weight, 0.0)
    linear_few_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
        x, norm_weight, norm_bias, eps, weight, weight if bias is None else bias,
        out if residual is None else residual, out, M,
        K, N, parts, norm is not None, bias is not None, residual is not None,
        tile.warps, tile.tiles, tile.rows, tile.columns, _dot_type(dtype, x),
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip


def _few_tile(M: int, N: int, K: int, whole: bool) -> FewTile:
    """The best, or nearly, of those measured for one image through VMamba-T: 196x384x384 with a norm 6.0 us.

    whole: a program takes all K numbers of a row at once, up to `_FEW_NORM` of them.
    """
    if whole:
        warps = 4 if K <= 512 else 8
        tiles = triton.next_power_of_2(triton.cdiv(triton.cdiv(K, warps), 16))
        return FewTile(32 if M * N >= 500_000 else 16, 32, warps, tiles)
    if K <= 128 or M >= 2048:
        rows, columns = 32, 32
    elif N <= 256:
        rows, columns = 32 if M >= 512 else 16, 16
    else:
        rows, columns = 32, 16 if M <= 64 else 32
    warps = 4 if K <= 128 else 8
    return FewTile(rows, columns, warps, min(4, triton.next_power_of_2(triton.cdiv(K, 16 * warps))))


def _linear(x: Tensor, weight: Tensor, bias, out: Tensor, gelu: bool = False, residual=None) -> None:
    """act(x @ weight.T + bias) + residual into out."""
    N, K = weight.shape
    M = x.numel() // K
    if _few(M, N, K):
        # loads on their way through shared memory: in a network of one image these launches took 5.8 us in the mean,
        # those of `linear_few_kernel` for the MLPs, the deepest and the widest, 12 to 15
        tile = Tile(rows=_few_rows(M), columns=2 * _few_rows(M), warps=4, stages=4)
    else:
        tile = Tile(rows=128, columns=128, warps=8, stages=3)
    linear_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
        x, weight, weight if bias is None else bias, out if residual is None else residual, out, M,
        K, N, bias is not None, gelu, residual is not None,
        tile.rows, tile.columns, tile.depth, tile.stages, _dot_type(x.dtype, x), x.dtype == torch.float16,
        num_warps=tile.warps,
    )  # fmt: skip


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
