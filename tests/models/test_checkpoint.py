"""Checkpoints: names both ways, files of every kind, and what a bad file gets told."""

from __future__ import annotations

import collections
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import vmamba
from vmamba import VMamba, convert, load_checkpoint, read_checkpoint, save_checkpoint
from vmamba.models import checkpoint as checkpoint_module
from vmamba.models.keymap import state_to_official, state_to_ours

SMALL = {"depths": (1, 1, 2, 1), "dims": 8, "num_classes": 5}
STRUCTURES = {
    "second generation": {},
    "first generation": {"stem": "v1", "downsample": "v1", "ssm_gate": True, "ssm_conv_bias": True, "mlp_ratio": 0.0},
    "position embedding": {"pos_embed": True, "img_size": 32, "ssm_conv": 0},
    "dwconv3": {"ssm_out_norm": "dwconv3", "downsample": "v2"},
    "cnorm": {"ssm_out_norm": "cnorm"},
    "softmax": {"ssm_out_norm": "softmax"},
}


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def model() -> VMamba:
    return VMamba(**SMALL)


@pytest.fixture
def official(model, tmp_path) -> Path:
    """A file as the official training script writes it."""
    path = tmp_path / "official.pth"
    torch.save({"model": state_to_official(model.state_dict()), "epoch": 292, "max_accuracy": 82.2}, path)
    return path


@pytest.mark.parametrize("structure", STRUCTURES)
def test_names_go_there_and_back(structure) -> None:
    state = VMamba(**SMALL, **STRUCTURES[structure]).state_dict()
    official = state_to_official(state)
    assert not set(official) & (set(state) - {"pos_embed"})
    assert _same(state_to_ours(official), state)


def test_older_official_names_and_shapes_are_understood() -> None:
    state = VMamba(**SMALL, **STRUCTURES["first generation"]).state_dict()
    official = state_to_official(state)
    aliased = {}
    for name, tensor in official.items():
        name = name.replace("patch_embed.0.", "patch_embed.proj.").replace("patch_embed.2.", "patch_embed.norm.")
        name = name.replace("classifier.norm.", "norm.").replace("classifier.head.", "head.")
        if ".blocks." in name:
            name = name.replace(".norm.", ".ln_1.").replace(".op.", ".self_attention.")
            name = name.replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight")
        if name.endswith(("x_proj.weight", "dt_projs.weight")):
            tensor = tensor.flatten(0, 1)[..., None]
        if name.endswith(("in_proj.weight", "reduction.weight")):
            tensor = tensor[..., None, None]
        name = name.replace("downsample.norm.", "downsample.1.").replace("downsample.reduction.", "downsample.2.")
        aliased[name] = tensor
    assert len(set(aliased) & set(official)) < len(official) / 2
    assert _same(state_to_ours(aliased), state)


