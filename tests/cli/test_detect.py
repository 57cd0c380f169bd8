"""`vmamba detect`: its JSON, its pictures, its mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from vmamba.cli import main
from vmamba.data import read_coco
from vmamba.models import save_checkpoint
from vmamba.models.detection import load_detector, mask_rcnn

pytest.importorskip("faster_coco_eval", reason="detections are written by faster-coco-eval: pip install 'vmamba[det]'")

SMALL = {"channels": 8, "fc_channels": 8}
QUICK = ["--min-size", "48", "--max-size", "64", "--max-detections", "4", "--threshold", "0.01"]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A detector of two classes that nobody trained, and the working directory where its file lies."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    save_checkpoint(mask_rcnn("vmamba_nano", 2, **SMALL), "detector.safetensors")
    return "detector.safetensors"


def _fails(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_writes_a_coco_file_and_a_picture_an_image(weights, make_coco, capsys, tmp_path, one_thread) -> None:
    images, file, _ = make_coco()
    main(["detect", str(images), "--checkpoint", weights, "--categories", str(file), "--out", "found", *QUICK])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"{weights}, on cpu"
    assert len(lines) == 4
    assert lines[-1] == "12 objects in 3 image(s): found/detections.json"
    found = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert [entry["file_name"] for entry in found["images"]] == [str(images / f"{n}.png") for n in (30, 31, 7)]
    assert found["categories"] == [{"id": 3, "name": "box"}, {"id": 90, "name": "tri"}]
    assert len(found["annotations"]) == 12
    for entry in found["annotations"]:
        assert entry["category_id"] in (3, 90)
        assert 0.01 < entry["score"] <= 1
        assert entry["segmentation"]["size"] == [48, 64]
        x, y, width, height = entry["bbox"]
        assert min(x, y) >= 0
        assert x + width <= 64.01
        assert y + height <= 48.01
    assert read_coco("found/detections.json").has_masks  # any tool for COCO files reads it
    for name in ("7", "30", "31"):
        with Image.open(tmp_path / "found" / f"{name}.png") as picture:
            assert picture.size == (64 * 13, 48 * 13)  # enlarged to at least 800 pixels
    again = ["detect", str(images), "--checkpoint", weights, "--out", "found"]
    assert "found exists already" in _fails(again, capsys)
    main([*again, "--overwrite", *QUICK])
    assert "class " in capsys.readouterr().out  # without a list of categories


def test_boxes_alone_and_files_of_one_name(weights, make_coco, capsys, tmp_path, one_thread) -> None:
    images, _, _ = make_coco("a")
    others, _, _ = make_coco("b")
    save_checkpoint(mask_rcnn("vmamba_nano", 2, masks=False, **SMALL), "boxes.safetensors")
    main(["detect", str(images / "7.png"), str(others / "7.png"), "--checkpoint", "boxes.safetensors", *QUICK])
    assert sorted(p.name for p in (tmp_path / "detections").iterdir()) == ["7-2.png", "7.png", "detections.json"]
    found = json.loads((tmp_path / "detections" / "detections.json").read_text())
    assert all("segmentation" not in entry and entry["area"] > 0 for entry in found["annotations"])


def test_official_names_and_other_backbones_load(weights, tmp_path) -> None:
    detector = load_detector(weights)
    assert (detector.classes, detector.has_masks, detector.backbone.out_channels) == (2, True, 8)
    save_checkpoint(detector, "official.pth", official=True)
    again = load_detector("official.pth")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), detector.parameters(), strict=True))
    save_checkpoint(mask_rcnn("resnet18", 1, **SMALL), "resnet.safetensors")
    assert load_detector("resnet.safetensors", "resnet18").classes == 1
    with pytest.raises(ValueError, match=r"the backbone in resnet\.safetensors is none of .*vmamba_nano"):
        load_detector("resnet.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_detector(weights, "vmamba_micro")


def test_mistakes_are_one_line(weights, make_coco, capsys, tmp_path) -> None:
    images, file, contents = make_coco()
    command = ["detect", str(images), "--checkpoint", weights]
    assert "no such image: nothing.png" in _fails(["detect", "nothing.png", "--checkpoint", weights], capsys)
    assert "no checkpoint file none.pth" in _fails(["detect", str(images), "--checkpoint", "none.pth"], capsys)
    assert "--threshold must lie in [0, 1), not 1.0" in _fails([*command, "--threshold", "1"], capsys)
    assert "cannot compute on device 'tpu9'" in _fails([*command, "--device", "tpu9"], capsys)
    contents["categories"].append({"id": 5, "name": "third"})
    file.write_text(json.dumps(contents))
    assert "3 categories, but the detector knows 2" in _fails([*command, "--categories", str(file)], capsys)
    save_checkpoint(torch.nn.ModuleDict(), "empty.safetensors")
    empty = ["detect", str(images), "--checkpoint", "empty.safetensors"]
    assert "vmamba detect: empty.safetensors" in _fails(empty, capsys)
    assert not (tmp_path / "detections").exists()  # nothing is written before work can start
