"""``vmamba ladder``: tables, files, exit status."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from vmamba import analysis
from vmamba.analysis import ladder
from vmamba.cli import main

QUICK = ["--device", "cpu", "--size", "32", "--batch", "2", "--repeats", "2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path, one_thread):
    """Small rungs, short rounds, in a directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analysis, "ModelSettings", partial(analysis.ModelSettings, round_seconds=0.001))
    rungs = tuple(replace(r, changes={**r.changes, "dims": 8, "depths": (1, 1, 1, 1)}) for r in ladder.RUNGS)
    monkeypatch.setattr(ladder, "RUNGS", rungs)


def test_tables_and_files(capsys, tmp_path) -> None:
    main(["ladder", *QUICK, "--rungs", "plain,triton,fused,g", "--json", "a.json", "--csv", "a.csv", "--figure", "a"])
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "right against the fp64 reference" in out
    assert re.search(r"^triton +\(a\) +the scan in Triton, routes materialised ", out, re.MULTILINE)
    assert len(re.findall(r"^plain +eager +[\d.,]+ +1\.00 .* 426$", out, re.MULTILINE)) == 1
    assert len(re.findall(r"^triton +eager +unavailable: its kernels run on CUDA devices", out, re.MULTILINE)) == 2
    assert len(re.findall(r"^g +eager .* (1,686|571)$", out, re.MULTILINE)) == 2
    report = json.loads((tmp_path / "a.json").read_text())
    assert [len(rung["measured"]) for rung in report["rungs"]] == [2, 0, 2, 2]
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rung"], row["task"]) for row in rows[:3]] == [
        ("plain", "inference"),
        ("plain", "training"),
        ("triton", "inference"),
    ]
    assert float(rows[0]["images_per_second"]) == report["rungs"][0]["measured"][0]["images_per_second"]
    assert {row["batch"] for row in rows} == {"2"}
    assert rows[2]["error"] == "its kernels run on CUDA devices, not on cpu"
    assert rows[-1]["published_images_per_second_a100_fp32"] == "571"
    assert out.endswith("figures: a.json\nrows: a.csv\nchart: a.png a.svg\n")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 300


def test_a_cut_off_run_has_written_what_it_had(capsys, tmp_path, monkeypatch) -> None:
    measure = ladder.measure_case

    def measure_one(name, module, task, *others):
        if task == "training":
            raise KeyboardInterrupt
        return measure(name, module, task, *others)

    monkeypatch.setattr(ladder, "measure_case", measure_one)
    with pytest.raises(SystemExit) as stop:
        main(["ladder", *QUICK, "--rungs", "g", "--json", "a.json", "--figure", "a.svg"])
    assert stop.value.code == 130
    measured = json.loads((tmp_path / "a.json").read_text())["rungs"][0]["measured"]
    assert [case["task"] for case in measured] == ["inference"]
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_mistakes_are_told(capsys) -> None:
    for arguments, message in (
        (["--rungs", "h"], "no rung h"),
        (["--figure", "a.pdf"], "must end in .png or .svg"),
        (["--json", "nowhere/a.json"], "there is no directory nowhere"),
        (["--csv", "."], "cannot write .: it is a directory"),
        (["--task", "flight"], "unknown 'flight'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["ladder", *QUICK, *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
