"""The depthwise 3x3 convolution with SiLU on a CUDA GPU: Triton kernels in several tilings against torch's operators.

    python benchmarks/dwconv_gpu.py [--json FILE] [--quick]

First the kernels are held to fp64 (nothing is timed if they are wrong), then each stage of VMamba-T at 224 px, batch
128, and a large image are timed in bf16, forward and backward, as CUDA graphs, so that launching costs nothing. Prints
for each shape the best tilings, and the fraction that the best reaches of the time that its bytes need at 4.3 TB/s.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vmamba.ops.convolution import conv
from vmamba.ops.convolution import conv_backward as conv_backward_by_torch
from vmamba.ops.judge import TOLERANCE, error
from vmamba.ops.triton_backend.dwconv import BACKWARD, FORWARD, Tile, conv_backward, conv_forward

SHAPES = [(128, 56, 56, 96), (128, 28, 28, 192), (128, 14, 14, 384), (128, 7, 7, 768), (8, 256, 256, 96)]
BYTES_PER_MS = 4.3e9  # of an H200

# (block, warps, stages): 8 numbers a lane, 4, 2; in one warp or more; in registers or also in shared memory
FORWARD_CUTS = [(256, 1, 1), (512, 2, 1), (1024, 4, 1), (128, 1, 1), (256, 2, 1), (512, 4, 1), (64, 1, 1), (256, 4, 1)]
FORWARD_CUTS += [(256, 1, 2), (256, 1, 3), (256, 2, 3)]
BACKWARD_CUTS = [(128, 1, 1), (256, 2, 1), (512, 4, 1), (64, 1, 1), (128, 2, 1), (256, 4, 1), (128, 1, 2), (128, 1, 3)]
PROGRAMS = [1024, 2048, 4096, 8192]
QUICK = {"forward": [(256, 1, 1), (256, 2, 1)], "backward": [(128, 1, 1), (64, 1, 1)]}


def tiles(cuts: list[tuple[int, int, int]], default: Tile) -> list[Tile]:
    """The default first, then the others."""
    every = [Tile(*cut, programs) for cut, programs in itertools.product(cuts, PROGRAMS)]
    return [default, *(tile for tile in every if tile != default)]


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias, gy."""
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", generator=generator).to(dtype)

    E = shape[3]
    return [randn(*shape), randn(E, 1, 3, 3) / 3, randn(E), randn(*shape)]


def check(shape: tuple[int, ...], dtype: torch.dtype, tile: Tile, tile_gx: Tile) -> float:
    """The largest error over what is allowed, 1 or less if right: the table's, or twice what torch loses."""
    x, weight, bias, gy = problem(shape, dtype)
    exact = [t.double() for t in (x, weight, bias, gy)]
    wanted = [conv(*exact[:3], "silu"), *conv_backward_by_torch(exact[3], *exact[:3], "silu")]
    plain = [conv(x, weight, bias, "silu"), *conv_backward_by_torch(gy, x, weight, bias, "silu")]
    found = [
        conv_forward(x, weight, bias, "silu", tile_gx),
        *conv_backward(gy, x, weight, bias, "silu", tile, tile_gx),
    ]
    allowed = [max(TOLERANCE[dtype], 2 * error(p, w)) for p, w in zip(plain, wanted, strict=True)]
    return max(error(f, w) / a for f, w, a in zip(found, wanted, allowed, strict=True))


def milliseconds(function: Callable[[], object]) -> float:
    return triton.testing.do_bench_cudagraph(function, rep=10, return_mode="median")


def sweep(function: Callable[[Tile], object], candidates: list[Tile]) -> list[tuple[float, Tile]]:
    """(milliseconds, tile), the fastest first; what does not fit the machine is left out, and said."""
    times = []
    for tile in candidates:
        try:
            times.append((milliseconds(lambda tile=tile: function(tile)), tile))
        except (RuntimeError, triton.runtime.errors.OutOfResources) as reason:
            print(f"{tile} left out: {reason}", file=sys.stderr)
    return sorted(times)


