"""The scan routes over a grid of pixels: a figure, PNG and SVG, and an animated GIF."""

from __future__ import annotations

import argparse

from .networks import check_drawing

NAME = "routes"
HELP = "draw and animate the scan routes over a grid"
EXAMPLES = """examples:
  vmamba routes
  vmamba routes --grid 4 7 --image photo.jpg
  vmamba routes cross2d unidi bidi cascade2d --grid 5 5 --out figures"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "routes", nargs="*", metavar="ROUTES", help="some of cross2d (the default), unidi, bidi, cascade2d"
    )
    parser.add_argument(
        "--grid", nargs=2, type=int, default=(4, 4), metavar=("ROWS", "COLUMNS"), help="cells (default 4 4)"
    )
    parser.add_argument("--image", metavar="FILE", help="a picture to draw in the cells")
    parser.add_argument(
        "--panel", type=int, default=200, metavar="PX", help="width of a route in the GIF (default 200)"
    )
    parser.add_argument("--out", default="routes", metavar="DIR", help="where to write (default routes/)")


def run(options: argparse.Namespace) -> None:
    from ..analysis.explanation_files import save_routes
    from ..analysis.route_pictures import route_walks
    from ..data import read_image

    check_drawing(options.out)
    if options.panel < 50:
        raise ValueError(f"--panel must be at least 50 px, not {options.panel}")
    sets = options.routes or ["cross2d"]
    for routes in sets:
        route_walks(routes, *options.grid)  # refuses what cannot be before anything is written
    picture = read_image(options.image) if options.image else None
    for routes in sets:
        for path in save_routes(routes, *options.grid, options.out, picture, options.panel):
            print(path)
