"""Parameters and operations, against the published figures."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vmamba import VMamba, create_upernet
from vmamba.analysis import measure_complexity

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
