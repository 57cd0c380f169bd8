"""`vmamba erf`, `vmamba attention` and `vmamba routes` on the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vmamba import save_checkpoint
from vmamba.cli import main
from vmamba.training import load_trained


@pytest.fixture
def photos(make_photos, tmp_path, monkeypatch, one_thread):
    """Two photos of 70 x 45 px in photos/, where the working directory is."""
    make_photos("photos", {"": 2}, size=(70, 45))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(make_photos, photos, capsys):
    """A run directory of one step."""
    make_photos("pets", {"cat": 3, "dog": 3})
    options = ["--model", "vmamba_nano", "--image-size", "32", "--epochs", "1", "--batch-size", "2", "--device", "cpu"]
    main(["train", "--data", "pets", *options, "--set", "data.workers=0", "--set", "run.threads=1", "--out", "run"])
    capsys.readouterr()
    return "run"


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"vmamba {arguments[0]}: ")
    assert "\n" not in error
    return error


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_erf_of_a_run_before_and_after_beside_another_model(trained, capsys):
    main(["erf", trained, "resnet18", "--images", "photos", "--before", "--image-size", "64"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("2 images, on cpu")
    assert [line.split(": ")[0] for line in lines[1:4]] == [
        "vmamba_nano, trained, stages.3",
        "resnet18, untrained, layer4",
        "vmamba_nano, before training, stages.3",
    ]
    assert [line.strip() for line in lines[4:]] == [f"erf/erf.{kind}" for kind in ("png", "svg", "csv", "json", "npz")]
    rows = table("erf/erf.csv")
    assert len(rows) == 3 * 4
    assert [row["share"] for row in rows[:4]] == ["0.2", "0.3", "0.5", "0.99"]
    found = json.loads(Path("erf/erf.json").read_text())
    assert [entry["state"] for entry in found] == ["before training", "trained", "untrained"]
    assert found[0]["image_size"] == [64, 64]
    assert found[0]["grid"] == [2, 2]
    assert found[0]["areas"][2]["side"] == float(rows[2]["side"])
    with np.load("erf/erf.npz") as arrays:
        before, after = arrays["vmamba_nano, before training"], arrays["vmamba_nano, trained"]
    assert before.shape == after.shape == (64, 64)
    assert not np.allclose(before, after)
    with Image.open("erf/erf.png") as drawn:
        assert min(drawn.size) > 1000


def test_erf_of_a_fixed_size_model_at_another_size(photos, capsys):
    main(["erf", "deit_tiny_patch16_224", "--images", "photos", "--image-size", "96", "--rectified", "--count", "1"])
    assert "deit_tiny_patch16_224, untrained, blocks.11" in capsys.readouterr().out
    (found,) = json.loads(Path("erf/erf.json").read_text())
    assert (found["grid"], found["images"], found["rectified"]) == ([6, 6], 1, True)


def test_two_runs_of_one_model_go_by_their_names(trained, photos):
    (photos / "other").symlink_to(photos / trained)
    main(["erf", trained, "other", "--images", "photos", "--image-size", "32"])
    assert [entry["model"] for entry in json.loads(Path("erf/erf.json").read_text())] == ["run", "other"]
    with np.load("erf/erf.npz") as arrays:
        assert sorted(arrays) == ["other, trained", "run, trained"]


def test_fresh_weights_are_those_of_the_seed(photos, capsys):
    state = torch.get_rng_state()
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main(["erf", "vmamba_nano", "--images", "photos", "--image-size", "32", "--seed", seed, "--out", out])
    assert torch.equal(state, torch.get_rng_state())
    texts = [(photos / out / "erf.csv").read_text() for out in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_attention_of_a_run(trained, photos, capsys):
    main(["attention", trained, "photos/0.png", "--pixel", "60", "10", "--short-side", "64", "--out", "deep/maps"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "photos/0.png, pixel 60 10, seen at 100 x 64 px, on cpu"
    model, _ = load_trained(trained)
    last = [f"stages.{i}.blocks.{depth - 1}.ssm" for i, depth in enumerate(model.config.depths)]
    assert [line.split(":")[0].strip() for line in lines[1:5]] == last
    for line in lines[5:]:
        assert (photos / line.strip()).is_file()
    found = json.loads((photos / "deep/maps/0.json").read_text())
    assert found["weights"] == "trained"
    assert found["pixel"] == [60, 10]
    assert all(error <= 1e-5 for error in found["error"].values())
    rows = table("deep/maps/0.csv")
    first = rows[:5]
    assert [row["route"] for row in first][-1] == "all routes"
    assert sum(float(row["share"]) for row in first[:4]) == pytest.approx(1, abs=1e-4)
    # the pixel's middle, 60.5 of 70 and 10.5 of 45, in a grid of 25 x 16
    assert (first[0]["rows"], first[0]["columns"], first[0]["row"], first[0]["column"]) == ("16", "25", "3", "21")
    with np.load("deep/maps/0.npz") as arrays:
        for quantity in ("activation", "attention"):
            assert arrays[f"{last[0]}/{quantity}"].shape == (4, 16, 25)
            assert arrays[f"{last[3]}/{quantity}_all_routes"].shape == (2, 4)
    assert {row["steps"] for row in table("deep/maps/0.decay_by_steps.csv")} >= {"0", "1"}


@pytest.mark.parametrize("command", [["erf", "run", "--images", "photos"], ["attention", "run", "photos/0.png"]])
def test_runs_of_other_tasks_are_refused(trained, capsys, command):
    best = Path(trained) / "checkpoints" / "best.ckpt"
    contents = torch.load(best, weights_only=True)
    contents["vmamba"]["task"] = "segmentation"
    torch.save(contents, best)
    assert "is of segmentation, not of classification" in fails(command, capsys)


def test_attention_of_bare_weights_in_one_layer(photos, capsys):
    save_checkpoint(timm.create_model("vmamba_nano"), "bare.safetensors")
    main(["attention", "vmamba_nano=bare.safetensors", "photos/1.png", "--layer", "stages.1.blocks.0"])
    assert "photos/1.png, pixel 35 22, seen at 50 x 32 px, on cpu" in capsys.readouterr().out
    assert {row["layer"] for row in table("attention/1.csv")} == {"stages.1.blocks.0.ssm"}


def test_routes(photos, capsys):
    main(["routes", "cross2d", "cascade2d", "--grid", "3", "4", "--image", "photos/0.png", "--panel", "80"])
    written = capsys.readouterr().out.splitlines()
    assert written == [f"routes/{name}.{kind}" for name in ("cross2d", "cascade2d") for kind in ("png", "svg", "gif")]
    assert all((photos / name).stat().st_size > 1000 for name in written)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("erf vmamba_nan --images photos", "did you mean vmamba_nano"),
        ("erf vmamba_nano --images nowhere", "no such image: nowhere"),
        ("erf vmamba_nano --images photos --count 0", "--count must be at least 1"),
        ("erf vmamba_nano --images photos --layer stages.4", "no layer 'stages.4'; near names: stages.3"),
        ("erf vmamba_nano --images photos --layer 4", "features 0 to 3, not 4"),
        ("erf runs/none --images photos", "no such run or checkpoint: runs/none"),
        ("erf vmamba_nano=none.pth --images photos", "no such run or checkpoint: none.pth"),
        ("erf vmamba_nano --images photos --out photos/0.png", "photos/0.png is a file"),
        ("erf vmamba_nano --images photos --out photos/0.png/erf", "photos/0.png is a file"),
        ("erf vmamba_nano vmamba_nano --images photos", "vmamba_nano is named twice"),
        ("erf vmamba_nano --images photos --device cuda:77", "cannot compute on device 'cuda:77'"),
        ("attention vmamba_nano photos/0.png --pixel 70 3", "lies outside photos/0.png, which is 70 px wide and 45 px"),
        ("attention vmamba_nano photos/0.png --pixel 3 -1", "lies outside photos/0.png"),
        ("attention vmamba_nano photos/0.png wide/1.png --pixel 99 0", "lies outside photos/0.png"),
        ("attention vmamba_nano wide/1.png photos/0.png --pixel 99 0", "lies outside photos/0.png"),
        ("attention vmamba_nano photos/0.png wide/torn.png", "cannot read the image wide/torn.png"),
        ("attention vmamba_nano photos/0.png --layer stages.1.block.0", "near names: stages.1.blocks.0.ssm"),
        ("attention vmamba_nano photos/0.png --short-side 31", "--short-side must be at least 32 px"),
        ("attention vmamba_nano photos photos/0.png", "two images are called 0"),
        ("attention resnet18 photos/0.png", "ResNet has no SS2D layer"),
        ("routes cross", "unknown routes 'cross'"),
        ("routes --grid 0 4", "not 0 x 4"),
        ("routes --panel 3", "--panel must be at least 50 px"),
    ],
)
def test_mistakes_are_one_line(photos, make_photos, capsys, arguments, message):
    make_photos("wide", {"": 2}, size=(100, 30))
    (photos / "wide/torn.png").write_bytes((photos / "wide/0.png").read_bytes()[:60])
    before = sorted(photos.rglob("*"))
    assert message in fails(arguments.split(), capsys)
    assert sorted(photos.rglob("*")) == before  # nothing was written


@pytest.mark.parametrize(
    "arguments",
    [
        "erf vmamba_nano --images photos",
        "attention vmamba_nano photos/0.png",
        "routes",
        "count vmamba_nano --csv a.csv",
    ],
)
def test_a_folder_that_takes_no_files_is_told_before_the_work(photos, capsys, monkeypatch, arguments):
    def refuse(dir):
        raise OSError(30, "Read-only file system", dir)

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("vmamba.cli.networks.open_network", None)
    assert f"{photos} takes no files (Read-only file system)" in fails(arguments.split(), capsys)
    assert sorted(file.name for file in photos.iterdir()) == ["photos"]


@pytest.mark.parametrize("command", ["erf", "attention", "routes"])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"  vmamba {command}" in capsys.readouterr().out
