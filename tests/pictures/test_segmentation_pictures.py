"""Masks, overlays and legends as PNG."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vmamba.data.segmentation import ADE20K_CLASSES, read_index_mask
from vmamba.pictures import (
    class_colours,
    class_shares,
    draw_overlay,
    save_index_mask,
    save_legend,
    save_overlay,
)
from vmamba.pictures.segmentation import _middle

NAMES = ("sky", "road", "car", "tree")


def _pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((60, 100), dtype=np.int64)
    mask[30:] = 1
    mask[35:55, 60:90] = 3
    return mask


def test_shares_are_sorted_and_absent_classes_left_out(mask) -> None:
    assert [(s.index, s.name, s.share) for s in class_shares(mask, NAMES)] == [
        (0, "sky", 0.5),
        (1, "road", 0.4),
        (3, "tree", 0.1),
    ]


def test_colours_differ_visibly_and_do_not_depend_on_the_count() -> None:
    colours = class_colours(150)
    assert (colours.shape, colours.dtype) == ((150, 3), np.uint8)
    assert np.array_equal(class_colours(11), colours[:11])
    apart = np.abs(colours[:, None].astype(int) - colours[None]).max(-1)
    assert apart[~np.eye(150, dtype=bool)].min() >= 20
    assert np.abs(colours[:20, None].astype(int) - colours[None, :20]).max(-1)[~np.eye(20, dtype=bool)].min() >= 60
    assert len(np.unique(class_colours(255), axis=0)) == 255


def test_the_mask_file_holds_the_indices_and_shows_colours(mask, tmp_path) -> None:
    save_index_mask(mask, len(NAMES), tmp_path / "m.png")
    assert np.array_equal(read_index_mask(tmp_path / "m.png"), mask)
    shown = _pixels(tmp_path / "m.png")
    assert np.array_equal(shown, class_colours(4)[mask])


@pytest.mark.parametrize("opacity", [0.0, 0.5, 1.0])
def test_the_overlay_mixes_photo_and_colours(mask, tmp_path, opacity) -> None:
    photo = Image.new("RGB", (100, 60), (40, 80, 120))
    save_overlay(photo, mask, NAMES, tmp_path / "o.png", opacity)
    pixels = _pixels(tmp_path / "o.png")
    expected = (1 - opacity) * np.array([40, 80, 120]) + opacity * class_colours(4)[mask[2, 2]]
    assert np.abs(pixels[2, 2] - expected).max() <= 0.5
    assert (pixels[29, :50] == 255).all()  # the border between sky and road
    assert pixels.shape == (60, 100, 3)


def test_larger_classes_are_named_where_they_are(mask, tmp_path) -> None:
    photo = Image.new("RGB", (100, 60), (128, 128, 128))
    save_overlay(photo, mask, ("", "", "", "tree"), tmp_path / "named.png", 0.0)
    named = _pixels(tmp_path / "named.png")
    save_overlay(photo, mask, ("", "", "", ""), tmp_path / "plain.png", 0.0)
    written = np.argwhere((named != _pixels(tmp_path / "plain.png")).any(-1))
    assert 38 < written[:, 0].mean() < 52
    assert 68 < written[:, 1].mean() < 82


@pytest.mark.parametrize("shape", [(37, 53), (400, 700)])
def test_a_names_place_is_inside_its_region(shape) -> None:
    y, x = np.mgrid[: shape[0], : shape[1]]
    away = np.hypot(y - shape[0] / 2, x - shape[1] / 2)
    ring = (away < 0.45 * shape[0]) & (away > 0.25 * shape[0])
    for region in (ring, np.ones(shape, dtype=bool), (y == 3) & (x == 5)):
        place_x, place_y = _middle(region)
        assert region[place_y, place_x]


def test_the_legend_lists_what_is_there(mask, tmp_path) -> None:
    save_legend(mask, NAMES, tmp_path / "l.png")
    legend = _pixels(tmp_path / "l.png")
    swatches = [tuple(legend[10 + 26 * i + 13, 20].tolist()) for i in range(3)]
    assert swatches == [tuple(class_colours(4)[i].tolist()) for i in (0, 1, 3)]
    everything = np.arange(150).repeat(4).reshape(20, 30)
    save_legend(everything, ADE20K_CLASSES, tmp_path / "all.png")
    assert _pixels(tmp_path / "all.png").shape[0] == 30 * 26 + 20
    assert _pixels(tmp_path / "all.png").shape[1] == 5 * _legend_width(tmp_path)


def _legend_width(folder) -> int:
    """Of one column, which is as wide as the longest of all names."""
    longest = max(range(150), key=lambda i: len(ADE20K_CLASSES[i]))
    save_legend(np.full((2, 2), longest), ADE20K_CLASSES, folder / "one.png")
    return _pixels(folder / "one.png").shape[1]


def test_names_at_the_edge_stay_in_the_picture(tmp_path) -> None:
    mask = np.zeros((60, 200), dtype=np.int64)
    mask[:, :8] = 1
    save_overlay(Image.new("RGB", (200, 60)), mask, ("", "pedestrians"), tmp_path / "o.png", 0.0)
    letters = (_pixels(tmp_path / "o.png") > 200).all(-1)
    letters[:, 7] = False  # the border between the classes
    assert not letters[:, :2].any()
    assert letters[:, 60:].any()


def test_a_larger_classs_name_is_not_covered(tmp_path) -> None:
    """In a strip as high as one name there is room for that of the larger class."""
    mask = np.zeros((14, 120), dtype=np.int64)
    mask[8:] = 1
    for names in (("background", ""), ("background", "hidden"), ("", "hidden")):
        save_overlay(Image.new("RGB", (120, 14)), mask, names, tmp_path / f"{'-'.join(names)}.png", 0.0)
    alone, together, other = (
        _pixels(tmp_path / f"{name}.png") for name in ("background-", "background-hidden", "-hidden")
    )
    assert np.array_equal(together, alone)
    assert not np.array_equal(together, other)


def test_pixels_without_label_are_black_and_have_no_name() -> None:
    mask = np.full((60, 100), 255)
    mask[:, 50:] = 1
    drawn = np.asarray(draw_overlay(Image.new("RGB", (100, 60), "white"), mask, NAMES, opacity=1.0))
    assert (drawn[:, :45] == 0).all()
    assert (drawn[5, 60:] == class_colours(4)[1]).all()
