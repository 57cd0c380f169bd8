"""The fused SS2D on a GPU: first correct against fp64, then timed at the stages of VMamba-T.

    python benchmarks/ss2d_gpu.py --json out.json [--shapes 1,2,3,4,v0] [--batch 128] [--compare]

Times are medians over CUDA-graph replays that rotate among enough input sets to overflow the L2 cache. Nothing is timed
where an error is above twice what the portable backend makes in the same dtype (and above the roundings of fp32
itself).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

from vmamba.ops import dispatch
from vmamba.ops.judge import TOLERANCE, error
from vmamba.ops.reference import ss2d_scan_reference

# name: (H, W, E, R, N, forward target in ms)
STAGES = {
    "1": (56, 56, 96, 6, 1, 0.35),
    "2": (28, 28, 192, 12, 1, 0.18),
    "3": (14, 14, 384, 24, 1, 0.10),
    "4": (7, 7, 768, 48, 1, 0.08),
    "v0": (56, 56, 192, 6, 16, None),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GRADIENTS = ("x", "p", "dt_weight", "dt_bias", "A", "D")


def problem(B, H, W, E, R, N, dtype, seed=0, small_delta=False):
    """(x, p, dt_weight, dt_bias, A, D), steps (1e-3 to 0.1) and decays as in a trained model; weights fp32."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    bias = randn(4, E) * 1.2 - 4.6 if not small_delta else randn(4, E) * 0.1 - 6.9
    return [
        randn(B, H, W, E).to(dtype),
        randn(B, H, W, 4 * (R + 2 * N)).to(dtype),
        randn(4, E, R) * R**-0.5 * 0.5,
        bias,
        -torch.rand(4 * E, N, generator=generator, device="cuda") * 4 - 0.1
        if not small_delta
        else -torch.ones(4 * E, N, device="cuda"),
        randn(4 * E),
    ]


def run(name, tensors, gy, routes):
    backend = dispatch.BACKENDS[name]
    y, states = backend.ss2d_forward(*tensors, routes, True)
    return y, *backend.ss2d_backward(gy, *tensors, states, routes)


def check(label, B, H, W, E, R, N, dtype, routes="cross2d", **options):
    """Errors (ours, portable) of y and every gradient against the fp64 reference; ours may be twice the portable's."""
    tensors = problem(B, H, W, E, R, N, dtype, **options)
    gy = torch.randn(B, H, W, E, device="cuda").to(dtype)
    wide = [t.double().requires_grad_() for t in tensors]
    if H * W <= 1024:
        y = ss2d_scan_reference(*wide, routes)
        wanted = (y.detach(), *torch.autograd.grad(y, wide, gy.double()))
    else:  # the portable backend in fp64 is the reference's equal and takes seconds, not minutes
        with torch.no_grad():
            wanted = run("portable", wide, gy.double(), routes)
    ours, again, plain = (run(name, tensors, gy, routes) for name in ("triton", "triton", "portable"))
    result = {"case": label, "dtype": str(dtype)[6:], "routes": routes, "shape": [B, H, W, E, R, N], "errors": {}}
    good = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    result["deterministic"] = good
    for name, a, b, c in zip(("y", *GRADIENTS), ours, plain, wanted, strict=True):
        # the gradients of the fp32 weights are sums of products of numbers in the dtype
        limit = max(2 * error(b, c), TOLERANCE[dtype if name not in ("y", "x", "p") else torch.float32])
        result["errors"][name] = (error(a, c), error(b, c), limit)
        good &= error(a, c) <= limit
    result["good"] = good
    return result


def verdict(result):
    """One line: ok, or what is wrong, with the errors (ours, portable)."""
    if result["good"]:
        return "ok"
    wrong = {name: f"{ours:.1e}/{plain:.1e}" for name, (ours, plain, limit) in result["errors"].items() if ours > limit}
    return f"WRONG {wrong}" if wrong else "WRONG: differs from run to run"


def timed(function, sets, repeats=20):
    """Median milliseconds of function(*arguments), from replays of one CUDA graph that runs it once for each set."""
    for arguments in sets:
        function(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in sets:
            function(*arguments)
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(sets))
    return statistics.median(times[3:])