def test_unknown_and_doubled_names_are_errors() -> None:
    official = state_to_official(VMamba(**SMALL).state_dict())
    with pytest.raises(ValueError, match=r"no counterpart for 1 official .*layers\.0\.blocks\.0\.op\.spectral"):
        state_to_ours(official | {"layers.0.blocks.0.op.spectral": torch.zeros(1)})
    with pytest.raises(ValueError, match="two tensors for one parameter"):
        state_to_ours(official | {"head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no counterpart for 1 our"):
        state_to_official(VMamba(**SMALL).state_dict() | {"head.fc2.weight": torch.zeros(1)})


def test_official_file_loads(model, official) -> None:
    other = VMamba(**SMALL)
    load_checkpoint(other, official)
    assert _same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("nest", [None, "model", "state_dict", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_nesting_and_the_parallel_wrapper(model, tmp_path, nest, prefix) -> None:
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({nest: state, "epoch": 1} if nest else state, tmp_path / "c.pt")
    key = nest if nest == "model_ema" else None
    assert _same(read_checkpoint(tmp_path / "c.pt", key=key), model.state_dict())
    with pytest.raises(ValueError, match="no state dict under 'teacher'"):
        read_checkpoint(tmp_path / "c.pt", key="teacher")


def test_weights_under_model_are_preferred_to_their_average(model, tmp_path) -> None:
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save({"model_ema": average, "model": model.state_dict()}, tmp_path / "c.pth")
    assert _same(read_checkpoint(tmp_path / "c.pth"), model.state_dict())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_conversion_is_exact_there_and_back(structure, tmp_path) -> None:
    state = state_to_official(VMamba(**SMALL, **STRUCTURES[structure]).state_dict())
    torch.save({"model": state}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert _same(load_file(tmp_path / "b.safetensors"), state_to_ours(state))
    convert(tmp_path / "b.safetensors", tmp_path / "c.pth", official=True)
    again = torch.load(tmp_path / "c.pth", weights_only=True)
    assert list(again) == ["model"]
    assert _same(again["model"], state)
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "b.safetensors", "c.pth"]


def test_backbones_keep_their_output_norms(tmp_path) -> None:
    def backbone(**options):
        return timm.create_model("vmamba_nano", features_only=True, out_norm=True, **options)

    one, two = backbone(), backbone()
    with torch.no_grad():
        one.out_norms["2"].weight.fill_(3)
    save_checkpoint(one, tmp_path / "b.pth", official=True)
    names = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    assert "outnorm2.weight" in names
    assert not any(name.startswith(("classifier", "model.")) for name in names)
    load_checkpoint(two, tmp_path / "b.pth")
    assert _same(two.state_dict(), one.state_dict())

    classifier = timm.create_model("vmamba_nano")
    save_checkpoint(classifier, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"(?s)missing.*out_norms.*unknown.*head.*new_head=True.*new_out_norms=True"):
        load_checkpoint(two, tmp_path / "c.safetensors")
    assert _same(two.state_dict(), one.state_dict())
    load_checkpoint(two, tmp_path / "c.safetensors", new_head=True, new_out_norms=True)
    assert torch.equal(two.model.stem.conv1.weight, classifier.stem.conv1.weight)
    assert torch.equal(two.out_norms["2"].weight, one.out_norms["2"].weight)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_another_class_count_only_on_request(official, model, num_classes) -> None:
    other = VMamba(**SMALL | {"num_classes": num_classes})
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"(?s)head\.fc\.weight.*new_head=True"):
        load_checkpoint(other, official)
    assert _same(other.state_dict(), before)
    load_checkpoint(other, official, new_head=True)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("head.fc") else model.state_dict()[name])


@pytest.mark.parametrize("channels", [1, 4])
def test_other_image_channels_only_on_request(official, model, channels) -> None:
    other = VMamba(**SMALL, in_chans=channels)
    with pytest.raises(ValueError, match=r"(?s)stem\.conv1\.weight \(4, 3, 3, 3\).*adapt_input=True"):
        load_checkpoint(other, official)
    load_checkpoint(other, official, adapt_input=True)
    if channels == 1:
        torch.testing.assert_close(other.stem.conv1.weight, model.stem.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(other.stem.conv2.weight, model.stem.conv2.weight)
    save_checkpoint(VMamba(**SMALL, in_chans=6), official)
    with pytest.raises(ValueError, match="only 3 can be adapted"):
        load_checkpoint(other, official, adapt_input=True)


def test_position_embedding_is_resized_bicubic(tmp_path) -> None:
    one = VMamba(**SMALL, pos_embed=True, img_size=64)
    save_checkpoint(one, tmp_path / "c.safetensors")
    two = VMamba(**SMALL, pos_embed=True, img_size=(96, 32))
    load_checkpoint(two, tmp_path / "c.safetensors")
    expected = torch.nn.functional.interpolate(one.pos_embed, (24, 8), mode="bicubic", align_corners=False)
    assert torch.equal(two.pos_embed, expected)


def test_another_architecture_is_told_what_differs(official) -> None:
    other = VMamba(**SMALL | {"dims": 16}, ssm_conv=0)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"(?s)official\.pth does not fit.*unknown to the model.*ssm\.conv.*other shapes"
    ):
        load_checkpoint(other, official)
    assert _same(other.state_dict(), before)


def test_official_settings_are_read_without_their_package(model, tmp_path, monkeypatch) -> None:
    """Official files pickle a yacs CfgNode: a dict with attributes, from a package that need not be here."""
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", package)
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    settings = CfgNode(DATA=CfgNode(IMG_SIZE=224), BETAS=(0.9, 0.999), BASE=[""])
    settings.__dict__.update(__immutable__=True, __deprecated_keys__=set(), __renamed_keys__={})
    torch.save({"model": state_to_official(model.state_dict()), "config": settings}, tmp_path / "c.pth")
    monkeypatch.undo()
    assert "yacs" not in sys.modules
    assert _same(read_checkpoint(tmp_path / "c.pth"), model.state_dict())


class _Trap:
    def __reduce__(self):
        return (os.system, ("echo trapped > trapped",))


class _Foreign:
    pass


@pytest.mark.parametrize("foreign", [_Trap, _Foreign])
def test_pickles_with_code_are_refused_and_not_run(model, tmp_path, monkeypatch, foreign) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": model.state_dict(), "extra": foreign()}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"(?s)c\.pth pickles .*could run code.*safe_globals.*weights_only=False"):
        read_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "trapped").exists()


def test_a_class_that_the_user_trusts_may_pass(model, tmp_path) -> None:
    torch.save({"model": model.state_dict(), "extra": _Foreign()}, tmp_path / "c.pth")
    with torch.serialization.safe_globals([_Foreign]):
        assert _same(read_checkpoint(tmp_path / "c.pth"), model.state_dict())


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


