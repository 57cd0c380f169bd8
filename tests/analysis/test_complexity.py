"""Parameters and operations, against the published figures."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vmamba import VMamba, create_upernet, list_models
from vmamba.analysis import count_modules, detector_macs, measure_complexity
from vmamba.models.detection import mask_rcnn

# VMamba (arXiv 2401.10166), the results on ADE20K: parameters in millions, and GFLOPs (one per multiply-accumulate) at
# 512 x 2048
PUBLISHED_UPERNETS = {
    "vmamba_tiny_s1l8": (62, 949),
    "vmamba_tiny_s2l5": (62, 948),
    "vmamba_small_s2l15": (82, 1028),
    "vmamba_base_s2l15": (122, 1170),
    "vanilla_vmamba_tiny": (55, 964),
    "vanilla_vmamba_small": (76, 1081),
    "vanilla_vmamba_base": (110, 1226),
}
# The official code's classifiers: GFLOPs at 224 x 224, and parameters
PUBLISHED_CLASSIFIERS = {
    "vanilla_vmamba_tiny": (5.627, 22_893_448),
    "vanilla_vmamba_small": (11.232, 44_417_416),
    "vanilla_vmamba_base": (18.020, 76_254_056),
    "vmamba_tiny_s2l5": (4.858, 30_705_832),
    "vmamba_tiny_s1l8": (4.906, 30_249_064),
    "vmamba_small_s2l15": (8.716, 50_147_752),
    "vmamba_small_s1l20": (8.612, 49_012_840),
    "vmamba_base_s2l15": (15.359, 88_557_800),
    "vmamba_base_s1l20": (15.221, 86_614_504),
}
# What other papers give for theirs, in the same convention
PUBLISHED_PEERS = {
    "swin_tiny_patch4_window7_224": (4.5, 28.3),
    "convnext_tiny": (4.5, 28.6),
    "deit_small_patch16_224": (4.6, 22.1),
}

# Its detectors: parameters in millions, and GFLOPs at 1280 x 800
PUBLISHED_DETECTORS = {
    "vmamba_tiny_s1l8": (50, 271),
    "vmamba_tiny_s2l5": (50, 270),
    "vmamba_base_s2l15": (108, 485),
    "vanilla_vmamba_tiny": (42, 286),
    "vanilla_vmamba_small": (64, 400),
    "vanilla_vmamba_base": (96, 540),
}


@pytest.mark.parametrize("backbone", PUBLISHED_UPERNETS)
def test_upernets_have_the_published_size_and_cost(backbone) -> None:
    millions, giga = PUBLISHED_UPERNETS[backbone]
    with torch.device("meta"):
        model = create_upernet(backbone, num_classes=150)
    found = measure_complexity(model, (1, 3, 512, 2048))
    assert found.parameters / 1e6 == pytest.approx(millions, abs=0.5)  # published as whole millions
    assert found.macs / 1e9 == pytest.approx(giga, rel=0.002)


@pytest.mark.parametrize("name", PUBLISHED_CLASSIFIERS)
def test_classifiers_have_the_published_size_and_cost(name) -> None:
    giga, parameters = PUBLISHED_CLASSIFIERS[name]
    found = measure_complexity(timm.create_model(name, device="meta"), (1, 3, 224, 224))
    assert found.parameters == parameters
    assert found.macs / 1e9 == pytest.approx(giga, rel=0.0005)


def test_every_released_classifier_is_held_to_a_figure() -> None:
    released = [name for name in list_models() if timm.get_pretrained_cfg(name).url]
    assert sorted(PUBLISHED_CLASSIFIERS) == released


@pytest.mark.parametrize("name", PUBLISHED_PEERS)
def test_other_networks_have_their_published_size_and_cost(name) -> None:
    giga, millions = PUBLISHED_PEERS[name]
    found = measure_complexity(timm.create_model(name, device="meta"), (1, 3, 224, 224))
    assert found.parameters / 1e6 == pytest.approx(millions, abs=0.05)
    assert found.macs / 1e9 == pytest.approx(giga, abs=0.05)


@pytest.mark.parametrize("name", list_models())
def test_the_modules_of_every_model_add_up(name) -> None:
    counts = count_modules(timm.create_model(name, device="meta"), (1, 3, 64, 96))
    network, *parts = counts
    assert network.name == ""
    assert network.depth == 0
    children = [part for part in parts if part.depth == 1]
    assert [part.name for part in children] == ["stem", "stages", "head"]
    for figure in ("parameters", "flops", "macs"):
        assert sum(getattr(part, figure) for part in children) == getattr(network, figure)
    blocks = {part.name: part for part in parts if part.kind == "VSSBlock"}
    ssm = next(part for part in parts if part.name == "stages.0.blocks.0.ssm")
    assert 0 < ssm.macs < blocks["stages.0.blocks.0"].macs < network.macs
    assert ssm.depth == 5


def test_cost_is_linear_in_pixels_but_for_the_classifier() -> None:
    model = timm.create_model("vmamba_tiny_s1l8", num_classes=0, device="meta")
    once, fourfold = (measure_complexity(model, (1, 3, size, size)) for size in (224, 448))
    assert fourfold.flops == 4 * once.flops
    # norms of the map that is pooled, and the pooling, are in the papers' figure too
    assert fourfold.macs == 4 * once.macs


def test_a_linear_layer_by_hand() -> None:
    model = nn.Linear(3, 5)
    model.train()
    assert measure_complexity(model, (2, 1, 7, 3)) == (20, 2 * 14 * 15, 14 * 15)
    assert model.training
    assert model.weight.device.type == "cpu"


def test_the_model_is_left_as_it_was() -> None:
    model = VMamba(dims=8, depths=(1, 1, 1, 1), num_classes=3)
    model.stages[1].eval()  # as someone does who freezes a stage
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    random = torch.get_rng_state()
    count_modules(model, (1, 3, 32, 32))
    with pytest.raises(ValueError, match="expected images"):
        count_modules(model, (1, 2, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(map(torch.equal, gradients, (parameter.grad for parameter in model.parameters())))
    assert torch.equal(random, torch.get_rng_state())


def test_norms_by_hand() -> None:
    """fvcore's figures an element: 5 and 4 for a LayerNorm with and without weights, 2 and 1 for a BatchNorm."""
    layer = nn.Sequential(nn.LayerNorm(7), nn.LayerNorm(7, elementwise_affine=False), nn.GroupNorm(2, 4))
    batch = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    assert [count.macs for count in count_modules(layer, (2, 4, 3, 7))] == [168 * 14, 168 * 5, 168 * 4, 168 * 5]
    assert [count.macs for count in count_modules(batch, (2, 4, 3, 7))] == [168 * 3, 168 * 2, 168]
    assert measure_complexity(nn.Sequential(layer, batch), (2, 4, 3, 7)).flops == 0


