"""Networks as joined inference operators: the same function, and only where it is allowed."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vmamba  # noqa: F401  (registers our names with timm)
from vmamba.layers import fusion
from vmamba.models import VMamba
from vmamba.ops import inference, joining

pytestmark = pytest.mark.usefixtures("one_thread")

OPERATORS = ("norm_linear", "norm_mlp", "depthwise_silu", "ss2d_residual", "conv_norm_gelu", "conv_norm")
GATED = ("norm_linear", "linear_residual", "depthwise_silu", "ss2d_norm", "conv_norm_gelu", "conv_norm")


@pytest.fixture
def anywhere(monkeypatch) -> list[torch.dtype]:
    """Lets every device and dtype run the joined operators, and keeps a list of the dtypes asked for."""
    asked = []

    def always(x):
        asked.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)
        return asked[-1]

    monkeypatch.setattr(fusion, "inference_dtype", always)
    return asked


def network(**architecture) -> VMamba:
    torch.manual_seed(0)
    model = VMamba(depths=(1, 1, 1, 1), dims=16, num_classes=7, **architecture).eval()
    with torch.no_grad():  # so that a forgotten bias or norm shows
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", [{}, {"d_state": 3, "ssm_ratio": 2.0, "ssm_gate": True, "mlp_ratio": 0.0}])
@pytest.mark.parametrize("size", [(64, 64), (33, 90)])
@torch.no_grad()
def test_joined_operators_compute_the_network(anywhere, monkeypatch, architecture, size):
    model, x = network(**architecture), images(2, 3, *size)
    joined = model(x)
    assert len(anywhere) == 8  # the stem, four blocks, three downsamplings
    monkeypatch.setattr(fusion, "inference_dtype", lambda x: None)
    torch.testing.assert_close(joined, model(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_half_precision_loses_no_more_than_layer_by_layer(anywhere, monkeypatch):
    model, x = network(), images(2, 3, 128, 128)
    wanted = model.double().forward_features(x.double())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        joined = model.forward_features(x)
        assert anywhere[-1] == torch.bfloat16
        monkeypatch.setattr(fusion, "inference_dtype", lambda x: None)
        one_by_one = model.forward_features(x)
    assert (joined - wanted).norm() <= 1.2 * (one_by_one - wanted).norm()


@torch.no_grad()
def test_the_operators_are_counted_as_what_they_compute(anywhere, monkeypatch):
    model, x = network(), images(1, 3, 64, 64)
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
        monkeypatch.setattr(fusion, "inference_dtype", lambda x: None)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("operators", "gate"), [(OPERATORS, False), (GATED, True)])
@torch.no_grad()
def test_they_are_taken_under_torch_compile(monkeypatch, operators, gate):
    table = inference.BACKENDS
    monkeypatch.setitem(table, "portable", table["portable"]._replace(joined=inference.Plain))
    seen = []

    def backend(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    model, x = network(ssm_gate=gate, mlp_ratio=0.0 if gate else 4.0), images(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))
    assert {f"vmamba.{name}" for name in operators} <= set(seen)


def use_hook(model):
    model.stages[0].blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)


def use_a_subclass(model):
    class Scaled(nn.Linear):
        pass

    ssm = model.stages[0].blocks[0].ssm
    ssm.out_proj = Scaled(ssm.out_proj.in_features, ssm.out_proj.out_features, bias=False)


def use_another_tensor(model):
    class Sharded(torch.Tensor):
        pass

    norm = model.stages[0].blocks[0].norm
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Sharded))


@pytest.mark.parametrize("change", [use_hook, use_a_subclass, use_another_tensor, nn.Module.train])
def test_what_somebody_changed_runs_module_by_module(anywhere, monkeypatch, change):
    model = network().stages[0].blocks[0]
    whole = nn.Module()
    whole.stages = [nn.Module()]
    whole.stages[0].blocks = [model]
    if change is nn.Module.train:
        model.train()
    else:
        change(whole)
    called = []
    monkeypatch.setattr(type(model), "_forward_fused", lambda *_: called.append(True))
    with torch.no_grad():
        model(images(1, 4, 4, 16))
    assert not called


@pytest.mark.parametrize(
    "architecture", [{"post_norm": True}, {"routes": "cascade2d"}, {"gated_mlp": True}, {"mlp_act": "relu"}]
)
def test_other_architectures_run_module_by_module(anywhere, monkeypatch, architecture):
    block = network(**architecture).stages[0].blocks[0]
    monkeypatch.setattr(type(block), "_forward_fused", None)
    with torch.no_grad():
        assert block(images(1, 4, 4, 16)).shape == (1, 4, 4, 16)


def test_they_are_for_inference_in_half_precision_on_devices_with_kernels(monkeypatch):
    x = images(1, 4).bfloat16()
    with torch.no_grad():
        assert joining.inference_dtype(x) is None  # the CPU has none
        table = inference.BACKENDS
        monkeypatch.setitem(table, "portable", table["portable"]._replace(joined=inference.Plain))
        assert joining.inference_dtype(x) == torch.bfloat16
        assert joining.inference_dtype(x.float()) is None
        with torch.autocast("cpu", torch.float16):
            assert joining.inference_dtype(x.float()) == torch.float16
        assert joining.inference_dtype(x.to("meta")) is None
        asked = []
        torch.func.vmap(lambda t: (asked.append(joining.inference_dtype(t)), t)[1])(x)
        assert asked == [None]
    assert joining.inference_dtype(x) is None  # gradients are on


def test_the_networks_made_by_name_are_usual_ones():
    """Every released variant runs joined, but for those whose configuration says otherwise."""
    for name in timm.list_models("*vmamba*"):
        with torch.device("meta"):
            model = timm.create_model(name)
        for stage in model.stages:
            assert all(block._is_usual() for block in stage.blocks), name


def training_results(block, x):
    """Output and gradients in training, with the same draws of stochastic depth."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    out = block(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in block.parameters())]


