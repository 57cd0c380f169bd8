"""`vmamba segment` on the command line."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from vmamba import create_upernet, save_checkpoint
from vmamba.cli import main
from vmamba.data.segmentation import read_index_mask


@pytest.fixture
def files(make_photos, tmp_path, monkeypatch, one_thread):
    """Two photos, a checkpoint and a list of class names in the working directory."""
    make_photos("photos", {"": 2}, size=(70, 45))
    save_checkpoint(create_upernet("vmamba_nano", 3, channels=8, auxiliary_channels=8), tmp_path / "c.safetensors")
    (tmp_path / "names.txt").write_text("sky\nroad\ncar\n")
    monkeypatch.chdir(tmp_path)


def _fails(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["segment", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("vmamba segment: ")
    assert "\n" not in error
    return error


def test_it_writes_three_pictures_an_image_and_names_them(files, capsys, tmp_path) -> None:
    main(["segment", "--checkpoint", "c.safetensors", "--classes", "names.txt", "--short-side", "64", "photos"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "c.safetensors, on cpu"
    assert len(lines) == 8
    assert lines[0].startswith("photos/0.png  ")
    assert any(name in lines[0] for name in ("sky", "road", "car"))
    for line in (*lines[1:4], *lines[5:]):
        assert (tmp_path / line.strip()).is_file()
    assert read_index_mask("segmented/0.mask.png").shape == (45, 70)
    again = ["--checkpoint", "c.safetensors", "photos", "--short-side", "64"]
    assert "segmented/0.mask.png exists already" in _fails(again, capsys)
    main(["segment", *again, "--overwrite"])


@pytest.mark.parametrize(
    "options",
    [
        ["--short-side", "0"],
        ["--window", "40", "--stride", "20"],
        ["--scales", "0.5,1", "--flip"],
        ["--out", "deep/er"],
    ],
)
def test_options(files, capsys, tmp_path, options) -> None:
    main(
        [
            "segment",
            "--checkpoint",
            "c.safetensors",
            "--model",
            "vmamba_nano",
            "photos/1.png",
            "--short-side",
            "64",
            *options,
        ]
    )
    assert "class " in capsys.readouterr().out
    assert len(list(tmp_path.rglob("1.*.png"))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "none.pth", "photos"], "no checkpoint file none.pth"),
        (["--checkpoint", "c.safetensors", "none.png"], "no such image: none.png"),
        (["--checkpoint", "c.safetensors", "photos", "--classes", "none.txt"], "no such list of class names: none.txt"),
        (["--checkpoint", "c.safetensors", "photos", "--scales", "1;2"], "--scales must be numbers"),
        (["--checkpoint", "c.safetensors", "photos", "--stride", "9"], "name a window"),
        (["--checkpoint", "c.safetensors", "photos", "--model", "vmamba_nan"], "did you mean vmamba_nano"),
    ],
)
def test_mistakes_are_one_line(files, capsys, options, message) -> None:
    assert message in _fails(options, capsys)


def test_help_has_examples(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["segment", "--help"])
    assert "  vmamba segment --checkpoint" in capsys.readouterr().out


@pytest.fixture
def labelled(files, tmp_path):
    """A data set of two images to train and to validate on, and one more class than the model's masks show."""
    for part in ("train", "val"):
        for i in range(2):
            for folder, mode in (("images", "RGB"), ("masks", "L")):
                path = tmp_path / "street" / folder / part / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new(mode, (48, 40), 1 if mode == "L" else (9, 90, 200)).save(path)
    (tmp_path / "street" / "classes.txt").write_text("sky\nroad\ncar\n")


def test_eval_prints_a_table_by_class_and_the_means(labelled, capsys) -> None:
    main(["eval", "c.safetensors", "--task", "segmentation", "--data", "street", "--short-side", "64", "--flip"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "c.safetensors on street (2 validation images), fp32 on cpu"
    assert lines[2].split() == ["class", "IoU", "%", "acc.", "%", "pixels"]
    assert [line.split()[0] for line in lines[3:6]] == ["sky", "road", "car"]
    assert lines[4].split()[3] == "3,840"
    assert lines[3].split()[2] == "-"
    assert re.fullmatch(
        r"mean IoU \d+\.\d\d %   mean accuracy \d+\.\d\d %   pixel accuracy \d+\.\d\d %   loss \d\.\d{4}", lines[7]
    )


def test_eval_names_a_mask_that_is_wrong(labelled, capsys) -> None:
    Image.new("L", (48, 40), 7).save("street/masks/val/1.png")
    with pytest.raises(SystemExit) as stop:
        main(["eval", "c.safetensors", "--task", "segmentation", "--data", "street"])
    assert stop.value.code == 2
    assert "street/masks/val/1.png holds the unknown label(s) 7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "c.safetensors", "--task", "segmentation"])
    assert "--data" in capsys.readouterr().err
