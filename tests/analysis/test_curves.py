"""Curves: what is written in them, and that they are pictures of something."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vmamba.analysis.charts import COLOURS
from vmamba.analysis.curves import LINES, MARKERS, Curve, Plot, draw, save_curves

CURVES = [
    Curve("ours", "(slope 1.00)", (224, 448), (1.0, 4.0)),
    Curve("theirs", "(slope 2.00)", (224, 235, 448), (1.0, 1.2, 16.0)),
]


def test_legend_guides_and_sizes() -> None:
    axes = Figure().subplots()
    draw(axes, Plot("time", "ms", CURVES), ["ours", "theirs"])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["ours (slope 1.00)", "theirs (slope 2.00)", "linear in pixels", "quadratic"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["224", "448"]  # 235 would touch 224
    guides = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert guides["linear in pixels"][1] / guides["linear in pixels"][0] == pytest.approx(4)
    assert guides["quadratic"][1] / guides["quadratic"][0] == pytest.approx(16)


def test_a_linear_axis_has_no_guides() -> None:
    axes = Figure().subplots()
    draw(axes, Plot("accuracy", "%", CURVES[:1], log=False), ["ours"])
    assert len(axes.lines) == 1
    assert axes.get_yscale() == "linear"


def test_series_differ_in_more_than_colour() -> None:
    assert len(set(COLOURS)) == len(set(MARKERS)) == len({str(line) for line in LINES}) == 6


def test_the_picture_is_whole_and_shows_the_curves(tmp_path) -> None:
    path = tmp_path / "curves.png"
    save_curves([Plot("one", "ms", CURVES), Plot("two", "ms", CURVES[1:]), Plot("3", "%", [])], "head", "foot", path)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    pixels = np.asarray(Image.open(path).convert("RGB"))
    for colour in COLOURS[:2]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels.astype(int) - rgb).max(axis=-1) < 8).mean() > 0.0003
    save_curves([Plot("one", "ms", CURVES)], "head", "foot", tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_another_kind_of_file_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg"):
        save_curves([Plot("one", "ms", CURVES)], "head", "foot", tmp_path / "curves.pdf")
