"""The scan's weights: closed forms, the scan's own output, autograd, real networks and photos."""

from __future__ import annotations

import io
import math
import zipfile

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from vmamba import VMamba
from vmamba.analysis import (
    attention_map,
    attention_matrix,
    routed_scan,
    scan_attention,
    scan_of_layer,
    ss2d_layers,
    state_decay,
)
from vmamba.data import Preprocessing, evaluation_transform
from vmamba.ops import selective_scan
from vmamba.ops.reference import ss2d_scan_reference

PATTERNS = ("cross2d", "unidi", "bidi", "cascade2d")
TOLERANCE = 1e-5  # of the largest output


def operands(height: int, width: int, E: int = 6, N: int = 1, R: int = 2, dtype=torch.float32) -> list[torch.Tensor]:
    """x, x_proj_weight, dt_weight, dt_bias, A, D of an SS2D."""
    generator = torch.Generator().manual_seed(height * 100 + width + N)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = (
        normal(1, height, width, E),
        normal(4, R + 2 * N, E) / E**0.5,
        normal(4, E, R),
        normal(4, E) - 1,
        -torch.exp(normal(4 * E, N)),
        normal(4 * E),
    )
    return [t.to(dtype) for t in tensors]


def steps_between(k: int, pixel: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """(H, W): how many steps of route k of cross2d after each pixel it comes to `pixel`, by arithmetic on places."""
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    place = rows * grid[1] + columns if k % 2 == 0 else columns * grid[0] + rows
    steps = place[pixel] - place
    return steps if k < 2 else -steps


# closed forms


def test_with_constant_delta_a_scan_decays_by_exp_of_delta_A_a_step():
    delta, a, b, c = 0.3, 0.7, 2.0, -1.5
    length, step = 12, 9
    shape = (1, 1, length)
    weights = scan_attention(
        torch.full(shape, delta, dtype=torch.float64),
        torch.tensor([[-a]], dtype=torch.float64),
        torch.full((1, 1, 1, length), b, dtype=torch.float64),
        torch.full((1, 1, 1, length), c, dtype=torch.float64),
        step,
    )
    expected = [c * b * delta * math.exp(-a * delta * (step - i)) if i <= step else 0 for i in range(length)]
    assert weights[0, 0].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pixel", [(0, 0), (2, 3), (4, 6), (4, 0)])
def test_with_constant_delta_every_route_decays_with_its_own_distance(pixel):
    x, x_proj, dt_weight, _, A, D = operands(5, 7, N=2, dtype=torch.float64)
    bias = torch.full((4, 6), 0.4, dtype=torch.float64)
    A = A[:1].expand(24, -1)  # the same two states for all channels and routes
    scan = routed_scan(x, x_proj, torch.zeros_like(dt_weight), bias, A, D)
    found = attention_map(scan, pixel)
    delta = math.log1p(math.exp(0.4))
    for k in range(4):
        steps = steps_between(k, pixel, (5, 7))
        decay = torch.exp(delta * A[0] * steps[..., None])  # (H, W, N)
        expected = torch.where(steps >= 0, decay.mean(-1), 0)
        torch.testing.assert_close(found.decay[k], expected, rtol=1e-12, atol=1e-15)
        B, C = (x[0] @ x_proj[k, 2:].t()).split(2, dim=-1)
        weight = torch.where(steps >= 0, (decay * B * C[pixel]).sum(-1) * delta, 0)
        torch.testing.assert_close(found.weights[k], weight.expand(6, 5, 7), rtol=1e-10, atol=1e-14)
        similarity = torch.where(steps >= 0, (B * C[pixel]).sum(-1), 0)
        torch.testing.assert_close(found.similarity[k], similarity, rtol=1e-12, atol=1e-14)
    along = state_decay(scan, pixel, steps=6)
    expected = torch.exp(delta * A[0] * torch.arange(6)[:, None]).mean(-1)
    for k in range(4):
        walked = min(6, int(steps_between(k, pixel, (5, 7)).max()) + 1)
        torch.testing.assert_close(along.mean[k, :walked], expected[:walked], rtol=1e-12, atol=0)
        assert along.mean[k, walked:].isnan().all()


def test_the_half_life_is_that_of_the_exponential():
    x, x_proj, dt_weight, _, _, D = operands(1, 40)
    delta = math.log1p(math.exp(-1.0))
    A = torch.full((24, 1), -0.25)
    scan = routed_scan(x, x_proj, torch.zeros_like(dt_weight), torch.full((4, 6), -1.0), A, D)
    half_life = math.ceil(math.log(2) / (0.25 * delta))
    found = attention_map(scan, (0, 35))
    assert found.steps == (36, 36, 5, 5)
    assert found.half_life() == [half_life, half_life, math.inf, math.inf]  # the reversed routes have come four steps
    decay = state_decay(scan, (0, 35))
    torch.testing.assert_close(decay.low[:2], decay.high[:2], equal_nan=True)


# the scan's own output


@pytest.mark.parametrize("routes", PATTERNS)
@pytest.mark.parametrize("N", [1, 16])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 1), (5, 8), (13, 4)])
def test_weights_times_input_are_the_scans_output(routes, N, height, width):
    scan = routed_scan(*operands(height, width, N=N), routes=routes)
    assert scan.output.dtype == torch.float32
    largest = scan.output.abs().max()
    for pixel in {(0, 0), (height // 2, width // 3), (height - 1, width - 1)}:
        found = attention_map(scan, pixel)
        assert found.weights.dtype == torch.float32
        difference = (found.output() - scan.output[pixel]).abs().max()
        assert difference <= TOLERANCE * largest


@pytest.mark.parametrize("routes", PATTERNS[:3])
def test_the_whole_matrix_times_input_is_the_whole_output(routes):
    x, *weights, D = operands(6, 5, N=4)
    scan = routed_scan(x, *weights, D, routes=routes)
    matrix = attention_matrix(scan)
    assert matrix.shape == (4, 6, 30, 30)
    y = torch.einsum("keqi,ie->qe", matrix, x[0].flatten(0, 1)) + x[0].flatten(0, 1) * D.unflatten(0, (4, 6)).sum(0)
    assert (y - scan.output.flatten(0, 1)).abs().max() <= TOLERANCE * scan.output.abs().max()
    some = attention_matrix(scan, channels=[4, 1])
    torch.testing.assert_close(some, matrix[:, [4, 1]])
    # routes look back only: row-major forward is lower triangular, its reverse upper
    assert matrix[0].triu(1).abs().max() == 0
    assert routes == "unidi" or matrix[3 if routes == "bidi" else 2].tril(-1).abs().max() == 0


def test_the_cascades_halves_are_each_exact():
    x, x_proj, dt_weight, dt_bias, A, D = operands(4, 6, N=2, dtype=torch.float64)
    scan = routed_scan(x, x_proj, dt_weight, dt_bias, A, D, routes="cascade2d")
    rows = F.layer_norm(x[0], (6,), eps=1e-5)
    torch.testing.assert_close(scan.sources[0], rows)
    made = torch.zeros(4, 6, 6, dtype=torch.float64)
    for pixel in ((r, c) for r in range(4) for c in range(6)):
        found = attention_map(scan, pixel)
        outside = torch.ones(4, 6, dtype=torch.bool)
        outside[pixel[0]] = False
        assert found.weights[:2][..., outside].abs().max() == 0  # a row reads itself alone
        made[pixel] = found.contributions()[:2].sum((0, 2, 3)) + found.skip[:2].sum(0)
    torch.testing.assert_close(scan.sources[2], F.layer_norm(made, (6,), eps=1e-5))
    # added as it comes: at column 1 the backward scan has read the last two columns
    read = attention_map(scan, (2, 1)).weights[1, 0]
    assert read.nonzero().tolist() == [[2, 4], [2, 5]]
    with pytest.raises(ValueError, match="cascade2d has no map of all routes"):
        attention_map(scan, (2, 1)).all_routes()


# autograd


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("N", [1, 16])
def test_a_plain_scan_with_groups_agrees_with_autograd(groups, N):
    torch.manual_seed(0)
    batch, channels, length = 2, 6, 11
    u = torch.randn(batch, channels, length, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(batch, channels, length, dtype=torch.float64)
    A = -torch.rand(channels, N, dtype=torch.float64) - 0.1
    B, C = torch.randn(2, batch, groups, N, length, dtype=torch.float64)
    bias = torch.randn(channels, dtype=torch.float64)
    y = selective_scan(u, delta, A, B, C, delta_bias=bias, delta_softplus=True)
    for step in (0, 6, 10):
        (gradient,) = torch.autograd.grad(y[:, :, step].sum(), u, retain_graph=True)
        weights = scan_attention(delta, A, B, C, step, bias, softplus=True)
        torch.testing.assert_close(weights, gradient, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close((weights * u).sum(-1), y[..., step], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("routes", PATTERNS[:3])
@pytest.mark.parametrize("N", [1, 16])
def test_every_route_agrees_with_autograd(routes, N):
    x, x_proj, dt_weight, dt_bias, A, D = operands(4, 7, N=N, dtype=torch.float64)
    scan = routed_scan(x, x_proj, dt_weight, dt_bias, A, D, routes=routes)
    p = F.linear(x, x_proj.flatten(0, 1))  # delta, B and C do not move: the scan is linear in x then
    for pixel in ((0, 0), (2, 3), (3, 6)):
        found = attention_map(scan, pixel)
        for k in range(4):
            alone = p.unflatten(-1, (4, 2 + 2 * N)).clone()
            silent = [j for j in range(4) if j != k]
            alone[..., silent, 2 + N :] = 0  # C of the other routes
            u = x.clone().requires_grad_()
            y = ss2d_scan_reference(u, alone.flatten(-2), dt_weight, dt_bias, A, torch.zeros_like(D), routes)
            (gradient,) = torch.autograd.grad(y[0][pixel].sum(), u)
            torch.testing.assert_close(found.weights[k], gradient[0].permute(2, 0, 1), rtol=1e-9, atol=1e-13)


# networks and photos


@pytest.mark.parametrize("routes", PATTERNS)
@pytest.mark.parametrize("N", [1, 16])
def test_every_block_of_a_network(routes, N):
    torch.manual_seed(0)
    model = VMamba(dims=8, depths=(1, 2, 1, 1), num_classes=3, d_state=N, routes=routes, ssm_ratio=2.0)
    image = torch.randn(1, 3, 97, 150)
    layers = ss2d_layers(model)
    assert layers == [f"stages.{i}.blocks.{j}.ssm" for i, j in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0))]
    for layer in layers:
        scan = scan_of_layer(model, image, layer)
        height, width = scan.grid
        assert height != width
        for pixel in ((0, width - 1), (height // 2, width // 3)):
            difference = (attention_map(scan, pixel).output() - scan.output[pixel]).abs().max()
            assert difference <= TOLERANCE * scan.output.abs().max()


@pytest.mark.parametrize("name", ["vanilla_vmamba_tiny", "vmamba_tiny_s1l8"])
def test_released_variants(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    scan = scan_of_layer(model, torch.randn(1, 3, 64, 96), "stages.1.blocks.0")
    found = attention_map(scan, (3, 5))
    assert (found.output() - scan.output[3, 5]).abs().max() <= TOLERANCE * scan.output.abs().max()


@pytest.mark.parametrize("out_norm", ["none", "dwconv3", "cnorm", "softmax", "sigmoid"])
def test_other_output_norms_and_no_convolution(out_norm):
    torch.manual_seed(0)
    model = VMamba(dims=8, depths=(1, 1, 1, 1), ssm_out_norm=out_norm, ssm_conv=0, ssm_act="gelu", ssm_gate=True)
    scan = scan_of_layer(model, torch.randn(1, 3, 64, 64), "stages.0.blocks.0")
    found = attention_map(scan, (9, 2))
    assert (found.output() - scan.output[9, 2]).abs().max() <= TOLERANCE * scan.output.abs().max()


def test_photos(shared):
    archive = shared / "data" / "demo_photos" / "demo_photos.zip"
    if not archive.is_file():
        pytest.skip(f"optional data: there is no {archive}")
    torch.manual_seed(0)
    model = timm.create_model("vmamba_nano")
    with zipfile.ZipFile(archive) as files:
        for name in ("rocket.jpg", "chelsea_cat.webp", "zidane_people.jpg"):
            photo = Image.open(io.BytesIO(files.read(name))).convert("RGB")
            size = tuple(round(160 * side / min(photo.size)) for side in (photo.height, photo.width))
            whole = Preprocessing(image_size=size, crop_pct=1.0, crop_mode="squash")
            image = evaluation_transform(whole)(photo)[None]
            for layer in ss2d_layers(model):
                scan = scan_of_layer(model, image, layer)
                pixel = (scan.grid[0] // 2, scan.grid[1] // 3)
                found = attention_map(scan, pixel)
                assert (found.output() - scan.output[pixel]).abs().max() <= TOLERANCE * scan.output.abs().max()
                assert float(found.decay.max()) == 1.0


def test_a_pixel_of_a_large_grid_takes_memory_linear_in_its_pixels():
    scan = routed_scan(*operands(256, 256, E=4, N=16))  # a stage of 1024 px: L x L would be 17 GB a channel
    found = attention_map(scan, (128, 100))
    assert found.weights.shape == (4, 4, 256, 256)
    assert (found.output() - scan.output[128, 100]).abs().max() <= TOLERANCE * scan.output.abs().max()


def test_maps_are_sums_of_contributions():
    scan = routed_scan(*operands(5, 4))
    found = attention_map(scan, (1, 2))
    contributions = found.weights.double() * scan.sources[0].permute(2, 0, 1)
    torch.testing.assert_close(found.by_route().double(), contributions.abs().mean(1), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.all_routes().double(), contributions.sum(0).abs().mean(0), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.by_route(weights=True), found.weights.abs().mean(1))
    torch.testing.assert_close(found.all_routes(weights=True), found.weights.sum(0).abs().mean(0))


def test_the_model_is_left_as_it_was(tiny):
    tiny.train()
    tiny.stages[2].eval()
    modes = [module.training for module in tiny.modules()]
    image, random = torch.randn(1, 3, 64, 64), torch.get_rng_state()
    scan_of_layer(tiny, image, "stages.0.blocks.0")
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tiny.parameters())
    with pytest.raises(ValueError, match="expected images"):
        scan_of_layer(tiny, torch.randn(1, 2, 64, 64), "stages.0.blocks.0")
    assert [module.training for module in tiny.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())


def test_mistakes_name_the_remedy(tiny):
    image = torch.randn(1, 3, 64, 96)
    with pytest.raises(ValueError, match=r"no SS2D layer 'stages\.2\.block\.0'; near names: stages\.2\.blocks\.0\.ssm"):
        scan_of_layer(tiny, image, "stages.2.block.0")
    with pytest.raises(ValueError, match="one image is looked at"):
        scan_of_layer(tiny, image.expand(2, -1, -1, -1), "stages.2.blocks.0")
    with pytest.raises(ValueError, match="ResNet has no SS2D layer"):
        ss2d_layers(timm.create_model("resnet18", device="meta"))
    scan = scan_of_layer(tiny, image, "stages.0.blocks.0")
    for pixel in ((16, 0), (0, 24), (-1, 3)):
        with pytest.raises(ValueError, match="outside the layer's grid of 16 x 24: rows are 0 to 15, columns 0 to 23"):
            attention_map(scan, pixel)
        with pytest.raises(ValueError, match="outside the layer's grid"):
            state_decay(scan, pixel)
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        state_decay(scan, (0, 0), 0)
    with pytest.raises(ValueError, match="channels are 0 to 7, not 8"):
        attention_matrix(scan, channels=[8])
    with pytest.raises(ValueError, match="name fewer channels"):
        attention_matrix(routed_scan(*operands(64, 64)))
    one = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match="steps 0 to 2, not 3"):
        scan_attention(one, -torch.ones(2, 1), torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 3), 3)
    with pytest.raises(ValueError, match=r"B and C \(batch, K, N, L\) are needed"):
        scan_attention(one, -torch.ones(2, 1), torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3), 1)
