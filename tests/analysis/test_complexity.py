"""Parameters and operations, against the published figures."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vmamba import VMamba, create_upernet
from vmamba.analysis import detector_macs, measure_complexity
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
# The same paper's classifiers: GFLOPs at 224 x 224, and parameters
PUBLISHED_CLASSIFIERS = {
    "vmamba_tiny_s1l8": (4.906, 30_249_064),
    "vmamba_base_s2l15": (15.359, 88_557_800),
    "vanilla_vmamba_tiny": (5.627, 22_893_448),
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
    assert found.macs / 1e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize("name", PUBLISHED_CLASSIFIERS)
def test_classifiers_have_the_published_size_and_cost(name) -> None:
    giga, parameters = PUBLISHED_CLASSIFIERS[name]
    found = measure_complexity(timm.create_model(name, device="meta"), (1, 3, 224, 224))
    assert found.parameters == parameters
    assert found.macs / 1e9 == pytest.approx(giga, rel=0.01)


def test_a_linear_layer_by_hand() -> None:
    model = nn.Linear(3, 5)
    model.train()
    assert measure_complexity(model, (2, 1, 7, 3)) == (20, 2 * 14 * 15, 14 * 15)
    assert model.training
    assert model.weight.device.type == "cpu"


def test_a_scan_by_hand() -> None:
    """Two counters that differ in the scan alone: 9 N + 2 operations a step against twice 9 N + 1."""
    model = VMamba(depths=(1,), dims=8, d_state=2, num_classes=0)
    found = measure_complexity(model, (1, 3, 64, 32))
    steps = 16 * 8 * 4 * 8  # pixels, routes, channels
    assert 2 * found.macs - found.flops == steps * (2 * (9 * 2 + 1) - (9 * 2 + 2))


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
    assert _macs(name)["total"] / 1e9 == pytest.approx(macs, rel=0.01)


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
