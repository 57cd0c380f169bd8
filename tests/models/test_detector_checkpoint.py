"""Detector checkpoints: official names both ways, the files that mmengine writes, other class lists."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vmamba import FeatureGetter, VMamba, convert, load_checkpoint, read_checkpoint, save_checkpoint
from vmamba.models.detection import MaskRCNN, mask_rcnn
from vmamba.models.detector_keymap import state_to_official, state_to_ours


def _detector(classes: int = 3, body: str | torch.nn.Module | None = None, **options) -> MaskRCNN:
    body = body or FeatureGetter(VMamba(depths=(1, 1, 1, 1), dims=8), out_norm=True)
    return mask_rcnn(body, classes, channels=8, fc_channels=8, **options)


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_official_names_go_there_and_back(golden: Path, tmp_path) -> None:
    official = load_file(golden / "mask_rcnn.state.safetensors")
    ours = state_to_ours(official)
    assert not set(ours) & set(official)
    assert _same({name: t.reshape(official[name].shape) for name, t in state_to_official(ours).items()}, official)
    assert torch.equal(
        ours["roi_heads.box_predictor.cls_score.bias"], official["roi_head.bbox_head.fc_cls.bias"].roll(1)
    )


@pytest.mark.parametrize("masks", [True, False])
def test_a_detector_is_saved_and_loaded_under_both_names(masks, tmp_path) -> None:
    detector = _detector(masks=masks)
    save_checkpoint(detector, tmp_path / "ours.safetensors")
    save_checkpoint(detector, tmp_path / "official.pth", official=True)
    convert(tmp_path / "official.pth", tmp_path / "converted.safetensors")
    assert _same(load_file(tmp_path / "converted.safetensors"), load_file(tmp_path / "ours.safetensors"))
    for name in ("ours.safetensors", "official.pth", "converted.safetensors"):
        other = _detector(masks=masks)
        load_checkpoint(other, tmp_path / name)
        assert _same(other.state_dict(), detector.state_dict())


def test_what_does_not_fit_is_an_error_and_changes_nothing(tmp_path) -> None:
    save_checkpoint(_detector(), tmp_path / "masks.safetensors")
    boxes = _detector(masks=False)
    before = {name: tensor.clone() for name, tensor in boxes.state_dict().items()}
    with pytest.raises(ValueError, match=r"unknown to the model: roi_heads\.mask_head\.0"):
        load_checkpoint(boxes, tmp_path / "masks.safetensors")
    assert _same(boxes.state_dict(), before)


def test_unknown_names_are_listed() -> None:
    official = state_to_official(read_state(_detector()))
    with pytest.raises(ValueError, match=r"no counterpart for 1 official .*roi_head\.semantic\.weight"):
        state_to_ours(official | {"roi_head.semantic.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"no counterpart for 1 official .*layers\.0\.blocks\.0\.op\.spectral"):
        state_to_ours(official | {"backbone.layers.0.blocks.0.op.spectral": torch.zeros(1)})


def read_state(detector: MaskRCNN) -> dict[str, torch.Tensor]:
    """The detector's state as files have it, without the wrapper around its backbone."""
    return {name.replace("body.model.", "body."): tensor for name, tensor in detector.state_dict().items()}


def test_other_backbones_have_files_but_no_official_names(tmp_path) -> None:
    detector = _detector(body="resnet18")
    save_checkpoint(detector, tmp_path / "a.safetensors")
    other = _detector(body="resnet18")
    load_checkpoint(other, tmp_path / "a.safetensors")
    assert _same(other.state_dict(), detector.state_dict())
    with pytest.raises(ValueError, match=r"no counterpart for .*conv1\.weight"):
        save_checkpoint(detector, tmp_path / "b.pth", official=True)


def test_another_class_list_keeps_its_own_predictors(tmp_path) -> None:
    trained, mine = _detector(80), _detector(2)
    save_checkpoint(trained, tmp_path / "coco.safetensors")
    with pytest.raises(ValueError, match="new_head=True"):
        load_checkpoint(mine, tmp_path / "coco.safetensors")
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    load_checkpoint(mine, tmp_path / "coco.safetensors", new_head=True)
    own = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith(own) else trained.state_dict()[name]), name


def test_files_of_mmengine_load_without_mmengine(tmp_path, monkeypatch) -> None:
    """Beside the weights lie objects of mmengine with NumPy arrays and methods, as mmengine 0.10 pickles them."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self.values = np.array([1.5, 2.5])

        def mean(self):
            raise AssertionError("nothing in the file may run")

        def __getstate__(self):
            return self.__dict__ | {"statistics_methods": {"mean": HistoryBuffer.mean}, "current": np.float64(1.5)}

        def __setstate__(self, state):
            raise AssertionError("nothing in the file may run")

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    detector = _detector()
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        content = {
            "meta": {"epoch": 12, "cfg": "model = dict()", "dataset_meta": {"classes": ("a", "b", "c")}},
            "state_dict": OrderedDict(state_to_official(read_state(detector))),
            "message_hub": {"log_scalars": OrderedDict({"train/loss": HistoryBuffer()})},
            "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
        }
        torch.save(content, tmp_path / "epoch_12.pth")
    other = _detector()
    load_checkpoint(other, tmp_path / "epoch_12.pth")
    assert _same(other.state_dict(), detector.state_dict())
    assert _same(read_checkpoint(tmp_path / "epoch_12.pth"), read_state(detector))
