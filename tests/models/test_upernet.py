"""UPerNet: the official code's numbers, names both ways, other backbones, sizes and modes."""

from __future__ import annotations

import copy
import sys
import types
from importlib.metadata import version

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import vmamba
from vmamba import (
    FeatureGetter,
    UPerNet,
    VMamba,
    create_upernet,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    upernet_from_checkpoint,
)
from vmamba.models import upernet as upernet_module
from vmamba.models.upernet import TimmFeatures
from vmamba.models.upernet_keymap import state_to_official, state_to_ours

TOLERANCE = 1e-4  # relative, in fp32; measured on the CPU: at most 9e-7
NANO = {"dims": 8, "depths": (1, 1, 1, 1)}
SMALL = {"channels": 12, "auxiliary_channels": 8}


def _small(num_classes: int = 5, **options) -> UPerNet:
    return create_upernet("vmamba_nano", num_classes, **SMALL, **NANO | options)


def _golden_model() -> UPerNet:
    backbone = FeatureGetter(VMamba(depths=(1, 1, 1, 1), dims=12, num_classes=0), out_norm=True)
    return UPerNet(backbone, 7, channels=24, auxiliary_channels=16)


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.inference_mode()
def _errors(model: UPerNet, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    features = model.backbone(tensors["input"])
    full = model(tensors["input"])
    found = {
        "decode_logits": model.decode_head(features),
        "aux_logits": model.auxiliary_head(features[2]),
        "full_logits": full,
        "full_logits_every_8th": full[..., ::8, ::8],
        **{f"feature{i}": feature for i, feature in enumerate(features)},
    }
    return {name: _relative(found[name], tensor) for name, tensor in tensors.items() if name != "input"}


@pytest.mark.parametrize("folder", ["ours", pytest.param("shared", marks=pytest.mark.golden)])
def test_the_official_code_gives_the_same(folder, golden, request) -> None:
    source = golden if folder == "ours" else request.getfixturevalue("shared") / "golden" / "downstream"
    model = _golden_model().eval()
    load_checkpoint(model, source / "upernet.state.safetensors")
    errors = _errors(model, load_file(source / "upernet_128x160.safetensors"))
    assert len(errors) == (5 if folder == "ours" else 7)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def test_official_names_go_there_and_back(golden) -> None:
    official = load_file(golden / "upernet.state.safetensors")
    ours = state_to_ours(official)
    assert not set(official) & set(ours)
    assert _same(state_to_official(ours), official)


def test_official_files_convert_exactly(golden, tmp_path) -> None:
    official = load_file(golden / "upernet.state.safetensors")
    vmamba.convert(golden / "upernet.state.safetensors", tmp_path / "ours.safetensors")
    vmamba.convert(tmp_path / "ours.safetensors", tmp_path / "back.pth", official=True)
    assert _same(torch.load(tmp_path / "back.pth", weights_only=True)["model"], official)


@pytest.mark.parametrize(
    "name", ["decode_head.lateral_convs.0.conv.scale", "auxiliary_head.convs.1.conv.weight", "loss.weight", "mean"]
)
def test_unknown_official_names_are_errors(golden, name) -> None:
    official = load_file(golden / "upernet.state.safetensors")
    with pytest.raises(ValueError, match=f"no counterpart for 1 official name.*{name}"):
        state_to_ours(official | {name: torch.zeros(1)})


def test_a_file_of_mmengine_is_read_without_mmengine(tmp_path, monkeypatch) -> None:
    """Its training files hold the optimiser, and logged numbers as objects around NumPy arrays."""
    model = _small()
    module = types.ModuleType("mmengine.logging.history_buffer")
    HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__, "mean": lambda self: 0.375})
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    loss = HistoryBuffer()
    loss._log_history = np.array([0.5, 0.25])
    loss._statistics_methods = {"mean": loss.mean}
    content = {
        "meta": {"iter": 160000, "dataset_meta": {"classes": ("wall", "building"), "palette": [[120, 120, 120]]}},
        "message_hub": {"log_scalars": {"train/loss": loss}, "runtime_info": {"lr": np.float64(6e-5)}},
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "state_dict": state_to_official(_in_file(model)),
    }
    torch.save(content, tmp_path / "iter_160000.pth")
    monkeypatch.undo()
    assert "mmengine" not in sys.modules
    assert _same(read_checkpoint(tmp_path / "iter_160000.pth"), _in_file(model))
    other = _small()
    load_checkpoint(other, tmp_path / "iter_160000.pth")
    assert _same(other.state_dict(), model.state_dict())


