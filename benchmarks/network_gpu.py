"""One network on a GPU: time, memory, the host's share, and with --kernels what each kernel takes.

    python benchmarks/network_gpu.py vmamba_tiny_s1l8 --task train --mode graphs --kernels

Quicker than `vmamba bench` to look into one case; without its check of results and its turns between models.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F

import vmamba  # noqa: F401  (registers our names with timm)

MODES = {"eager": None, "compile": {}, "graphs": {"mode": "reduce-overhead"}}


def make_step(options: argparse.Namespace) -> Callable[[], None]:
    """The step that is timed: bf16 autocast over fp32 weights, images on the device."""
    ours = options.model.startswith(("vmamba", "vanilla_vmamba"))
    layout = torch.preserve_format if ours else torch.channels_last
    model = timm.create_model(options.model).cuda().to(memory_format=layout).train(options.task == "train")
    images = torch.randn(options.batch, 3, options.size, options.size, device="cuda").contiguous(
        memory_format=torch.contiguous_format if ours else torch.channels_last
    )
    classes = torch.randint(0, 1000, (options.batch,), device="cuda")
    keywords = MODES[options.mode]
    network = model if keywords is None else torch.compile(model, dynamic=False, **keywords)

    def infer() -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            network(images)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(network(images), classes)
        loss.backward()

    return train if options.task == "train" else infer


def one_round(step: Callable[[], None], calls: int = 10) -> tuple[float, float]:
    """Milliseconds a call, between device events, and until the host has queued it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started = time.perf_counter()
    start.record()
    for _ in range(calls):
        step()
    queued = time.perf_counter() - started
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls, 1e3 * queued / calls


def waited(step: Callable[[], None], calls: int = 100) -> float:
    """Milliseconds from a call to its finished result."""
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def kernels(step: Callable[[], None], calls: int = 3) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    rows = [(e.device_time_total / 1e3 / calls, e.count / calls, e.key) for e in profile.key_averages()]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    total = f"{sum(row[0] for row in rows):.3f} ms in {sum(row[1] for row in rows):.0f} kernels"
    return [total, *(f"{ms:9.4f} {count:6.1f} {name[:150]}" for ms, count, name in rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--task", choices=["infer", "train"], default="infer")
    parser.add_argument("--mode", choices=list(MODES), default="graphs")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    started = time.perf_counter()
    step = make_step(options)
    for _ in range(4):  # CUDA graphs are recorded in the second and third
        step()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() / 1e9
    rounds = [one_round(step) for _ in range(5)]
    ms, host = (statistics.median(values) for values in zip(*rounds, strict=True))
    latency = f", waited for {waited(step):.3f} ms" if options.batch == 1 else ""
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {options.model} {options.task} {options.mode}, "
        f"batch {options.batch}, {options.size} px: {ms:.3f} ms, {1e3 * options.batch / ms:.0f} images/s{latency}; "
        f"host {host:.2f} ms, {memory:.2f} GB, first calls {first:.1f} s"
    )
    if options.kernels:
        print("\n".join(kernels(step)))


if __name__ == "__main__":
    main()
