"""Layers: shapes at awkward sizes, padding, initialisation, what the paper defines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vmamba.layers import DOWNSAMPLES, SS2D, SSM_INITS, SSM_OUT_NORMS, STEMS, STRIDES, VSSBlock, init_ssm_, make_mlp
from vmamba.layers.head import ClassifierHead
from vmamba.layers.norm import BranchNorm

SIZES = [(32, 32), (33, 47), (32, 100), (70, 54)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", STRIDES)
@pytest.mark.parametrize(("version", "divide"), [("v1", lambda n, p: n // p), ("v2", lambda n, p: -(-n // p))])
def test_the_stem_divides_the_image_by_its_patch_size(version, divide, patch, size) -> None:
    y = STEMS[version](3, 8, patch)(torch.randn(2, 3, *size))
    assert y.shape == (2, divide(size[0], patch), divide(size[1], patch), 8)


def test_stems_quarter_the_image_by_default() -> None:
    for stem in STEMS.values():
        assert stem(3, 8)(torch.randn(1, 3, 32, 32)).shape == (1, 8, 8, 8)


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 25), (1, 1)])
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_downsampling_keeps_odd_rows_and_columns(version, size) -> None:
    layer = DOWNSAMPLES[version](8, 16)
    y = layer(torch.randn(2, *size, 8))
    assert y.shape == (2, -(-size[0] // 2), -(-size[1] // 2), 16)


def test_patch_merging_pads_zeros_at_the_end_and_orders_rows_first() -> None:
    layer = DOWNSAMPLES["v1"](2, 4)
    layer.norm, layer.reduction = nn.Identity(), nn.Identity()
    x = torch.arange(1.0, 19.0).view(1, 3, 3, 2)
    y = layer(x)
    assert torch.equal(y[0, 0, 0], torch.cat([x[0, 0, 0], x[0, 1, 0], x[0, 0, 1], x[0, 1, 1]]))
    assert torch.equal(y[0, 1, 1], torch.cat([x[0, 2, 2], torch.zeros(6)]))
    assert torch.equal(y[0, 1, 0], torch.cat([x[0, 2, 0], torch.zeros(2), x[0, 2, 1], torch.zeros(2)]))


@pytest.mark.parametrize("name", SSM_OUT_NORMS)
def test_out_norms(name) -> None:
    torch.manual_seed(0)
    norm = SSM_OUT_NORMS[name](6)
    x = torch.randn(2, 5, 3, 6)
    normalised = F.layer_norm(x, (6,))

    def convolved(x):
        return F.conv2d(x.permute(0, 3, 1, 2), norm.conv.weight, padding=1, groups=6).permute(0, 2, 3, 1)

    expected = {
        "layernorm": lambda: normalised,
        "none": lambda: x,
        "dwconv3": lambda: convolved(x),
        "cnorm": lambda: convolved(normalised),
        "softmax": lambda: x.exp() / x.exp().sum((1, 2), keepdim=True),
        "sigmoid": lambda: x.sigmoid(),
    }[name]()
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("scheme", SSM_INITS)
def test_initialisations(scheme) -> None:
    torch.manual_seed(0)
    E, N, R = 64, 16, 4
    x_proj, dt_weight, dt_bias = torch.empty(4, R + 2 * N, E), torch.empty(4, E, R), torch.empty(4, E)
    A_log, D = torch.empty(4 * E, N), torch.empty(4 * E)
    init_ssm_(x_proj, dt_weight, dt_bias, A_log, D, scheme)
    assert torch.equal(D, torch.ones(4 * E))
    assert 0.9 * E**-0.5 < x_proj.abs().max() <= E**-0.5
    if scheme == "mamba":
        assert 0.9 * R**-0.5 < dt_weight.abs().max() <= R**-0.5
        delta = F.softplus(dt_bias)
        assert 1e-3 * 0.999 <= delta.min() < 2e-3
        assert 5e-2 < delta.max() <= 1e-1 * 1.001
        # log-uniform: as many below the geometric mean of the range as above it
        assert 0.4 < (delta < 1e-2).float().mean() < 0.6
        torch.testing.assert_close(A_log.exp(), torch.arange(1.0, N + 1).expand(4 * E, N))
    elif scheme == "rand":
        assert 0.09 < dt_weight.std() < 0.11
        assert 0.08 < dt_bias.std() < 0.12
        assert 0.95 < A_log.std() < 1.05
    else:
        assert torch.equal(A_log, torch.zeros(4 * E, N))
        for tensor in (dt_weight, dt_bias):
            assert tensor.min() >= 0
            assert 0.09 < tensor.max() <= 0.1


def test_ss2d_has_the_shapes_of_its_letters() -> None:
    layer = SS2D(32, d_state=3, ssm_ratio=1.5, gate=True)
    E, N, K, R = 48, 3, 4, 2
    assert layer.in_proj.weight.shape == (2 * E, 32)
    assert layer.x_proj_weight.shape == (K, R + 2 * N, E)
    assert layer.dt_weight.shape == (K, E, R)
    assert layer.dt_bias.shape == (K, E)
    assert layer.A_log.shape == (K * E, N)
    assert layer.D.shape == (K * E,)
    assert layer(torch.randn(2, 5, 3, 32)).shape == (2, 5, 3, 32)


def test_a_closed_gate_lets_nothing_through() -> None:
    layer = SS2D(8, gate=True, act="relu")
    with torch.no_grad():
        layer.in_proj.weight[8:] = 0
    assert not layer(torch.randn(1, 4, 4, 8)).any()


def test_gate_without_activation_is_linear_in_z() -> None:
    torch.manual_seed(0)
    layer = SS2D(8, gate=True, gate_act=False)
    x = torch.randn(1, 4, 4, 8)
    y = layer(x)
    with torch.no_grad():
        layer.in_proj.weight[8:] *= -2
    torch.testing.assert_close(layer(x), -2 * y)


def test_post_norm_normalises_what_comes_out() -> None:
    torch.manual_seed(0)
    ssm, mlp = nn.Linear(8, 8), make_mlp(8, 2.0)
    x = torch.randn(2, 3, 3, 8)
    before, after = VSSBlock(8, ssm, mlp), VSSBlock(8, ssm, mlp, post_norm=True)
    torch.testing.assert_close(before(x), (h := x + ssm(F.layer_norm(x, (8,)))) + mlp(F.layer_norm(h, (8,))))
    torch.testing.assert_close(after(x), (h := x + F.layer_norm(ssm(x), (8,))) + F.layer_norm(mlp(h), (8,)))


def test_gated_mlp_gates_the_first_half_by_the_second() -> None:
    mlp = make_mlp(8, 2.0, "gelu", gated=True)
    x = torch.randn(3, 8)
    a, z = mlp.fc1(x).chunk(2, -1)
    assert a.shape == (3, 16)
    torch.testing.assert_close(mlp(x), mlp.fc2(a * F.gelu(z)))


def test_head_pools_scores_and_maps() -> None:
    x = torch.randn(2, 3, 5, 8)
    head = ClassifierHead(8, 4)
    torch.testing.assert_close(head(x), head.fc(F.layer_norm(x, (8,)).mean((1, 2))))
    assert head(x, pre_logits=True).shape == (2, 8)
    assert ClassifierHead(8, 4, global_pool="")(x).shape == (2, 4, 3, 5)
    assert ClassifierHead(8, 0)(x).shape == (2, 8)


@pytest.mark.parametrize(("num_classes", "global_pool"), [(-1, None), (2.0, None), (3, "max")])
def test_head_refuses_and_stays_as_it_was(num_classes, global_pool) -> None:
    head = ClassifierHead(8, 4)
    fc = head.fc
    with pytest.raises(ValueError, match=r"num_classes|global_pool"):
        head.reset(num_classes, global_pool)
    assert head.fc is fc
    assert head.global_pool == "avg"


def test_blocks_keep_channels_last_without_copies() -> None:
    """What goes from layer to layer is dense in (B, H, W, C), so that nothing has to copy it."""
    seen = []

    def check(module, inputs, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            seen.append((type(module).__name__, output.is_contiguous()))

    layers = nn.Sequential(STEMS["v2"](3, 16), VSSBlock(16, SS2D(16), make_mlp(16, 4.0)), DOWNSAMPLES["v3"](16, 32))
    for module in layers.modules():
        if not isinstance(module, nn.Conv2d) or type(module) is not nn.Conv2d:
            module.register_forward_hook(check)
    layers(torch.randn(2, 3, 48, 40))
    assert len(seen) > 10
    assert [name for name, contiguous in seen if not contiguous] == []


def test_a_branch_norm_gives_autocasts_dtype() -> None:
    norm = BranchNorm(8)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 4, 8)
    plain = torch.nn.functional.layer_norm(x, (8,), norm.weight, norm.bias)
    assert torch.equal(norm(x), plain)
    with torch.autocast("cpu", torch.bfloat16):
        low = norm(x)
        assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("autocast", "stream"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_the_residual_stream_is_bf16_under_bf16_and_fp32_under_fp16(autocast, stream) -> None:
    layers = nn.Sequential(STEMS["v2"](3, 8), VSSBlock(8, SS2D(8), make_mlp(8, 2.0)), DOWNSAMPLES["v3"](8, 16))
    x = torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", autocast):
        for layer in layers:
            x = layer(x)
            assert x.dtype == stream
    layers.bfloat16()
    assert layers(torch.randn(1, 3, 16, 16).bfloat16()).dtype == torch.bfloat16
