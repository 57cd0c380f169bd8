"""Every ablation builds, runs, and has the parameters that its configuration says."""

from __future__ import annotations

import math

import pytest
import timm
import torch

from vmamba.layers import ACTIVATIONS, SSM_INITS, SSM_OUT_NORMS
from vmamba.models import ABLATIONS, VMambaConfig, create_ablation


def parameters_by_hand(config: VMambaConfig) -> int:
    """Stem v2, downsampling v3, no gate, depthwise convolutions without bias: what all ablations have in common."""
    C = config.dims[0]
    total = 27 * (C // 2) + C // 2 + 2 * (C // 2) + 9 * (C // 2) * C + C + 2 * C  # stem
    if config.pos_embed:
        total += C * (config.img_size[0] // 4) * (config.img_size[1] // 4)
    for i, (depth, C) in enumerate(zip(config.depths, config.dims, strict=True)):
        if i:
            total += 9 * config.dims[i - 1] * C + C + 2 * C
        E, N, R, hidden = int(config.ssm_ratio * C), config.d_state, math.ceil(C / 16), int(config.mlp_ratio * C)
        norm = {"layernorm": 2 * E, "dwconv3": 9 * E, "cnorm": 11 * E}.get(config.ssm_out_norm, 0)
        scan = 4 * ((R + 2 * N) * E + E * R + E + E * N + E)
        block = 2 * C + C * E + config.ssm_conv**2 * E + scan + norm + E * C  # its norm, SS2D
        block += 2 * C + C * hidden + hidden + hidden * C + C
        total += depth * block
    return total + 2 * C + 1000 * C + 1000


@pytest.mark.parametrize("name", ABLATIONS)
def test_it_has_the_parameters_of_its_configuration(name) -> None:
    model = create_ablation(name, device="meta")
    assert {field: getattr(model.config, field) for field in ABLATIONS[name].changes} == ABLATIONS[name].changes
    assert sum(p.numel() for p in model.parameters()) == parameters_by_hand(model.config)


@pytest.mark.parametrize("name", ABLATIONS)
def test_it_differs_from_its_base_in_what_it_changes_alone(name) -> None:
    ablation = ABLATIONS[name]
    base, config = timm.create_model(ablation.base, device="meta").config, create_ablation(name, device="meta").config
    differing = {field for field, value in config.to_dict().items() if value != base.to_dict()[field]}
    assert differing == set(ablation.changes)


@pytest.mark.parametrize("name", ABLATIONS)
def test_it_computes(name, one_thread) -> None:
    ablation = ABLATIONS[name]
    small = {"dims": 8, "num_classes": 3, "img_size": 32, "depths": (1, 1, 1, 1)}
    model = create_ablation(name, **{k: v for k, v in small.items() if k not in ablation.changes}).eval()
    assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()


def test_the_groups_are_those_of_the_paper_and_what_the_configuration_knows() -> None:
    def values(group, field):
        lines = (a for a in ABLATIONS.values() if a.group == group)
        return {getattr(create_ablation_config(line), field) for line in lines}

    def create_ablation_config(line):
        return timm.create_model(line.base, device="meta", **line.changes).config

    assert values("scan pattern", "routes") == {"cross2d", "unidi", "bidi", "cascade2d"}
    assert values("initialisation", "ssm_init") == set(SSM_INITS)
    assert values("state size", "d_state") == {1, 2, 4, 8, 16}
    assert values("output norm", "ssm_out_norm") == set(SSM_OUT_NORMS)
    assert values("activation", "ssm_act") < set(ACTIVATIONS)
    assert values("convolution", "ssm_conv") == {0, 3}


def test_published_accuracies() -> None:
    def top1(group):
        return [a.top1 for a in ABLATIONS.values() if a.group == group]

    assert top1("scan pattern") == [82.60, 82.26, 82.49, 82.42]
    assert top1("initialisation") == [82.60, 82.58, 82.67]
    assert top1("state size") == [82.49, 82.50, 82.51, 82.69, 82.31]


def test_an_unknown_name_is_told_with_close_ones() -> None:
    with pytest.raises(ValueError, match=r"no ablation 'unidir'; did you mean unidi"):
        create_ablation("unidir")
