"""Optimiser groups and the learning-rate schedule."""

import copy

import pytest
import timm
import torch
from timm.optim import Muon
from torch import nn

from vmamba import list_models
from vmamba.tasks import make_optimizer, warmup_cosine, warmup_polynomial, warmup_steps
from vmamba.tasks.muon import BatchedMuon, _orthogonal


@pytest.mark.parametrize("name", list_models())
def test_nothing_that_must_not_decay_decays(name):
    model = timm.create_model(name, device="meta")
    optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    kept = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    exempt = model.no_weight_decay()
    assert exempt
    for parameter_name, parameter in model.named_parameters():
        expected = kept if parameter.ndim <= 1 or parameter_name in exempt else decayed
        assert id(parameter) in expected, parameter_name
    assert len(decayed) + len(kept) == len(list(model.parameters()))


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="no optimiser 'adamwow'"):
        make_optimizer(timm.create_model("test_vit"), "adamwow", lr=1.0, weight_decay=0.0)


def test_other_optimizers_and_betas():
    model = timm.create_model("test_vit")
    assert make_optimizer(model, "lamb", lr=0.1, weight_decay=0.0).__class__.__name__ == "Lamb"
    assert make_optimizer(model, lr=0.1, weight_decay=0.0, betas=(0.8, 0.9)).param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("name", "not_matrices"),
    [
        ("vmamba_nano", {"x_proj_weight", "dt_weight", "dt_bias", "A_log"}),
        ("vanilla_vmamba_tiny", {"x_proj_weight", "dt_weight", "dt_bias", "A_log"}),
        ("swin_tiny_patch4_window7_224", {"relative_position_bias_table"}),
        ("convnext_tiny", {"conv_dw.weight"}),
    ],
)
def test_muon_orthogonalises_the_matrices_of_layers_alone(name, not_matrices):
    model = timm.create_model(name, device="meta")
    groups = make_optimizer(model, "nmuon", lr=1e-3, weight_decay=0.05).param_groups
    plain = make_optimizer(model, lr=1e-3, weight_decay=0.05).param_groups
    names = {id(p): name for name, p in model.named_parameters()}

    def those(groups, **conditions):
        chosen = [g for g in groups if all(g[key] == value for key, value in conditions.items())]
        return {names[id(p)] for g in chosen for p in g["params"]}

    assert those(groups) == set(names.values())
    for weight_decay in (0.0, 0.05):
        assert those(groups, weight_decay=weight_decay) == those(plain, weight_decay=weight_decay)
    orthogonal = those(groups, use_fallback=False)
    assert any(name.endswith(("fc1.weight", "out_proj.weight")) for name in orthogonal)
    assert "head.fc.weight" not in orthogonal
    assert not any(name.endswith(tuple(not_matrices)) for name in orthogonal)
    assert those(groups, use_fallback=True) > {n for n in names.values() if n.endswith(tuple(not_matrices))}


