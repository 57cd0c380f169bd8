"""The portable backend on this machine's CPU: against the reference loop, with the size, and as a whole network.

    python benchmarks/cpu.py [--json FILE] [--threads N]

Prints a table. Every figure is the median of several runs after a warm-up; what is compared is run in turn, since the
speed of shared machines drifts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor

import vmamba  # noqa: F401  registers the models
from vmamba.ops import ss2d

PEER = "swin_tiny_patch4_window7_224"


def medians(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each function, run in turn."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [1000 * statistics.median(seconds) for seconds in times]


def problem(side: int, E: int = 96, R: int = 6, N: int = 1) -> list[Tensor]:
    """SS2D's arguments for one image of side x side pixels, as in stage 1 of VMamba-T[s1l8] at 224 px."""
    K = 4
    return [
        torch.randn(1, side, side, E),
        torch.randn(K, R + 2 * N, E) * E**-0.5,
        torch.randn(K, E, R) * R**-0.5,
        torch.rand(K, E) * 2 - 4,
        -torch.rand(K * E, N) - 0.5,
        torch.ones(K * E),
    ]


def forward_and_backward(arguments: list[Tensor], backend: str) -> None:
    leaves = [t.detach().requires_grad_() for t in arguments]
    ss2d(*leaves, backend=backend).sum().backward()


def operator_figures() -> dict[str, float]:
    small, large = problem(28), problem(56)
    with torch.no_grad():
        portable, loop = medians([lambda: ss2d(*large), lambda: ss2d(*large, backend="reference")], 9)
    both_small, both_large = medians(
        [lambda: forward_and_backward(small, "auto"), lambda: forward_and_backward(large, "auto")], 9
    )
    with torch.no_grad():
        forward_small, forward_large = medians([lambda: ss2d(*small), lambda: ss2d(*large)], 9)
    return {
        "portable forward ms, 56x56x96": portable,
        "reference forward ms, 56x56x96": loop,
        "reference / portable": loop / portable,
        "portable backward ms, L=784": both_small - forward_small,
        "portable backward ms, L=3136": both_large - forward_large,
        "backward L=3136 / L=784": (both_large - forward_large) / (both_small - forward_small),
    }


def network_figures() -> dict[str, float]:
    figures: dict[str, float] = {}
    ours, peer = timm.create_model("vmamba_tiny_s1l8"), timm.create_model(PEER)

    def infer(model: torch.nn.Module, images: Tensor) -> None:
        with torch.inference_mode():
            model(images)

    def train(model: torch.nn.Module, images: Tensor) -> None:
        model.zero_grad()
        model(images).sum().backward()

    for batch, repeats in ((1, 15), (8, 5)):
        images = torch.randn(batch, 3, 224, 224)
        for name, step in (("forward", infer), ("forward + backward", train)):
            for model in (ours, peer):
                model.train(step is train)
            a, b = medians(
                [lambda step=step, x=images: step(ours, x), lambda step=step, x=images: step(peer, x)], repeats
            )
            figures[f"VMamba-T {name} ms, batch {batch}"] = a
            figures[f"Swin-T {name} ms, batch {batch}"] = b
            figures[f"VMamba-T / Swin-T {name}, batch {batch}"] = a / b
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--threads", type=int, help="threads torch may use; default: torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    machine = {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }
    for name, value in machine.items():
        print(f"{name:44} {value}")
    figures: dict[str, float] = {}
    for part in (operator_figures, network_figures):
        for name, value in part().items():
            figures[name] = value
            print(f"{name:44} {value:10.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