def test_attention_by_hand() -> None:
    """Keys against queries and weights against values: 2 L^2 C."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x * self.scale, x, x)

    assert measure_complexity(Attention(), (2, 3, 50, 8)) == (1, 2 * 2 * 3 * 2 * 50**2 * 8, 2 * 3 * 2 * 50**2 * 8)


def test_a_module_called_twice_has_the_sum() -> None:
    shared = nn.Linear(3, 3, bias=False)
    counts = count_modules(nn.Sequential(shared, nn.ReLU(), shared), (1, 1, 5, 3))
    assert [(count.name, count.kind, count.macs) for count in counts] == [
        ("", "Sequential", 90),
        ("0", "Linear", 90),
        ("1", "ReLU", 0),
    ]


def test_a_scan_by_hand() -> None:
    """Two counters that differ in the scan and in norms alone: 9 N + 2 operations a step against twice 9 N + 1."""
    model = VMamba(depths=(1,), dims=8, d_state=2, num_classes=0)
    found = measure_complexity(model, (1, 3, 64, 32))
    steps = 16 * 8 * 4 * 8  # pixels, routes, channels
    norms = 32 * 16 * 4 + 16 * 8 * 8 * (1 + 3 + 1)  # elements: of the stem two norms, the block three, the head one
    assert 2 * found.macs - found.flops == steps * (2 * (9 * 2 + 1) - (9 * 2 + 2)) + 2 * 5 * norms


def test_routes_cost_the_same_whether_walked_in_place_or_one_by_one() -> None:
    """The cascade is four 1-D scans: with the same scans it has two LayerNorms without weights more, 4 an element."""
    cross, cascade = (VMamba(depths=(1,), dims=8, num_classes=0, routes=name) for name in ("cross2d", "cascade2d"))
    found = [measure_complexity(model, (1, 3, 64, 32)).macs for model in (cross, cascade)]
    assert found[1] - found[0] == 2 * 4 * 16 * 8 * 8


def _meta(name: str):
    with torch.device("meta"):
        return mask_rcnn(name)


def _parameters(name: str) -> int:
    return sum(parameter.numel() for parameter in _meta(name).parameters())


def _macs(name: str) -> dict[str, int]:
    return detector_macs(_meta(name))


@pytest.mark.parametrize("name", PUBLISHED_DETECTORS)
def test_detectors_have_the_published_size_and_cost(name) -> None:
    parameters, macs = PUBLISHED_DETECTORS[name]
    assert _parameters(name) / 1e6 == pytest.approx(parameters, abs=0.5)  # published in whole millions
    assert _parameters(name) / 1e6 == pytest.approx(parameters, rel=0.01)
    assert _macs(name)["total"] / 1e9 == pytest.approx(macs, rel=0.002)


def test_the_small_detectors_macs_are_the_sum_of_published_parts() -> None:
    """Published: 70 M parameters, 384 G. But every term except the backbone is that of the tiny detector, and the
    backbone is published with 8.7 G at 224 px: together 349 G."""
    name = "vmamba_small_s2l15"
    assert _parameters(name) / 1e6 == pytest.approx(70, rel=0.01)
    small, tiny = _macs(name), _macs("vmamba_tiny_s2l5")
    assert {part for part in small if small[part] != tiny[part]} == {"backbone", "total"}
    assert small["backbone"] == pytest.approx(8.7e9 * (1280 * 800) / 224**2, rel=0.01)
    assert small["total"] == pytest.approx(8.7e9 * (1280 * 800) / 224**2 + tiny["total"] - tiny["backbone"], rel=0.01)


def test_a_detector_by_hand() -> None:
    detector = mask_rcnn("resnet18", classes=3, channels=16, fc_channels=24).train()
    macs = detector_macs(detector, (64, 96), proposals=10, masks=2)
    pixels = [16 * 24, 8 * 12, 4 * 6, 2 * 3, 1 * 2]
    laterals = sum(n * c for n, c in zip(pixels[:4], (64, 128, 256, 512), strict=True)) * 16
    assert macs["pyramid"] == laterals + sum(pixels[:4]) * 16 * 16 * 9
    assert macs["proposals"] == sum(pixels) * (16 * 16 * 9 + 16 * 15)
    assert macs["boxes"] == 10 * (16 * 49 * 24 + 24 * 24 + 24 * (4 + 12))
    assert macs["masks"] == 2 * (4 * 196 * 16 * 16 * 9 + 196 * 16 * 16 * 4 + 784 * 16 * 3)
    assert macs["total"] == sum(macs.values()) - macs["total"]
    assert detector.training
    without = detector_macs(mask_rcnn("resnet18", 3, masks=False, channels=16, fc_channels=24), (64, 96))
    assert "masks" not in without