def measure(shape: tuple[int, ...], cuts: dict[str, list[tuple[int, int, int]]]) -> dict[str, object]:
    x, weight, bias, gy = problem(shape, torch.bfloat16)
    nchw, g_nchw, E = x.permute(0, 3, 1, 2), gy.permute(0, 3, 1, 2), shape[3]
    pre = F.conv2d(nchw, weight, bias, padding=1, groups=E)
    one = [1, 1]

    def backward_by_torch() -> None:
        gpre = torch.ops.aten.silu_backward(g_nchw, pre)
        torch.ops.aten.convolution_backward(gpre, nchw, weight, [E], one, one, one, False, [0, 0], E, [True] * 3)

    forward = sweep(lambda tile: conv_forward(x, weight, bias, "silu", tile), tiles(cuts["forward"], FORWARD))
    tile_gx = forward[0][1]
    backward = sweep(
        lambda tile: conv_backward(gy, x, weight, bias, "silu", tile, tile_gx), tiles(cuts["backward"], BACKWARD)
    )
    return {
        "shape": shape,
        "forward": forward,
        "backward": backward,
        "backward 2 alone": milliseconds(lambda: conv_forward(gy, weight, None, "none", tile_gx)),
        "forward, torch": milliseconds(lambda: conv(x, weight, bias, "silu")),
        "backward, torch": milliseconds(backward_by_torch),
        "forward floor": 2 * x.nbytes / BYTES_PER_MS,
        "backward floor": 5 * x.nbytes / BYTES_PER_MS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures there too")
    parser.add_argument("--quick", action="store_true", help="two tilings each instead of all")
    arguments = parser.parse_args()
    cuts = QUICK if arguments.quick else {"forward": FORWARD_CUTS, "backward": BACKWARD_CUTS}
    torch.backends.cudnn.allow_tf32 = False  # or torch's fp32, which ours is held to, would be TF32
    start = time.perf_counter()

    worst = 0.0
    for dtype in TOLERANCE:
        for shape in ((1, 1, 1, 3), (2, 1, 9, 5), (2, 9, 1, 16), (3, 7, 13, 96), (2, 56, 57, 40)):
            worst = max(worst, check(shape, dtype, BACKWARD, FORWARD))
    # every cut on one shape; programs only share the rows out otherwise
    for one in (FORWARD, *(Tile(*cut) for cut in cuts["forward"])):
        worst = max(worst, check((2, 28, 28, 192), torch.bfloat16, BACKWARD, one))
    for one in (BACKWARD, *(Tile(*cut) for cut in cuts["backward"])):
        worst = max(worst, check((2, 28, 28, 192), torch.bfloat16, one, FORWARD))
    print(f"largest error / allowed error: {worst:.2f}, after {time.perf_counter() - start:.0f} s", flush=True)
    if worst > 1:
        sys.exit("the kernels are wrong: nothing is timed")

    machine = {"GPU": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    figures = []
    for shape in SHAPES:
        figures.append(measure(shape, cuts))
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": machine, "worst": worst, "figures": figures}, indent=1))

    print(*machine.values(), "bf16, ms", sep=", ")
    for f in figures:
        print(f["shape"])
        for way, default in (("forward", FORWARD), ("backward", BACKWARD)):
            (best, tile), floor = f[way][0], f[f"{way} floor"]
            ours = next(ms for ms, tile in f[way] if tile == default)
            print(
                f"  {way:8} {best:.4f} {tuple(tile)}, {floor / best:.0%} of the bytes' floor {floor:.4f};"
                f" default {ours:.4f}; torch {f[f'{way}, torch']:.4f}"
            )
            print("   ", "; ".join(f"{ms:.4f} {tuple(tile)}" for ms, tile in f[way][1:6]))
        print(f"  gpre -> gx alone {f['backward 2 alone']:.4f}")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
