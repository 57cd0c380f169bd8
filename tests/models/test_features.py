"""Backbones of other kinds that stand in for ours: what weight decay leaves alone, norms, sizes."""

import pytest
import timm
import torch

from vmamba.models.detection import mask_rcnn
from vmamba.models.features import TimmFeatures, create_features
from vmamba.models.upernet import create_upernet
from vmamba.tasks import make_optimizer

SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2)}


@pytest.mark.parametrize("extractor", ["list", "getter"])
def test_marks_against_weight_decay_survive_timms_renaming(extractor) -> None:
    options = {"feature_cls": "getter"} if extractor == "getter" else {}
    model = create_features("swin_tiny_patch4_window7_224", **SWIN, **options)
    tables = {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    assert len(tables) == 8
    assert model.no_weight_decay() == tables


@pytest.mark.parametrize("network", ["upernet", "mask_rcnn"])
@pytest.mark.parametrize(("name", "mark"), [("swin_tiny_patch4_window7_224", "bias_table"), ("vmamba_nano", "A_log")])
def test_the_optimiser_of_a_network_heeds_them(network, name, mark) -> None:
    options = SWIN if name.startswith("swin") else {}
    if network == "upernet":
        model = create_upernet(name, 3, channels=8, auxiliary_channels=8, **options)
    else:
        model = mask_rcnn(name, 3, channels=8, fc_channels=8, backbone_kwargs=options)
    decayed = {
        id(p)
        for group in make_optimizer(model, lr=1e-3, weight_decay=0.05).param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    marked = [p for n, p in model.named_parameters() if mark in n and p.ndim > 1]
    assert marked
    assert not decayed & set(map(id, marked))


def test_a_stand_in_for_a_detector_norms_what_it_gives_and_nothing_else() -> None:
    detector = mask_rcnn("resnet18", 2, channels=8, fc_channels=8)
    body = detector.backbone.body
    assert isinstance(body, TimmFeatures)
    assert body.feature_info.reduction() == [4, 8, 16, 32]
    assert len(body.norms) == 4
    features = body(torch.randn(2, 3, 64, 64))
    for feature, channels in zip(features, body.feature_info.channels(), strict=True):
        assert feature.shape[1] == channels
        torch.testing.assert_close(feature.mean(1), torch.zeros(2, *feature.shape[2:]), atol=1e-5, rtol=0)
    plain = mask_rcnn("resnet18", 2, channels=8, fc_channels=8, out_norm=False).backbone.body
    assert not list(plain.norms.parameters())


def test_swin_takes_any_size_and_shifts_its_windows_everywhere() -> None:
    model = create_features("swin_tiny_patch4_window7_224", **SWIN)
    assert [tuple(f.shape[2:]) for f in model(torch.randn(1, 3, 72, 100))] == [(18, 25), (9, 13), (5, 7), (3, 4)]
    shifts = [m.shift_size for m in model.modules() if hasattr(m, "shift_size")]
    assert [tuple(s) for s in shifts] == [(0, 0), (3, 3)] * 4


def test_initial_weights_do_not_depend_on_looking_for_marks() -> None:
    torch.manual_seed(0)
    create_features("convnext_atto")
    after = torch.rand(1)
    torch.manual_seed(0)
    TimmFeatures(timm.create_model("convnext_atto", features_only=True))
    assert torch.equal(after, torch.rand(1))
