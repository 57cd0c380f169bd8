"""`vmamba segment` on the command line."""

from __future__ import annotations

import pytest

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
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("photos/0.png  ")
    assert any(name in lines[0] for name in ("sky", "road", "car"))
    for line in (*lines[1:4], *lines[5:]):
        assert (tmp_path / line.strip()).is_file()
    assert read_index_mask("segmented/0.mask.png").shape == (45, 70)


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
