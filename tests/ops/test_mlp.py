"""The joined MLP: what it computes and every gradient against fp64; its kernels are tested in test_triton_dense.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vmamba.ops import mlp

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
    return mlp.norm_mlp_kept(x, norm_weight, norm_bias, EPS, weight1, bias1, weight2, bias2, scale, dtype)


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


def test_it_is_for_training_in_half_precision_on_devices_with_kernels(monkeypatch):
    x = torch.zeros(2, 3, 96, dtype=torch.bfloat16)
    assert mlp.training_dtype(x, 384) is None  # the CPU has none
    table = mlp.BACKENDS
    monkeypatch.setitem(table, "portable", table["portable"]._replace(joined=mlp))
    assert mlp.training_dtype(x, 384) == torch.bfloat16
    assert mlp.training_dtype(x.float(), 384) is None
    assert mlp.training_dtype(torch.zeros(2, 384, dtype=torch.bfloat16), 1536) is None
    with torch.no_grad():
        assert mlp.training_dtype(x, 384) is None
