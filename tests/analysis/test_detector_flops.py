"""Parameters and multiply-accumulates of the published detectors."""

from __future__ import annotations

import pytest
import torch

from vmamba.analysis import detector_macs
from vmamba.models.detection import mask_rcnn

# name: millions of parameters, 10^9 multiply-accumulates at 1280 x 800, as published
PUBLISHED = {
    "vmamba_tiny_s1l8": (50, 271),
    "vmamba_tiny_s2l5": (50, 270),
    "vmamba_base_s2l15": (108, 485),
    "vanilla_vmamba_tiny": (42, 286),
    "vanilla_vmamba_small": (64, 400),
    "vanilla_vmamba_base": (96, 540),
}


def _meta(name: str):
    with torch.device("meta"):
        return mask_rcnn(name)


def _parameters(name: str) -> int:
    return sum(parameter.numel() for parameter in _meta(name).parameters())


def _macs(name: str) -> dict[str, int]:
    return detector_macs(_meta(name).to_empty(device="cpu"))  # weights are not looked at


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_and_macs(name) -> None:
    parameters, macs = PUBLISHED[name]
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


def test_parts_are_those_of_the_formulas() -> None:
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
