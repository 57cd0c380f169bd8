"""``vmamba ablations``: the list, its files, and a line as a configuration that trains."""

from __future__ import annotations

import csv
import json
import re

import pytest
import yaml

from vmamba import models
from vmamba.cli import main
from vmamba.models import ABLATIONS
from vmamba.training.recipes import resolve


def test_the_list_and_its_files(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    some = {name: ABLATIONS[name] for name in ("cross2d", "unidi", "ds1", "ds8", "relu")}  # each takes half a second
    monkeypatch.setattr(models, "ABLATIONS", some)
    main(["ablations", "--json", "a.json", "--csv", "a.csv"])
    out = capsys.readouterr().out
    assert re.search(r"^unidi +routes: unidi +30,249,064 +4\.906 +82\.26$", out, re.MULTILINE)
    assert re.search(r"^ds8 +d_state: 8, ssm_ratio: 1\.5 +28,640,008 +5\.044 +82\.69$", out, re.MULTILINE)
    assert re.search(r"^relu .* -$", out, re.MULTILINE)
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["name"] for row in rows] == list(some)
    with open(tmp_path / "a.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(some)


def test_a_line_is_a_configuration_for_training(capsys) -> None:
    for name in ("posndw", "sr1hl5", "cross2d"):
        main(["ablations", name])
        config = resolve(yaml.safe_load(capsys.readouterr().out), recipe="imagenet")
        assert config.model.name == ABLATIONS[name].base
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in config.model.kwargs.items()} == dict(
            ABLATIONS[name].changes
        )


def test_mistakes_are_told(capsys) -> None:
    for arguments, message in ((["unidir"], "did you mean unidi"), (["unidi", "--csv", "a.csv"], "leave out the name")):
        with pytest.raises(SystemExit) as stop:
            main(["ablations", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
