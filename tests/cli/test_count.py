"""``vmamba count``: the table, the files, mistakes."""

from __future__ import annotations

import csv
import json
import re

import pytest

from vmamba.cli import main


def fails(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["count", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_classifier_with_the_published_figures(capsys) -> None:
    main(["count", "vmamba_tiny_s1l8", "--depth", "1"])
    out = capsys.readouterr().out
    assert "1000 classes, one image of 224 x 224" in out
    assert re.search(r"^network +VMamba +30,249,064 +4\.906 +100\.0 +9\.695$", out, re.MULTILINE)
    assert re.search(r"^  stages +Sequential ", out, re.MULTILINE)
    assert "conv1" not in out


def test_files_hold_every_module(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["count", "vmamba_nano", "--size", "64", "96", "--depth", "0", "--csv", "a.csv", "--json", "a.json"])
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["height"], report["width"], report["classes"]) == (64, 96, 1000)
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [module["name"] for module in report["modules"]]
    assert [int(row["macs"]) for row in rows] == [module["macs"] for module in report["modules"]]
    assert len(rows) > 50
    assert capsys.readouterr().out.count("VSSBlock") == 0


def test_other_tasks_and_other_models(capsys) -> None:
    main(["count", "vmamba_nano", "--task", "segmentation", "--size", "64", "--classes", "5", "--depth", "1"])
    out = capsys.readouterr().out
    assert re.search(r"^network +UPerNet ", out, re.MULTILINE)
    assert "segmentation, 5 classes, one image of 64 x 64" in out
    main(["count", "resnet18", "--task", "detection", "--size", "64", "96", "--depth", "1"])
    assert re.search(r"^  roi_heads ", capsys.readouterr().out, re.MULTILINE)


def test_mistakes_are_told(capsys) -> None:
    assert "did you mean vmamba_nano" in fails(["vmamba_nanoo"], capsys)
    assert "--size takes one or two positive numbers, not 1 2 3" in fails(
        ["vmamba_nano", "--size", "1", "2", "3"], capsys
    )
    assert "--depth must be 0 or more" in fails(["vmamba_nano", "--depth", "-1"], capsys)
    assert "--classes must be at least 1" in fails(["vmamba_nano", "--classes", "0"], capsys)
    assert "there is no directory nowhere" in fails(["vmamba_nano", "--csv", "nowhere/a.csv"], capsys)
