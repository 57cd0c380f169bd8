"""``vmamba scaling``: tables, files, accuracy of a checkpoint, mistakes."""

from __future__ import annotations

import csv
import json
import re
from functools import partial

import pytest
import timm
from PIL import Image

from vmamba import analysis, save_checkpoint
from vmamba.cli import main

QUICK = ["vmamba_nano", "--device", "cpu", "--sizes", "32,64", "--batch", "1", "--repeats", "2", "--task", "inference"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path, one_thread):
    """Short rounds, in a directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analysis, "ModelSettings", partial(analysis.ModelSettings, round_seconds=0.001))


def test_tables_and_files(capsys, tmp_path) -> None:
    main(["scaling", *QUICK, "--json", "a.json", "--csv", "a.csv", "--figure", "a.png"])
    out = capsys.readouterr().out
    assert len(re.findall(r"^vmamba_nano +(32 +49|64 +12) ", out, re.MULTILINE)) == 2
    assert re.search(r"^macs +vmamba_nano +(0\.99|1\.00) +(0\.99|1\.00) +2$", out, re.MULTILINE)
    assert re.search(r"^time inference +vmamba_nano ", out, re.MULTILINE)
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    with open(tmp_path / "a.csv", newline="") as file:
        assert [int(row["macs"]) for row in csv.DictReader(file)] == [row["macs"] for row in rows]
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 300


def test_accuracy_of_a_checkpoint_over_test_sizes(capsys, tmp_path, make_photos) -> None:
    data = make_photos("photos", {str(i): 2 for i in range(10)})
    save_checkpoint(timm.create_model("vmamba_nano"), tmp_path / "nano.safetensors")
    accuracy = ["--checkpoint", "nano.safetensors", "--checkpoint-model", "vmamba_nano", "--data", str(data)]
    main(["scaling", *QUICK, *accuracy, "--accuracy-sizes", "32,48", "--json", "a.json"])
    entries = json.loads((tmp_path / "a.json").read_text())["accuracy"]
    assert [entry["size"] for entry in entries] == [32, 48]
    assert all(0 <= entry["top1"] <= entry["top5"] <= 100 for entry in entries)
    assert re.search(r"^48 +[\d.]+ ", capsys.readouterr().out, re.MULTILINE)


def test_a_misspelt_model_is_told_before_the_checkpoint_is_evaluated(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["scaling", "vmamba_nan", *QUICK[1:], "--checkpoint", "not opened"])
    assert "did you mean vmamba_nano" in capsys.readouterr().err


def test_mistakes_are_told(capsys) -> None:
    for arguments, message in (
        (["--sizes", "32;64"], "--sizes takes numbers"),
        (["--data", "photos"], "--data is of no use without --checkpoint"),
        (["--figure", "a.pdf"], "must end in .png or .svg"),
        (["--csv", "nowhere/a.csv"], "there is no directory nowhere"),
        (["--mode", "eager,compile"], "in one mode"),
        (["--batch", "0"], "batch must be at least 1, not 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["scaling", *QUICK, *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
