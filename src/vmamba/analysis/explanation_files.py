"""What explains a network, written down: figures as PNG and SVG, numbers as CSV and JSON, arrays as NPZ."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .._files import write_aside, write_text
from .attention import AttentionMap, StateDecay, attention_map, scan_of_layer, ss2d_layer, state_decay
from .explanation_pictures import QUANTITIES, attention_figure, decay_figure, receptive_field_figure, route_names
from .figures import save_figure
from .receptive_field import ReceptiveField
from .route_pictures import route_figure, save_route_animation

__all__ = ["Field", "LayerAttention", "layer_attention", "save_attention", "save_receptive_fields", "save_routes"]


class Field(NamedTuple):
    """A receptive field and whose it is. state: of the weights, such as "trained" or "before training"."""

    model: str
    state: str
    field: ReceptiveField


@dataclasses.dataclass(frozen=True)
class LayerAttention:
    """What one pixel of one layer reads.

    layer: name of the SS2D layer. error: largest difference between weights x input + skip and what the scan gave at
    that pixel, relative to the largest of it.
    """

    layer: str
    map: AttentionMap
    decay: StateDecay
    error: float

    def table(self) -> list[dict[str, Any]]:
        """A row for each route and, where there is one, for all of them together.

        share: of the four routes' contribution. cells_50, cells_99: share of the grid that the fewest cells holding
        50 % and 99 % of the route's contribution make up. half_life: in steps, see `AttentionMap.half_life`.
        """
        by_route = self.map.by_route().double()
        total = float(by_route.sum())
        maps = [
            *zip(route_names(self.map.routes), by_route, self.map.half_life(), strict=True),
            *([] if self.map.routes == "cascade2d" else [("all routes", self.map.all_routes().double(), None)]),
        ]
        height, width = by_route.shape[1:]
        where = {"layer": self.layer, "rows": height, "columns": width}
        where |= {"row": self.map.pixel[0], "column": self.map.pixel[1]}
        return [
            where
            | {
                "route": name,
                "share": float(values.sum()) / total if half_life is not None else None,
                "cells_50": _fewest(values, 0.5),
                "cells_99": _fewest(values, 0.99),
                "half_life": half_life,
            }
            for name, values, half_life in maps
        ]


def layer_attention(model: nn.Module, image: Tensor, layer: str, place: tuple[float, float]) -> LayerAttention:
    """What the pixel of a layer reads that lies at a place of the picture.

    Args:
        model, image, layer: as in `scan_of_layer`.
        place: (down, right) in shares of the picture's height and width, each in [0, 1).

    Raises:
        ValueError: as `scan_of_layer`, or the place lies outside.
    """
    if not all(0 <= share < 1 for share in place):
        raise ValueError(f"the place {place} lies outside the picture: it is (down, right) in shares of 0 to below 1")
    layer = ss2d_layer(model, layer)
    scan = scan_of_layer(model, image, layer)
    pixel = tuple(int(share * side) for share, side in zip(place, scan.grid, strict=True))
    found = attention_map(scan, pixel)
    given = scan.output[pixel].to(scan.code.dtype)
    error = float((found.output() - given).abs().max() / given.abs().max())
    return LayerAttention(layer, found, state_decay(scan, pixel), error)


def save_receptive_fields(rows: Sequence[Sequence[Field | None]], out: str | Path) -> list[Path]:
    """Write erf.png, erf.svg, erf.csv (areas), erf.json (the same and the settings), erf.npz (the maps) into `out`.

    Args:
        rows: of panels of the figure; None leaves a gap.

    Raises:
        OSError: a file could not be written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    panels = [[f and (f"{f.model}\n{f.state}, {f.field.layer}", f.field) for f in row] for row in rows]
    fields = [f for row in rows for f in row if f]
    table, described = [], []
    for model, state, field in fields:
        areas = [area._asdict() for area in field.areas()]
        table += [{"model": model, "state": state, "layer": field.layer, "images": field.images, **a} for a in areas]
        facts = {name: value for name, value in vars(field).items() if name != "contribution"}
        size = list(field.contribution.shape)
        described.append({"model": model, "state": state, "image_size": size, **facts, "areas": areas})
    _write_csv(table, out / "erf.csv")
    write_text(json.dumps(described, indent=2) + "\n", out / "erf.json")
    _write_arrays({f"{f.model}, {f.state}": f.field.contribution for f in fields}, out / "erf.npz")
    figures = save_figure(receptive_field_figure(panels), out / "erf")
    return [*figures, out / "erf.csv", out / "erf.json", out / "erf.npz"]


