"""The network as timm and its users expect it, for every registered model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import vmamba
from vmamba import FeatureGetter, VMamba
from vmamba.layers import SS2D

NAMES = vmamba.list_models()
OWN = ["vmamba_nano", "vmamba_micro"]  # small enough to run everywhere as they are
SMALL = {"depths": (1, 1, 2, 1), "dims": 16}  # the released architectures, but small


def _create(name: str, **options):
    return timm.create_model(name, **({} if name in OWN else SMALL), **options).eval()


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def nano() -> VMamba:
    torch.manual_seed(0)
    return timm.create_model("vmamba_nano").eval()


def test_registry_and_default_cfgs_agree() -> None:
    assert set(NAMES) == set(timm.list_models(module="variants"))
    for name in NAMES:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.architecture == name
        model = timm.create_model(name, device="meta")
        assert model.num_classes == cfg.num_classes
        assert cfg.input_size[0] == model.in_chans
        assert isinstance(model.get_submodule(cfg.first_conv), torch.nn.Conv2d)
        assert isinstance(model.get_submodule(cfg.classifier), torch.nn.Linear)
        assert (name in OWN) != cfg.has_weights
        if cfg.has_weights:
            assert cfg.url.startswith("https://github.com/MzeroMiko/VMamba/releases/download/%23v")
            assert any("top1" in note for note in cfg.notes)


def test_small_models_are_small() -> None:
    counts = {name: sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) for name in OWN}
    assert counts == {"vmamba_nano": 1_092_042, "vmamba_micro": 5_848_522}


@pytest.mark.parametrize("patch_size", [1, 2])
def test_small_patches_leave_small_images_a_map_to_scan(patch_size) -> None:
    features = timm.create_model("vmamba_nano", patch_size=patch_size, features_only=True)
    assert features.feature_info.reduction() == [patch_size * 2**i for i in range(4)]
    maps = features(torch.randn(1, 3, 32, 32))
    assert [tuple(m.shape[2:]) for m in maps] == [(32 // r, 32 // r) for r in features.feature_info.reduction()]
    model = timm.create_model("vmamba_nano", patch_size=patch_size)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (32, 100)])
def test_any_size_from_32_pixels(name, size) -> None:
    model = _create(name)
    x = torch.randn(2, 3, *size)
    last, features = model.forward_intermediates(x)
    assert model(x).shape == (2, model.num_classes)
    assert torch.equal(model.forward_features(x), last)
    assert torch.equal(model.forward_head(last), model(x))
    assert model.forward_head(last, pre_logits=True).shape == (2, model.head_hidden_size)
    for info, feature in zip(model.feature_info, features, strict=True):
        assert feature.shape[1] == info["num_chs"]
        for pixels, grid in zip(size, feature.shape[2:], strict=True):
            assert pixels // info["reduction"] <= grid <= -(-pixels // info["reduction"])


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (0,), (-2,), 2])
@pytest.mark.parametrize("out_norm", [False, True])
def test_features_only(name, out_indices, out_norm) -> None:
    torch.manual_seed(0)
    backbone = _create(name, features_only=True, out_indices=out_indices, out_norm=out_norm)
    assert isinstance(backbone, FeatureGetter)
    features = backbone(x := torch.randn(1, 3, 64, 64))
    assert [f.shape[1] for f in features] == backbone.feature_info.channels()
    assert [64 // f.shape[2] for f in features] == backbone.feature_info.reduction()
    whole = _create(name)
    whole.load_state_dict(backbone.model.state_dict(), strict=False)
    indices = [i % 4 for i in ((out_indices,) if isinstance(out_indices, int) else out_indices)]
    indices = [2, 3] if out_indices == 2 else indices
    expected = whole.forward_intermediates(x, indices, intermediates_only=True)
    for feature, plain in zip(features, expected, strict=True):
        if out_norm:
            plain = torch.nn.functional.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2]).permute(0, 3, 1, 2)
        assert torch.equal(feature, plain)
    assert len(backbone.out_norms) == (len(features) if out_norm else 0)


def test_backbone_keeps_what_training_needs() -> None:
    backbone = timm.create_model("vmamba_nano", features_only=True, out_norm=True)
    assert backbone.no_weight_decay() == {n for n, _ in backbone.named_parameters() if _is_undecayed(n)}
    groups = timm.models.group_parameters(backbone, backbone.group_matcher(), reverse=True)
    assert groups["model.stem.conv1.weight"] == 0
    assert groups["out_norms.0.weight"] == groups["model.stages.3.blocks.0.norm.weight"] == max(groups.values())
    assert groups["model.stages.0.blocks.0.norm.weight"] == 1
    backbone.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in backbone.model.stages)


def test_backbone_hands_out_other_stages_on_request(nano) -> None:
    """transformers asks its timm backbone for all stages by writing return_layers."""
    backbone = timm.create_model("vmamba_nano", features_only=True, out_indices=(1, 3))
    backbone.return_layers = {info["module"]: str(i) for i, info in enumerate(backbone.feature_info.info)}
    assert [f.shape[1] for f in backbone(torch.randn(1, 3, 32, 32))] == [32, 64, 128, 256]


def test_intermediates(nano) -> None:
    x = torch.randn(1, 3, 40, 32)
    every = nano.forward_intermediates(x, intermediates_only=True)
    last_two = nano.forward_intermediates(x, 2, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(last_two, every[2:], strict=True))
    early, taken = nano.forward_intermediates(x, [0, 1], stop_early=True)
    assert torch.equal(early, every[1])
    assert len(taken) == 2
    normed = nano.forward_intermediates(x, [-1], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(normed.mean((2, 3)), nano.forward_head(every[3], pre_logits=True))
    for bad in (0, 5, [4], [-5], []):
        with pytest.raises(ValueError, match="indices"):
            nano.forward_intermediates(x, bad)
    with pytest.raises(ValueError, match="NCHW"):
        nano.forward_intermediates(x, output_fmt="NHWC")


def test_pruning_leaves_the_stages_asked_for() -> None:
    model = timm.create_model("vmamba_nano")
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2
    assert model.num_features == model.head_hidden_size == 64
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 64, 4, 4)


@pytest.mark.parametrize("channels", [1, 4])
def test_in_chans(name, channels) -> None:
    assert _create(name, in_chans=channels)(torch.randn(1, channels, 32, 32)).shape[0] == 1


def test_wrong_images_are_named(nano) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 1, 32, 32\)"):
        nano(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="expected images"):
        nano(torch.randn(3, 32, 32))


def test_classifier_can_go_and_come_back(name) -> None:
    x = torch.randn(1, 3, 32, 32)
    model = _create(name, num_classes=0)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(7)
    assert model(x).shape == (1, 7)
    assert model.get_classifier() is model.head.fc
    model.reset_classifier(0, "")
    assert model(x).shape == (1, model.num_features, 1, 1)
    assert _create(name, num_classes=5, global_pool="")(x).shape == (1, 5, 1, 1)


def test_fresh_classifier_follows_the_network() -> None:
    model = timm.create_model("vmamba_nano", dtype=torch.bfloat16)
    model.reset_classifier(3)
    assert model.head.fc.weight.dtype == torch.bfloat16


def _is_undecayed(name: str) -> bool:
    return name.endswith((".A_log", ".D", ".dt_bias", "pos_embed"))


def test_no_weight_decay_names_the_state_space_parameters(name) -> None:
    model = _create(name, device="meta", pos_embed=True)
    expected = {n for n, _ in model.named_parameters() if _is_undecayed(n)}
    assert model.no_weight_decay() == expected
    assert len(expected) == 3 * len([m for m in model.modules() if isinstance(m, SS2D)]) + 1
    groups = create_optimizer_v2(_create(name, pos_embed=True), opt="adamw", weight_decay=0.1).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups_go_from_the_stem_to_the_head(name, coarse) -> None:
    model = _create(name, device="meta", pos_embed=True)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    assert groups["pos_embed"] == 0
    assert groups["head.fc.weight"] == max(groups.values())
    order = [groups[f"stages.{i}.blocks.0.norm.weight"] for i in range(4)]
    assert order == sorted(set(order))
    assert order[0] > 0
    assert order[3] < groups["head.fc.weight"]
    assert groups["stages.1.downsample.norm.weight"] <= order[1]


def test_meta_device_and_ambient_device(name) -> None:
    assert all(p.is_meta for p in timm.create_model(name, device="meta").parameters())
    with torch.device("meta"):
        assert all(p.is_meta for p in timm.create_model(name).parameters())


def test_bfloat16(name) -> None:
    torch.manual_seed(0)
    model = _create(name)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    half = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
    # bfloat16 keeps 8 bits: relative 4e-3 a step, through some tens of layers
    assert (half.float() - expected).norm() / expected.norm() < 0.1


def test_autocast(nano) -> None:
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nano(x)
        y.float().sum().backward()
    assert (y.float() - nano(x)).norm() / nano(x).norm() < 0.1
    assert all(p.grad.isfinite().all() for p in nano.parameters())
    nano.zero_grad()


def test_gradient_checkpointing_changes_nothing(name) -> None:
    torch.manual_seed(0)
    model = _create(name)
    x = torch.randn(1, 3, 32, 32)
    model(x).square().sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    recomputed = []
    hook = model.stages[0].blocks[0].register_forward_pre_hook(lambda *_: recomputed.append(1))
    model(x).square().sum().backward()
    hook.remove()
    assert len(recomputed) == 2
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[n])


def test_drop_path_grows_linearly_over_blocks() -> None:
    model = VMamba(depths=(1, 2, 3, 1), dims=8, drop_path_rate=0.3, device="meta")
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert isinstance(blocks[0].drop_path, torch.nn.Identity)
    assert [b.drop_path.drop_prob for b in blocks[1:]] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3])


@pytest.mark.parametrize(("ssm_init", "A"), [("mamba", -1.0), ("zero", -1.0)])
def test_initialisation_of_a_network(ssm_init, A) -> None:
    torch.manual_seed(0)
    model = VMamba(depths=(1, 1, 1, 1), dims=32, ssm_init=ssm_init, pos_embed=True, img_size=64)
    assert 0.018 < model.stages[3].blocks[0].mlp.fc1.weight.std() < 0.022
    assert 0.018 < model.stages[3].blocks[0].ssm.in_proj.weight.std() < 0.022
    assert not model.stages[3].blocks[0].mlp.fc1.bias.any()
    assert 0.015 < model.pos_embed.std() < 0.025
    # convolutions as torch draws them: uniform up to the root of the fan-in
    weight = model.stages[1].downsample.conv.weight
    assert 0.95 < weight.abs().max() * weight[0].numel() ** 0.5 <= 1
    assert torch.equal(-model.stages[0].blocks[0].ssm.A_log.exp(), torch.full((4 * 32, 1), A))


def test_position_embedding_follows_the_grid() -> None:
    torch.manual_seed(0)
    model = VMamba(depths=(1, 1, 1, 1), dims=8, pos_embed=True, img_size=(32, 64), num_classes=3).eval()
    assert model.pos_embed.shape == (1, 8, 8, 16)
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 3)
    assert model(torch.randn(1, 3, 45, 33)).shape == (1, 3)
    x = torch.randn(1, 3, 32, 64)
    before = model(x)
    with torch.no_grad():
        model.pos_embed += torch.randn_like(model.pos_embed)
    assert not torch.allclose(model(x), before)


def test_hugging_face_round_trip(nano, tmp_path) -> None:
    timm.models.save_for_hf(nano, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), nano(x))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "vmamba_nano"


def test_import_is_quiet() -> None:
    """Beyond torch and timm: no optional package, no Triton, no device query."""
    code = (
        "import sys, torch, timm; torch.cuda.init = torch.cuda.device_count = lambda *a: sys.exit('device query')\n"
        "before = set(sys.modules)\n"
        "import vmamba\n"
        "heavy = {'triton', 'lightning', 'matplotlib', 'sklearn', 'torchmetrics', 'torchvision', 'transformers'}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} & heavy\n"
        "sys.exit(f'imported {new}' if new else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
