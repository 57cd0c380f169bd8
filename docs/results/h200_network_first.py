"""What made h200_network_first.json, statements in the order in which they ran: OUT=. python h200_network_first.py

A one-off, kept as the record of its figures; new figures come from `vmamba bench`.
"""

import json
import os
import statistics
import time
import warnings

import timm
import torch

import vmamba

warnings.filterwarnings("ignore")
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
torch.backends.cudnn.benchmark = True
out = {
    "conditions": {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "autocast": "bf16",
        "TF32": True,
        "backends": {k: v._asdict() for k, v in vmamba.ops.backends("cuda").items()},
    },
    "figures": {},
}


def say(key, value):
    out["figures"][key] = value
    print(f"{key:60} {value}", flush=True)
    with open(os.environ["OUT"] + "/network.json", "w") as file:
        json.dump(out, file, indent=1)


def rate(step, images, rounds=5, inner=10):
    for _ in range(3):
        step()
    rates = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(inner):
            step()
        end.record()
        torch.cuda.synchronize()
        rates.append(inner * images / start.elapsed_time(end) * 1e3)
    return round(statistics.median(rates), 1)


def make(name):
    torch.manual_seed(0)
    model = timm.create_model(name).cuda()
    return model.to(memory_format=torch.channels_last) if "convnext" in name else model


def infer(model, x):
    def step():
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            return model(x)

    return step


def train(model, x):
    y = torch.randint(0, 1000, (len(x),), device="cuda")

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()

    return step


def first_call(step):
    start = time.time()
    step()
    torch.cuda.synchronize()
    return round(time.time() - start, 1)


x = torch.randn(128, 3, 224, 224, device="cuda")
for name in ("vmamba_tiny_s1l8", "convnext_tiny"):
    xi = x.to(memory_format=torch.channels_last) if "convnext" in name else x
    m = make(name).eval()
    say(f"{name} first eager call s", first_call(infer(m, xi)))
    say(f"{name} inference eager img/s", rate(infer(m, xi), 128))
    c = torch.compile(m)
    say(f"{name} first compiled call s", first_call(infer(c, xi)))
    say(f"{name} inference compiled img/s", rate(infer(c, xi), 128))
    torch._dynamo.reset()
    del m, c
    c = torch.compile(make(name).train())
    f = train(c, xi)
    say(f"{name} first training step s", first_call(f))
    torch.cuda.reset_peak_memory_stats()
    say(f"{name} training compiled img/s", rate(f, 128, inner=5))
    say(f"{name} training peak GB", round(torch.cuda.max_memory_allocated() / 1e9, 2))
    torch._dynamo.reset()
    del c, f
    torch.cuda.empty_cache()

m = make("vmamba_tiny_s1l8").eval()
big = torch.randn(8, 3, 1024, 1024, device="cuda")
say("vmamba_tiny_s1l8 1024 px batch 8 eager img/s", rate(infer(m, big), 8, inner=5))
f = infer(torch.compile(m, mode="reduce-overhead"), x[:1])
for _ in range(3):
    f()
latencies = []
for _ in range(50):
    torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    torch.cuda.synchronize()
    latencies.append((time.perf_counter() - start) * 1e3)
say("vmamba_tiny_s1l8 batch-1 latency graphs ms", round(statistics.median(latencies), 3))
torch._dynamo.reset()
say("vmamba_tiny v0 inference eager img/s", rate(infer(make("vanilla_vmamba_tiny").eval(), x), 128, inner=3))
