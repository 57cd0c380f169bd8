"""The joined operators of training: outputs and every gradient against fp64; kernels are tested in their own files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vmamba.ops import joining, training

from .oracle import TOLERANCE, error

NAMES = ("x", "norm_weight", "norm_bias", "weight1", "bias1", "weight2", "bias2")
EPS = 1e-5


def problem(dtype=torch.float64, C=32, N=64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = (
        2 * draw(3, 4, 5, C) + 0.5, 1 + 0.2 * draw(C), 0.2 * draw(C),
        draw(N, C) * C**-0.5, 0.3 * draw(N), draw(C, N) * N**-0.5, 0.3 * draw(C),
    )  # fmt: skip
    return [t.to(dtype) for t in tensors], torch.tensor([0.0, 1.25, 1.0]), draw(3, 4, 5, C)


def layer_by_layer(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale):
    h = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS), weight1, bias1)
    return x + F.linear(F.gelu(h), weight2, bias2) * (1 if scale is None else scale.to(x.dtype).view(-1, 1, 1, 1))


def joined(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale, dtype):
    return training.norm_mlp_kept(x, norm_weight, norm_bias, EPS, weight1, bias1, weight2, bias2, scale, dtype)


def results(function, tensors, gout, *args):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, *args)
    return out.detach(), *torch.autograd.grad(out, leaves, gout.to(out.dtype))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_output_and_gradients(dtype, scaled):
    """Within the table, or within twice what torch's own layers lose in that dtype."""
    tensors, scale, gout = problem(dtype)
    scale = scale if scaled else None
    wanted = results(layer_by_layer, [t.double() for t in tensors], gout.to(dtype).double(), scale)
    plain = results(layer_by_layer, tensors, gout, scale)
    found = results(joined, tensors, gout, scale, dtype)
    for name, out, by_layers, exact in zip(("out", *NAMES), found, plain, wanted, strict=True):
        assert out.dtype == dtype
        assert error(out, exact) <= max(TOLERANCE[dtype], 2 * error(by_layers, exact)), name


def test_weights_of_another_dtype_get_gradients_in_theirs():
    tensors, scale, gout = problem(torch.float32)
    wanted = results(layer_by_layer, [t.double() for t in tensors], gout, scale)
    found = results(joined, [tensors[0].bfloat16(), *tensors[1:]], gout, scale, torch.bfloat16)
    assert [t.dtype for t in found] == [torch.bfloat16] * 2 + [torch.float32] * 6
    assert all(error(out, exact) < 1e-2 for out, exact in zip(found, wanted, strict=True))


def test_an_image_left_out_stays_what_it_was():
    tensors, scale, _ = problem(torch.float32)
    out = joined(*tensors, scale, torch.float32)
    assert torch.equal(out[0], tensors[0][0])


def test_second_derivatives_are_refused():
    tensors, _, _ = problem(torch.float32)
    tensors[0].requires_grad_()
    (gx,) = torch.autograd.grad(joined(*tensors, None, torch.float32).sum(), tensors[0], create_graph=False)
    assert gx.shape == tensors[0].shape
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(joined(*tensors, None, torch.float32).sum(), tensors[0], create_graph=True)


def test_opcheck():
    tensors, scale, _ = problem(torch.float32)
    torch.library.opcheck(torch.ops.vmamba.norm_mlp_kept, (*tensors[:3], EPS, *tensors[3:], scale, torch.bfloat16))


def test_compiled_without_breaks_it_gives_the_same_gradients():
    tensors, scale, gout = problem(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(joined, fullgraph=True, backend="aot_eager")
    for out, wanted in zip(
        results(compiled, tensors, gout, scale, torch.float32),
        results(joined, tensors, gout, scale, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(out, wanted)


def test_they_are_for_training_in_half_precision_on_devices_with_kernels(monkeypatch):
    x = torch.zeros(2, 3, 96, dtype=torch.bfloat16)
    assert joining.training_dtype(x) is None  # the CPU has none
    table = joining.BACKENDS
    monkeypatch.setitem(table, "portable", table["portable"]._replace(joined=training))
    assert joining.training_dtype(x) == torch.bfloat16
    assert joining.training_dtype(x.float()) is None
    with torch.no_grad():
        assert joining.training_dtype(x) is None


CONV_NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias")


def conv_problem(dtype=torch.float64, C=5, C_out=12):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = (draw(2, C, 7, 10), draw(C_out, C, 3, 3) / 3, draw(C_out), 1 + 0.2 * draw(C_out), 0.2 * draw(C_out))
    return [t.to(dtype) for t in tensors], draw(2, 4, 5, C_out)


def conv_by_layers(x, weight, bias, norm_weight, norm_bias, gelu):
    y = F.conv2d(x, weight, bias, stride=2, padding=1).permute(0, 2, 3, 1)
    y = F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, EPS)
    return F.gelu(y) if gelu else y


def conv_joined(x, weight, bias, norm_weight, norm_bias, gelu, dtype):
    return training.conv_norm_kept(x, weight, bias, norm_weight, norm_bias, EPS, gelu, dtype, dtype)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_convolution_output_and_gradients(dtype, gelu):
    tensors, gout = conv_problem(dtype)
    wanted = results(conv_by_layers, [t.double() for t in tensors], gout.to(dtype).double(), gelu)
    plain = results(conv_by_layers, tensors, gout, gelu)
    found = results(conv_joined, tensors, gout, gelu, dtype)
    for name, out, by_layers, exact in zip(("out", *CONV_NAMES), found, plain, wanted, strict=True):
        assert out.dtype == dtype
        assert error(out, exact) <= max(TOLERANCE[dtype], 2 * error(by_layers, exact)), name


def test_convolution_of_an_image_without_a_gradient():
    tensors, gout = conv_problem(torch.float32)
    leaves = [t.requires_grad_() for t in tensors[1:]]
    out = conv_joined(tensors[0].detach(), *leaves, True, torch.float32)
    wanted = torch.autograd.grad(conv_by_layers(tensors[0].detach(), *leaves, True), leaves, gout.float())
    for found, exact in zip(torch.autograd.grad(out, leaves, gout.float()), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gelu", [False, True])
def test_convolution_opcheck_and_compiled(gelu):
    tensors, gout = conv_problem(torch.float32)
    torch.library.opcheck(torch.ops.vmamba.conv_norm_kept, (*tensors, EPS, gelu, torch.bfloat16, torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(conv_joined, fullgraph=True, backend="aot_eager")
    for out, wanted in zip(
        results(compiled, tensors, gout, gelu, torch.float32),
        results(conv_joined, tensors, gout, gelu, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(out, wanted)
