"""Charts: what is written in them, and that they are pictures of something."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vmamba.analysis.charts import COLOURS, Bar, Panel, _draw, save_bars

BARS = [
    Bar("ours", "eager", 1234.5, 1200.0, 1300.0),
    Bar("ours", "compile", 12345.6, 12000.0, 13000.0),
    Bar("theirs", "eager", 0.123456, 0.1, 0.2),
    Bar("theirs", "compile", None, note="failed"),
]


def test_every_bar_has_its_value_and_every_failure_its_note():
    axes = Figure().subplots()
    _draw(axes, Panel("title", "images a second", BARS), ["eager", "compile"])
    assert [text.get_text() for text in axes.texts] == ["1,234", "12,346", "0.123", "compile: failed"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "theirs"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["eager", "compile"]
    assert axes.get_xlabel() == "images a second"
    assert [bar.get_width() for bar in axes.patches] == [1234.5, 12345.6, 0.123456]


def test_the_picture_is_whole_and_shows_the_bars(tmp_path):
    path = tmp_path / "bars.png"
    save_bars([Panel("one", "ms", BARS), Panel("two", "ms", BARS[3:])], "heading", "footnote", path)
    assert [file.name for file in tmp_path.iterdir()] == ["bars.png"]
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 200
    for colour in COLOURS[:2]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels.astype(int) - rgb).max(axis=-1) < 8).mean() > 0.0005


def test_a_name_without_ending_is_a_png_and_an_svg(tmp_path):
    for name in ("a", "b"):
        save_bars([Panel("one", "ms", BARS)], "heading", "footnote", tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]
    for kind in ("png", "svg"):  # the same figure is the same file
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_a_directory_that_is_not_there_is_told(tmp_path):
    with pytest.raises(OSError, match=r"nowhere.bars\.png"):
        save_bars([Panel("one", "ms", BARS)], "heading", "footnote", tmp_path / "nowhere" / "bars.png")