def test_the_mlp_of_training_computes_the_layers(monkeypatch):
    """With stochastic depth, which takes the same random numbers."""
    model = network(drop_path_rate=0.5).train()
    block, x = model.stages[3].blocks[0], images(8, 2, 3, 128)
    wanted = training_results(block, x)
    called = []
    monkeypatch.setattr(fusion, "training_dtype", lambda x: called.append(x.shape) or torch.float32)
    found = training_results(block, x)
    assert called == [x.shape]
    for out, by_layers in zip(found, wanted, strict=True):
        torch.testing.assert_close(out, by_layers, rtol=1e-4, atol=1e-5)


def test_the_network_of_training_computes_the_layers(monkeypatch):
    """Stem, downsampling and MLPs joined, with and without stochastic depth: every gradient."""
    model, x = network(drop_path_rate=0.3).train(), images(2, 3, 64, 96)
    wanted = training_results(model, x)
    called = []
    monkeypatch.setattr(fusion, "training_dtype", lambda x: called.append(x.shape) or torch.float32)
    found = training_results(model, x)
    assert len(called) == 7  # the stem, three downsamplings, the MLPs of 32, 64 and 128 channels
    for out, by_layers in zip(found, wanted, strict=True):
        torch.testing.assert_close(out, by_layers, rtol=1e-4, atol=1e-5)


def drop_inside(block):
    block.mlp.drop1.p = 0.1


@pytest.mark.parametrize("change", [use_hook, use_a_subclass, use_another_tensor, drop_inside])
def test_the_mlp_of_training_runs_by_layers_where_somebody_changed_it(monkeypatch, change):
    model = network().train()
    block = model.stages[0].blocks[0]
    change(block if change is drop_inside else model)
    if change is use_a_subclass:
        block.mlp.fc1 = type(block.ssm.out_proj)(16, 64)
    monkeypatch.setattr(fusion, "training_dtype", lambda x: torch.float32)
    monkeypatch.setattr(type(block), "_add_mlp", None)
    assert block(images(1, 4, 4, 16)).shape == (1, 4, 4, 16)