def _in_file(model: UPerNet) -> dict[str, torch.Tensor]:
    return {name.replace("backbone.model.", "backbone."): tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("file", ["c.safetensors", "c.pth"])
@pytest.mark.parametrize("official", [False, True])
def test_saved_and_loaded(tmp_path, file, official) -> None:
    one, two = _small(), _small()
    save_checkpoint(one, tmp_path / file, official=official)
    load_checkpoint(two, tmp_path / file)
    assert _same(two.state_dict(), one.state_dict())


def test_another_class_count_only_on_request(tmp_path) -> None:
    one, two = _small(5), _small(3)
    save_checkpoint(one, tmp_path / "c.pth", official=True)
    with pytest.raises(ValueError, match=r"(?s)decode_head\.classifier\.weight.*new_head=True"):
        load_checkpoint(two, tmp_path / "c.pth")
    own = two.decode_head.classifier.weight.clone()
    load_checkpoint(two, tmp_path / "c.pth", new_head=True)
    assert torch.equal(two.decode_head.classifier.weight, own)
    assert torch.equal(two.decode_head.fusion.conv.weight, one.decode_head.fusion.conv.weight)


def test_a_classifiers_weights_start_a_backbone(tmp_path) -> None:
    classifier = timm.create_model("vmamba_nano", **NANO)
    save_checkpoint(classifier, tmp_path / "c.pth", official=True)
    model = _small()
    load_checkpoint(model.backbone, tmp_path / "c.pth", new_head=True, new_out_norms=True)
    assert torch.equal(model.backbone.model.stem.conv1.weight, classifier.stem.conv1.weight)


def test_released_weights_start_a_backbone(tmp_path) -> None:
    classifier = timm.create_model("vmamba_nano")
    save_checkpoint(classifier, tmp_path / "release.pth", official=True)
    overlay = {"file": str(tmp_path / "release.pth"), "custom_load": True}
    model = create_upernet("vmamba_nano", 3, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    own = classifier.state_dict()
    found = model.backbone.model.state_dict()
    assert found.keys() == {name for name in own if not name.startswith("head.")}
    assert all(torch.equal(tensor, own[name]) for name, tensor in found.items())
    assert set(model.backbone.out_norms) == {"0", "1", "2", "3"}


def test_other_image_channels_and_position_embeddings_are_adapted(tmp_path) -> None:
    one = _small(pos_embed=True, img_size=32)
    save_checkpoint(one, tmp_path / "c.safetensors")
    two = _small(pos_embed=True, img_size=64, in_chans=1)
    with pytest.raises(ValueError, match=r"adapt_input=True"):
        load_checkpoint(two, tmp_path / "c.safetensors")
    load_checkpoint(two, tmp_path / "c.safetensors", adapt_input=True)
    summed = one.backbone.model.stem.conv1.weight.sum(1, keepdim=True)
    torch.testing.assert_close(two.backbone.model.stem.conv1.weight, summed)
    assert two.backbone.model.pos_embed.shape[2:] == (16, 16)


TIMM = tuple(int(part) for part in version("timm").split(".")[:3] if part.isdigit())
BACKBONES = {
    "convnext_atto": {},
    "resnet18": {},
    "swin_tiny_patch4_window7_224": {},
    "vit_tiny_patch16_224": {"dynamic_img_size": True},
}


@pytest.mark.parametrize("name", BACKBONES)
def test_any_timm_backbone_stands_in(name, tmp_path) -> None:
    model = create_upernet(name, 4, **SMALL, **BACKBONES[name])
    assert isinstance(model.backbone, TimmFeatures)
    # timm up to 1.0.29 itself changes maps in place that a checkpointed ResNet still needs
    model.set_grad_checkpointing(name != "resnet18" or TIMM > (1, 0, 29))
    scores, auxiliary = model.train()(torch.randn(2, 3, 64, 96))
    assert scores.shape == auxiliary.shape == (2, 4, 64, 96)
    (scores.sum() + auxiliary.sum()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert all(n.startswith("backbone.model.") for n in silent), silent
    save_checkpoint(model, tmp_path / "c.safetensors")
    load_checkpoint(model, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="no counterpart"):
        save_checkpoint(model, tmp_path / "c.pth", official=True)


def test_features_are_normed_alike_unless_told_otherwise() -> None:
    image = torch.randn(1, 3, 64, 64)
    for name in ("vmamba_nano", "convnext_atto", "swin_tiny_patch4_window7_224"):
        options = BACKBONES.get(name, NANO)
        normed = create_upernet(name, 4, **SMALL, **options).backbone.eval()
        for feature, channels in zip(normed(image), normed.feature_info.channels(), strict=True):
            assert feature.shape[1] == channels
            torch.testing.assert_close(feature.mean(1), torch.zeros(1, *feature.shape[2:]), atol=1e-5, rtol=0)
        plain = create_upernet(name, 4, out_norm=False, **SMALL, **options).backbone.eval()
        assert max(feature.mean(1).abs().max() for feature in plain(image)) > 1e-3
        assert len(plain.state_dict()) < len(normed.state_dict())


@pytest.mark.parametrize("size", [(32, 32), (33, 97), (200, 61)])
def test_any_image_size(size) -> None:
    model = _small().eval()
    assert model(torch.randn(1, 3, *size)).shape == (1, 5, *size)


def test_training_reaches_every_parameter() -> None:
    model = _small().train()
    scores, auxiliary = model(torch.randn(2, 3, 64, 64))
    (scores.square().mean() + 0.4 * auxiliary.square().mean()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    skipped = model.no_weight_decay()
    assert skipped <= dict(model.named_parameters()).keys()
    assert any(name.endswith("A_log") for name in skipped)


def test_checkpointed_gradients_are_the_same() -> None:
    torch.manual_seed(0)
    model = _small(dropout=0.0).train()
    image, gradients = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image)[0].square().mean().backward()
        gradients.append(model.backbone.model.stem.conv1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_one_compiled_graph(one_thread) -> None:
    model = _small().eval()
    image = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image))


def test_batch_norms_can_be_synchronised() -> None:
    """What multi-GPU training does with torch's own converter: another class, the same names and numbers."""
    model = _small(dropout=0.0)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synchronised.modules()) == 13
    assert not any(isinstance(m, nn.BatchNorm2d) for m in synchronised.modules())
    image = torch.randn(2, 3, 64, 64)
    for a, b in zip(synchronised.train()(image), model.train()(image), strict=True):
        torch.testing.assert_close(a, b)
    assert _same(synchronised.state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")  # of a depthwise weight; speed only
def test_distributed_training_on_cpus(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(_small().train())
        for _ in range(2):  # the second time it would complain about parameters left out the first time
            scores, auxiliary = parallel(torch.randn(2, 3, 64, 64))
            (scores.mean() + auxiliary.mean()).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_training_in_mixed_precision() -> None:
    model = _small().train()
    with torch.autocast("cpu", torch.bfloat16):
        scores, auxiliary = model(torch.randn(2, 3, 64, 64))
    assert scores.shape == auxiliary.shape == (2, 5, 64, 64)
    (scores.float().square().mean() + auxiliary.float().square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="did you mean vmamba_nano"):
        create_upernet("vmamba_nanno", 3)
    with pytest.raises(ValueError, match="num_classes must be a positive integer, got 0"):
        _small(0)
    with pytest.raises(ValueError, match="vmamba_nano gives no features with the options.*depts"):
        create_upernet("vmamba_nano", 3, depts=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="this backbone gives 2"):
        UPerNet(timm.create_model("vmamba_nano", features_only=True, out_indices=(2, 3)), 3)


def test_published_settings_are_the_defaults() -> None:
    with torch.device("meta"):
        model = create_upernet("vmamba_tiny_s1l8")
    assert upernet_module.POOL_GRIDS == (1, 2, 3, 6)
    assert model.decode_head.fusion.conv.weight.shape == (512, 2048, 3, 3)
    assert model.auxiliary_head.block.conv.weight.shape == (256, 384, 3, 3)
    assert model.decode_head.classifier.weight.shape[0] == 150
    assert model.decode_head.dropout.p == 0.1


@pytest.mark.parametrize("official", [False, True])
def test_a_file_says_which_network_it_holds(tmp_path, official) -> None:
    model = create_upernet("vmamba_micro", 7, **SMALL).eval()
    save_checkpoint(model, tmp_path / "c.pth", official=official)
    found = upernet_from_checkpoint(tmp_path / "c.pth")
    assert not found.training
    assert _same(found.state_dict(), model.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found(image), model(image))


def test_a_file_of_another_backbone_needs_its_name(tmp_path) -> None:
    model = create_upernet("convnext_atto", 7, **SMALL)
    save_checkpoint(model, tmp_path / "c.safetensors")
    assert _same(upernet_from_checkpoint(tmp_path / "c.safetensors", "convnext_atto").state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"the backbone in .*c\.safetensors is none of .*vmamba_nano.*: name the one"):
        upernet_from_checkpoint(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"(?s)c\.safetensors does not fit the model.*missing.*unknown"):
        upernet_from_checkpoint(tmp_path / "c.safetensors", "vmamba_nano")
    save_checkpoint(timm.create_model("vmamba_nano"), tmp_path / "classifier.pth")
    with pytest.raises(ValueError, match=r"classifier\.pth holds no UPerNet"):
        upernet_from_checkpoint(tmp_path / "classifier.pth")
