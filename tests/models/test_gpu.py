"""Whole networks on a GPU: joined inference, CUDA graphs, and kernels that serve every size."""

from __future__ import annotations

import sys

import pytest
import timm
import torch

import vmamba  # noqa: F401  (registers our names with timm)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of torch.compile
]

NAME = "vmamba_micro"


def network(name: str = NAME, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **options).cuda()


def images(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).cuda()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("name", [NAME, "vmamba_tiny_s1l8", "vanilla_vmamba_tiny"])
@pytest.mark.parametrize("size", [(2, 224, 224), (1, 65, 230)])
def test_joined_inference_loses_no_more_than_layer_by_layer(name, size):
    model = network(name).eval()
    x = images(size[0], 3, *size[1:])
    with torch.no_grad():
        wanted = model.double().forward_features(x.double())
    model.float()
    with torch.autocast("cuda", torch.bfloat16):
        one_by_one = model.forward_features(x)  # gradients are recorded
        with torch.inference_mode():
            joined = model.forward_features(x)
    assert joined.dtype == one_by_one.dtype
    assert relative(joined, wanted) <= 1.2 * relative(one_by_one, wanted)


def training_gradients(model, x):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_as_it_is_eager(mode):
    model, x = network().eval(), images(2, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    wanted = training_gradients(model, x)
    for _ in range(3):  # recording graphs takes two calls
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            assert relative(compiled(x), model(x)) < 2e-2
        found = training_gradients(compiled._orig_mod if mode is None else compiled, x)
        for name, gradient in found.items():
            assert relative(gradient, wanted[name.removeprefix("_orig_mod.")]) < 5e-2, name


def compiled_kernels() -> dict[tuple, set[tuple]]:
    """Name, types, constants and options of what is compiled -> what else it was compiled for: alignment, numbers."""
    from vmamba.ops.triton_backend.launch import Kernel

    modules = [module for name, module in sys.modules.items() if name.startswith("vmamba.ops.triton_backend.")]
    kernels = {id(k): k for module in modules for k in vars(module).values() if isinstance(k, Kernel)}
    found: dict[tuple, set[tuple]] = {}
    for k in kernels.values():
        for _, keys, *_ in k.jit.device_caches.values():
            for arguments, options in keys:
                assert len(arguments) == len(k.jit.params)
                constant = [p.is_constexpr for p in k.jit.params]
                # a number that is 1 has the type of a constant
                types = tuple(
                    str(a) if c else a[0] for a, c in zip(arguments, constant, strict=True) if c or "*" in a[0]
                )
                others = tuple(map(str, (a for a, c in zip(arguments, constant, strict=True) if not c)))
                found.setdefault((k.jit.__name__, types, options), set()).add(others)
    return found


def test_no_size_and_no_batch_is_compiled_in():
    """Only another shape of tile makes another kernel: walks cut into segments, grids that tiles fill."""
    model = network().eval()

    def run(batch, height, width):
        x = images(batch, 3, height, width)
        training_gradients(model, x)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            model(x)
        return compiled_kernels()

    run(64, 224, 224)
    before = run(1, 224, 224)
    assert len(before) > 20
    for size in ((63, 224, 224), (96, 256, 256), (48, 232, 200), (2, 320, 224), (1, 200, 232), (3, 200, 200)):
        after = run(*size)
        assert {key: after[key] - before[key] for key in before if after[key] != before[key]} == {}, size


@pytest.mark.parametrize("training", [False, True])
def test_the_pass_before_the_first_step_leaves_nothing_to_compile(training, monkeypatch):
    triton = pytest.importorskip("triton")
    compiled = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **details: compiled.append(details["src"].name))
    # channels that no other test has
    model = network(dims=(80, 160, 320, 640)).train(training)
    x = images(2, 3, 96, 96)
    with torch.set_grad_enabled(training), torch.autocast("cuda", torch.bfloat16):
        model.compile_ahead(x)
        known = len(compiled)
        y = model(x)
        if training:
            y.float().sum().backward()
    assert known > 10
    assert compiled[known:] == []