def benchmark(name, batch, dtype, backend="triton"):
    H, W, E, R, N, target = STAGES[name]
    chosen = dispatch.BACKENDS[backend]
    nbytes = batch * H * W * E * dtype.itemsize
    count = max(1, min(8, 150_000_000 // nbytes))
    sets = [problem(batch, H, W, E, R, N, dtype, seed=i) for i in range(count)]
    gys = [torch.randn_like(s[0]) for s in sets]
    row = {"stage": name, "batch": batch, "shape": [H, W, E, R, N], "dtype": str(dtype)[6:], "target_ms": target}
    row["forward_ms"] = timed(lambda *t: chosen.ss2d_forward(*t, "cross2d", False), sets)
    row["forward_keep_ms"] = timed(lambda *t: chosen.ss2d_forward(*t, "cross2d", True), sets)
    states = [chosen.ss2d_forward(*s, "cross2d", True)[1] for s in sets]
    row["backward_ms"] = timed(
        lambda gy, s, st: chosen.ss2d_backward(gy, *s, st, "cross2d"), list(zip(gys, sets, states, strict=True))
    )
    # floor: x and p in, y out, once
    row["bytes_floor_ms"] = batch * H * W * (2 * E + 4 * (R + 2 * N)) * dtype.itemsize / 4.3e9
    return row


def kernels(name, batch, dtype):
    """Milliseconds of each kernel of one forward and backward."""
    H, W, E, R, N, _ = STAGES[name]
    tensors = problem(batch, H, W, E, R, N, dtype)
    gy = torch.randn_like(tensors[0])
    run("triton", tensors, gy, "cross2d")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            run("triton", tensors, gy, "cross2d")
        torch.cuda.synchronize()
    return {e.key[:60]: round(e.device_time_total / 5000, 4) for e in profile.key_averages() if e.device_time_total > 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", required=True)
    parser.add_argument("--stages", default="1,2,3,4,v0")
    parser.add_argument("--batches", default="128")
    parser.add_argument("--skip-check", action="store_true", help="time without checking; results are marked unchecked")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    report = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "command": " ".join(sys.argv),
        "checked": not options.skip_check, "checks": [], "times": [], "kernels": {},
    }  # fmt: skip

    def save():
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)

    if not options.skip_check:
        cases = [
            ("stage-like 1", 2, 56, 56, 96, 6, 1), ("stage-like 2", 2, 28, 28, 192, 12, 1),
            ("stage-like 3", 2, 14, 14, 384, 24, 1), ("stage-like 4", 3, 7, 7, 768, 48, 1),
            ("odd", 3, 7, 13, 40, 3, 1), ("row", 2, 1, 37, 33, 5, 2), ("column", 2, 37, 1, 64, 5, 3),
            ("16 states", 2, 14, 14, 64, 6, 16), ("many images", 700, 8, 8, 32, 6, 1),
        ]  # fmt: skip
        runs = [(case, dtype, "cross2d") for case in cases for dtype in DTYPES.values()]
        runs += [(cases[4], torch.float32, r) for r in ("unidi", "bidi")]
        for case, dtype, routes in runs:
            started = time.time()
            result = check(*case, dtype, routes)
            report["checks"].append(result)
            print(case, result["dtype"], routes, verdict(result), f"{time.time() - started:.1f} s", flush=True)
            save()
        result = check("long, small delta", 1, 1024, 1024, 32, 6, 1, torch.bfloat16, small_delta=True)
        report["checks"].append(result)
        print("long, small delta", verdict(result), flush=True)
        save()
        if not all(r["good"] for r in report["checks"]):
            print("NOT CORRECT: no times", flush=True)
            sys.exit(1)
    for batch in map(int, options.batches.split(",")):
        for name in options.stages.split(","):
            row = benchmark(name, batch, torch.bfloat16)
            report["times"].append(row)
            report["kernels"][f"{name} x{batch}"] = kernels(name, batch, torch.bfloat16)
            save()
    print(
        f"{'stage':>6} {'batch':>5} {'forward':>8} {'keep':>8} {'target':>7} {'backward':>9} {'ratio':>6} {'bytes':>7}"
    )
    for r in report["times"]:
        ratio = r["backward_ms"] / r["forward_ms"]
        print(
            f"{r['stage']:>6} {r['batch']:>5} {r['forward_ms']:>8.3f} {r['forward_keep_ms']:>8.3f} "
            f"{r['target_ms'] or 0:>7} {r['backward_ms']:>9.3f} {ratio:>6.2f} {r['bytes_floor_ms']:>7.3f}"
        )
    for name, parts in report["kernels"].items():
        print(name, {k: v for k, v in parts.items() if v > 0.01})


if __name__ == "__main__":
    main()