BAD_FILES = {
    "empty.pth": (lambda p, m: _write(p, b""), "is empty"),
    "text.pth": (lambda p, m: _write(p, b"<!DOCTYPE html><html>Not Found</html>"), "truncated or no checkpoint"),
    "pickle.pth": (lambda p, m: _write(p, pickle.dumps([1, 2])), "not a state dict|truncated or no checkpoint"),
    "text.safetensors": (lambda p, m: _write(p, b"<!DOCTYPE html>" * 9), "truncated or no safetensors"),
    "list.pth": (lambda p, m: torch.save([1, 2], p), "holds a list, not a state dict"),
    "numbers.pth": (lambda p, m: torch.save({"epoch": 3}, p), "no state dict of tensors: its entries are epoch"),
    "nothing.pth": (lambda p, m: torch.save({}, p), "no state dict of tensors"),
    "resnet.pth": (lambda p, m: torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, p), "no weights of a VMamba"),
    "resnet.safetensors": (lambda p, m: save_file({"conv1.weight": torch.zeros(1)}, p), "no weights of a VMamba"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(name, model, tmp_path) -> None:
    make, message = BAD_FILES[name]
    make(tmp_path / name, model)
    with pytest.raises(ValueError, match=rf"(?s){name}.*({message})"):
        load_checkpoint(model, tmp_path / name)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.98])
def test_truncated_files_are_named(model, tmp_path, suffix, kept) -> None:
    path = tmp_path / f"cut{suffix}"
    save_checkpoint(model, path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"cut.*truncated"):
        load_checkpoint(model, path)


def test_missing_file(model, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_checkpoint(model, tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(model, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(model, tmp_path, value) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["stages.2.blocks.1.ssm.A_log"][0, 0] = value
    torch.save(state, tmp_path / "c.pth")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"c\.pth holds NaN or Inf in stages\.2\.blocks\.1\.ssm\.A_log"):
        load_checkpoint(model, tmp_path / "c.pth")
    assert _same(model.state_dict(), before)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch, suffix) -> None:
    path = tmp_path / f"c{suffix}"
    save_checkpoint(model, path)
    good = path.read_bytes()

    def full_disk(state, file, *args, **options):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", full_disk)
    monkeypatch.setattr(checkpoint_module.safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match=rf"cannot write .*c{suffix}.*No space left"):
        save_checkpoint(VMamba(**SMALL), path)
    assert path.read_bytes() == good
    assert os.listdir(tmp_path) == [path.name]


def test_saving_into_a_folder_that_is_not_there(model, tmp_path) -> None:
    with pytest.raises(OSError, match="cannot write"):
        save_checkpoint(model, tmp_path / "nowhere" / "c.pth")


def test_half_precision_files_load_into_single_precision(model, tmp_path) -> None:
    torch.save({n: t.to(torch.bfloat16) for n, t in model.state_dict().items()}, tmp_path / "c.pth")
    other = VMamba(**SMALL)
    load_checkpoint(other, tmp_path / "c.pth")
    weight = model.stem.conv1.weight.to(torch.bfloat16).float()
    assert torch.equal(other.stem.conv1.weight, weight)


OVERLAYS = {"custom_load": {"custom_load": True}, "filter": {"custom_load": False}}


@pytest.mark.parametrize("way", OVERLAYS)
@pytest.mark.parametrize("options", [{}, {"num_classes": 3}, {"in_chans": 1}, {"features_only": True}])
def test_timm_loads_official_files(way, options, tmp_path) -> None:
    source = timm.create_model("vmamba_nano")
    torch.save({"model": state_to_official(source.state_dict())}, tmp_path / "official.pth")
    overlay = {"file": str(tmp_path / "official.pth"), **OVERLAYS[way]}
    loaded = timm.create_model("vmamba_nano", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    loaded = getattr(loaded, "model", loaded)
    assert torch.equal(loaded.stages[2].blocks[1].ssm.A_log, source.stages[2].blocks[1].ssm.A_log)
    assert torch.equal(loaded.stem.conv2.weight, source.stem.conv2.weight)
    if not options:
        assert _same(loaded.state_dict(), source.state_dict())


def test_timm_downloads_through_the_same_reader(tmp_path) -> None:
    """A release file, pickled settings and all, by its URL."""
    source = timm.create_model("vmamba_nano")
    settings = collections.OrderedDict(IMG_SIZE=224)
    torch.save({"model": state_to_official(source.state_dict()), "config": settings}, tmp_path / "release.pth")
    overlay = {"url": (tmp_path / "release.pth").as_uri(), "custom_load": True}
    loaded = timm.create_model(
        "vmamba_nano", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache"
    )
    assert _same(loaded.state_dict(), source.state_dict())


def test_public_names() -> None:
    assert all(hasattr(vmamba, name) for name in vmamba.__all__)