def save_attention(
    picture: Image.Image, name: str, layers: Sequence[LayerAttention], out: str | Path, about: dict[str, Any]
) -> list[Path]:
    """Write what the layers read at one place of a picture into `out`, under names that start with `name`.

    .activation, .attention, .similarity, .decay: the maps over the picture, PNG and SVG. .decay_by_steps: curves, PNG,
    SVG and CSV. .csv: `LayerAttention.table`. .json: the same and `about`. .npz: the maps, fp32.

    Raises:
        OSError: a file could not be written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    maps = [(layer.layer.removesuffix(".ssm"), layer.map) for layer in layers]
    for quantity in QUANTITIES:
        written += save_figure(attention_figure(picture, maps, quantity), out / f"{name}.{quantity}")
    decays = [(layer.layer.removesuffix(".ssm"), layer.decay) for layer in layers]
    written += save_figure(decay_figure(decays, layers[0].map.routes), out / f"{name}.decay_by_steps")
    table = [row for layer in layers for row in layer.table()]
    _write_csv(table, out / f"{name}.csv")
    _write_csv([row for layer in layers for row in _decay_table(layer)], out / f"{name}.decay_by_steps.csv")
    errors = {layer.layer: layer.error for layer in layers}
    # an endless half-life is no number of JSON's
    rows = [row | {"half_life": _finite(row["half_life"])} for row in table]
    write_text(json.dumps({**about, "error": errors, "layers": rows}, indent=2) + "\n", out / f"{name}.json")
    _write_arrays({f"{layer.layer}/{key}": a for layer in layers for key, a in _arrays(layer)}, out / f"{name}.npz")
    numbers = (f"{name}.csv", f"{name}.decay_by_steps.csv", f"{name}.json", f"{name}.npz")
    return [*written, *(out / file for file in numbers)]


def save_routes(
    routes: str, height: int, width: int, out: str | Path, picture: Image.Image | None = None, panel: int = 200
) -> list[Path]:
    """Write the figure of a set of routes, PNG and SVG, and its animation, GIF, into `out`, named after the set.

    Raises:
        ValueError: as `route_figure`. OSError: a file could not be written.
    """
    figure = route_figure(routes, height, width, picture)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    animation = out / f"{routes}.gif"
    save_route_animation(routes, height, width, animation, picture=picture, panel=panel)
    return [*save_figure(figure, out / routes), animation]


def _fewest(values: Tensor, share: float) -> float:
    cumulated = values.flatten().sort(descending=True).values.cumsum(0)
    if float(cumulated[-1]) == 0:
        return 0.0
    count = int(torch.searchsorted(cumulated, share * float(cumulated[-1]) * (1 - 1e-12))) + 1
    return count / values.numel()


def _decay_table(layer: LayerAttention) -> list[dict[str, Any]]:
    decay = layer.decay
    return [
        {"layer": layer.layer, "route": name, "steps": int(step), "mean": mean, "low": low, "high": high}
        for k, name in enumerate(route_names(layer.map.routes))
        for step, mean, low, high in zip(
            decay.steps, *(part[k].tolist() for part in (decay.mean, decay.low, decay.high)), strict=True
        )
        if mean == mean  # NaN: before the route's first pixel
    ]


def _arrays(layer: LayerAttention) -> list[tuple[str, np.ndarray]]:
    found = layer.map
    arrays = [("similarity", found.similarity), ("decay", found.decay)]
    for key, weights in (("activation", False), ("attention", True)):
        arrays.append((key, found.by_route(weights=weights)))
        if found.routes != "cascade2d":
            arrays.append((f"{key}_all_routes", found.all_routes(weights=weights)))
    return [(key, tensor.float().cpu().numpy()) for key, tensor in arrays]


def _finite(number: float | None) -> float | None:
    return None if number is None or number == float("inf") else number


def _write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
    )
    write_text(text.getvalue(), path)


def _write_arrays(arrays: dict[str, np.ndarray], path: Path) -> None:
    def write(aside: Path) -> None:
        with open(aside, "wb") as file:  # given a name, NumPy would append .npz to it
            np.savez_compressed(file, **arrays)

    write_aside(path, write)
