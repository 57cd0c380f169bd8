from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from vmamba.ops.routes import ROUTES, Route, check_routes, merge_routes, route_indices, scan_routes


@pytest.mark.parametrize("routes", ROUTES)
def test_routes_walk_and_merge_as_the_official_code(golden, routes):
    tensors = load_file(golden / "ops.safetensors")
    image = tensors["scan.input"].permute(0, 2, 3, 1)
    _, height, width, _ = image.shape
    walks = scan_routes(image, routes)
    assert torch.equal(walks.transpose(2, 3), tensors[f"scan.{routes}"])
    scaled = walks * torch.tensor([1.0, 10, 100, 1000]).view(1, 4, 1, 1)
    merged = merge_routes(scaled, height, width, routes)
    torch.testing.assert_close(
        merged.permute(0, 3, 1, 2).flatten(2), tensors[f"merge.{routes}"].flatten(2), rtol=0, atol=0
    )


@pytest.mark.parametrize("routes", ROUTES)
def test_merge_is_the_adjoint_of_scan(routes):
    x, y = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 4, 15, 4, dtype=torch.float64)
    torch.testing.assert_close((scan_routes(x, routes) * y).sum(), (x * merge_routes(y, 3, 5, routes)).sum())


def test_indices_of_a_small_grid():
    assert route_indices(Route("row", False), 2, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert route_indices(Route("column", False), 2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert route_indices(Route("column", True), 2, 3).tolist() == [5, 2, 4, 1, 3, 0]


@pytest.mark.parametrize("routes", ROUTES)
def test_forward_routes_come_first_and_reversed_ones_repeat_their_orders(routes):
    # backends number route k = direction * J + j
    table = ROUTES[routes]
    directions = len({route.reverse for route in table})
    half = len(table) // directions
    assert not any(route.reverse for route in table[:half])
    assert [route.order for route in table[:half]] == [route.order for route in table[-half:]]


def test_unknown_routes_are_named_with_the_choices():
    with pytest.raises(ValueError, match="'spiral'.*cross2d"):
        check_routes("spiral")