def test_a_step_of_muon_changes_everything():
    model = timm.create_model("vmamba_nano", num_classes=3)
    optimizer = make_optimizer(model, "nmuon", lr=1e-2, weight_decay=0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("network", ["vmamba_nano", "convnext_atto", "test_resnet"])
@pytest.mark.parametrize("name", ["muon", "nmuon"])
def test_batched_muon_is_timms_in_fewer_launches(network, name):
    model = timm.create_model(network, num_classes=3)
    theirs = copy.deepcopy(model)
    optimizer = make_optimizer(model, name, lr=1e-2, weight_decay=0.05)
    assert type(optimizer) is BatchedMuon
    twin = dict(zip(model.parameters(), theirs.parameters(), strict=True))
    reference = Muon([{**g, "params": [twin[p] for p in g["params"]]} for g in optimizer.param_groups], lr=1e-2)
    before = copy.deepcopy(model)
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(True))
    for _ in range(3):
        # of full rank: what rounding leaves of a missing direction would be blown up to a step
        for p, q in twin.items():
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        calls = optimizer.step(), reference.step()
    assert calls == (None, None)
    assert len(hooked) == 3
    for (name, p), q, start in zip(model.named_parameters(), theirs.parameters(), before.parameters(), strict=True):
        assert (p - q).norm() <= 2e-6 * (p - start).norm(), name
    # one goes on where the other stopped
    reference.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(reference.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_muon_as_a_graph_is_muon(monkeypatch):
    """The graph is recorded in the second step, and serves again when gradients lie elsewhere or the rate changes."""
    model = timm.create_model("vmamba_nano", num_classes=3).cuda()
    plain = copy.deepcopy(model)
    optimizer = make_optimizer(model, "nmuon", lr=1e-2, weight_decay=0.05)
    reference = make_optimizer(plain, "nmuon", lr=1e-2, weight_decay=0.05)
    monkeypatch.setattr(reference, "_steps", _orthogonal)
    for step in range(5):
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for each in (optimizer, reference):
            for group in each.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            each.step()
        for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(p, q[1], rtol=1e-5, atol=1e-7, msg=f"{name} after step {step}")
    assert [type(graph).__name__ for graph in optimizer._graphs.values()] == ["_Graph"]


def test_a_copy_of_muon_goes_on_as_the_original():
    model = timm.create_model("test_resnet", num_classes=3)
    optimizer = make_optimizer(model, "nmuon", lr=1e-2, weight_decay=0.05)
    twin, other = copy.deepcopy((model, optimizer))
    for network, each in ((model, optimizer), (twin, other)):
        for p in network.parameters():
            p.grad = torch.ones_like(p)
        each.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_batched_muon_takes_a_closure_and_leaves_out_what_has_no_gradient():
    model = timm.create_model("test_resnet", num_classes=3)
    optimizer = make_optimizer(model, "nmuon", lr=1e-2, weight_decay=0.05)
    weight = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight
    weight.requires_grad_(False)
    before, head = weight.clone(), model.fc.weight.detach().clone()

    def closure():
        loss = model(torch.randn(2, 3, 64, 64)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert torch.equal(weight, before)
    assert not torch.equal(model.fc.weight, head)


def test_schedule_warms_up_and_falls():
    settings = {"steps": 100, "warmup": 10, "start": 0.01, "end": 0.1}
    factors = [warmup_cosine(step, **settings) for step in range(101)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[5] == pytest.approx(0.505)
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert warmup_cosine(120, **settings) == pytest.approx(0.1)


def test_schedule_without_warmup():
    assert warmup_cosine(0, steps=1, warmup=0, start=0.5, end=0.0) == 1.0


def test_official_decay_takes_in_the_state_space_parameters():
    model = timm.create_model("vanilla_vmamba_tiny", device="meta")
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = []
    for official in (False, True):
        groups = make_optimizer(model, lr=1e-3, weight_decay=0.05, decay_ssm=official).param_groups
        decayed.append({names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]})
    more = decayed[1] - decayed[0]
    assert decayed[0] < decayed[1]
    assert {name.rpartition(".")[2] for name in more} == {"A_log", "dt_bias"}
    assert len(more) == 2 * sum(model.config.depths)


def test_layer_decay_shrinks_rates_towards_the_stem():
    model = timm.create_model("vmamba_tiny_s1l8", device="meta")
    optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.05, layer_decay=0.8)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert len(rates) == len(rate)
    assert rates["head.fc.weight"] == pytest.approx(1e-3)
    # the last block's layer is one below the head's
    assert rates["stages.3.blocks.1.ssm.in_proj.weight"] == pytest.approx(8e-4)
    assert rates["stages.3.blocks.0.ssm.in_proj.weight"] == pytest.approx(6.4e-4)
    # between the head and the stem: 14 blocks
    assert rates["stem.conv1.weight"] == pytest.approx(1e-3 * 0.8**15)
    assert min(rates.values()) == rates["stem.conv1.weight"]
    exempt = model.no_weight_decay()
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            assert all(p.ndim > 1 for p in group["params"])
    assert {id(dict(model.named_parameters())[name]) for name in exempt} <= {
        id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]
    }


def test_settings_an_optimizer_has_no_use_for():
    optimizer = make_optimizer(
        timm.create_model("test_vit"), "sgd", lr=0.1, weight_decay=0.0, betas=(0.8, 0.9), eps=1e-3
    )
    assert "betas" not in optimizer.param_groups[0]


def _theirs(steps, *schedulers):
    """The factors of torch's schedulers, multiplied, at every step."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    made = [make(optimizer) for make in schedulers]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in made:
            scheduler.step()
    return rates


def test_steps_equal_torchs_warm_up_and_multi_step():
    schedulers = torch.optim.lr_scheduler
    theirs = _theirs(
        60,
        lambda o: schedulers.LinearLR(o, start_factor=0.001, total_iters=10),
        lambda o: schedulers.MultiStepLR(o, [40, 55], gamma=0.1),
    )
    ours = [warmup_steps(step, warmup=10, start=0.001, drops=(40, 55), gamma=0.1) for step in range(60)]
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("power", [1.0, 0.9])
def test_the_polynomial_equals_torchs(power):
    settings = {"steps": 50, "warmup": 0, "start": 0.0, "end": 0.0, "power": power}
    theirs = _theirs(50, lambda o: torch.optim.lr_scheduler.PolynomialLR(o, total_iters=50, power=power))
    assert [warmup_polynomial(step, **settings) for step in range(50)] == pytest.approx(theirs, rel=1e-9)
    settings |= {"warmup": 10, "start": 0.1, "end": 0.2}
    assert warmup_polynomial(5, **settings) == pytest.approx(0.55)
    assert warmup_polynomial(10, **settings) == 1.0
    assert warmup_polynomial(50, **settings) == pytest.approx(0.2)


def test_vectors_decay_where_asked_for_but_norms_and_marked_ones_do_not():
    model = timm.create_model("vmamba_nano", device="meta")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, lr=1e-3, weight_decay=0.05, decay_vectors=True).param_groups
    kept = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    assert len(norms) > 20
    assert kept == norms | model.no_weight_decay()
    with pytest.raises(ValueError, match="decay_vectors does not go with layer_decay"):
        make_optimizer(model, lr=1e-3, weight_decay=0.05, decay_vectors=True, layer_decay=0.8)
