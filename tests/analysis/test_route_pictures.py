"""The scan routes as walks, as a figure and as an animation."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from vmamba.analysis import route_figure, route_walks, save_route_animation
from vmamba.analysis.figures import save_figure
from vmamba.analysis.route_pictures import ROUTE_SETS


def walks(routes: str, height: int, width: int) -> list[list[list[tuple[int, int]]]]:
    return [
        [[tuple(map(int, place)) for place in walk] for walk in parts] for parts in route_walks(routes, height, width)
    ]


def test_cross2d_on_two_rows_of_three():
    rows, columns, rows_back, columns_back = (parts[0] for parts in walks("cross2d", 2, 3))
    assert rows == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert columns == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert rows_back == rows[::-1]
    assert columns_back == columns[::-1]


def test_the_other_sets():
    rows = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert walks("unidi", 2, 2) == [[rows]] * 4
    assert walks("bidi", 2, 2) == [[rows], [rows], [rows[::-1]], [rows[::-1]]]
    assert walks("cascade2d", 2, 3) == [
        [[(0, 0), (0, 1), (0, 2)], [(1, 0), (1, 1), (1, 2)]],
        [[(0, 2), (0, 1), (0, 0)], [(1, 2), (1, 1), (1, 0)]],
        [[(0, 0), (1, 0)], [(0, 1), (1, 1)], [(0, 2), (1, 2)]],
        [[(1, 0), (0, 0)], [(1, 1), (0, 1)], [(1, 2), (0, 2)]],
    ]


@pytest.mark.parametrize("routes", ROUTE_SETS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (3, 5), (9, 9)])
def test_every_set_is_drawn(routes, grid, tmp_path):
    png, svg = save_figure(route_figure(routes, *grid), tmp_path / "routes")
    with Image.open(png) as drawn:
        assert np.asarray(drawn.convert("L")).std() > 5  # not blank
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_figure_is_the_same_picture(tmp_path):
    picture = Image.new("RGB", (30, 20), (200, 80, 20))
    first, second = (save_figure(route_figure("cross2d", 2, 3, picture), tmp_path / name) for name in ("a", "b"))
    plain = save_figure(route_figure("cross2d", 2, 3), tmp_path / "c")
    for one, again, other in zip(first, second, plain, strict=True):  # PNG, then SVG
        assert one.read_bytes() == again.read_bytes() != other.read_bytes()


def test_a_large_grid_says_what_its_marks_are():
    def note(*grid):
        return route_figure("cross2d", *grid).get_supxlabel()

    assert note(9, 9) == "cross2d on a grid of 9 × 9; circle: first step, square: last; dotted: jumps"
    assert note(4, 4) == "cross2d on a grid of 4 × 4; dotted: jumps"
    assert note(1, 4) == "cross2d on a grid of 1 × 4"


def test_an_animation_has_a_frame_a_step_and_fills_the_grid(tmp_path):
    file = tmp_path / "walk.gif"
    assert save_route_animation("cross2d", 2, 3, file, panel=150) == 7
    with Image.open(file) as animation:
        assert animation.n_frames == 7
        filled = []
        for frame in range(7):
            animation.seek(frame)
            pixels = np.asarray(animation.convert("RGB")).astype(int)
            # viridis is never grey, paper and lines are
            filled.append(int((pixels.max(-1) - pixels.min(-1) > 40).sum()))
    assert filled[0] == 0
    assert filled == sorted(filled)
    assert filled[6] > 5 * filled[1]


def test_a_large_grid_takes_several_steps_a_frame(tmp_path):
    assert save_route_animation("bidi", 14, 14, tmp_path / "walk.gif", panel=60) == 65
    assert save_route_animation("cascade2d", 30, 20, tmp_path / "cascade.gif", panel=60) == 31  # all lines at once
    picture = Image.new("RGB", (30, 20))
    assert save_route_animation("cross2d", 128, 1, tmp_path / "line.gif", panel=60, picture=picture) == 65


def test_mistakes_name_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="unknown routes 'cross': choose one of cross2d, unidi, bidi, cascade2d"):
        route_walks("cross", 2, 2)
    with pytest.raises(ValueError, match="at least one row and one column, not 0 x 3"):
        route_walks("cross2d", 0, 3)
    with pytest.raises(ValueError, match="129 x 4 is too large to be drawn: at most 128"):
        route_figure("cross2d", 129, 4)
    with pytest.raises(ValueError, match="too large"):
        save_route_animation("cross2d", 129, 4, tmp_path / "walk.gif")
    assert not list(tmp_path.iterdir())
