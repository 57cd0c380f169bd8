from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vmamba.ops import depthwise_conv3x3
from vmamba.ops.dispatch import BACKENDS
from vmamba.ops.library import DepthwiseConv3x3


def arguments(B=2, H=5, W=6, E=4, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return randn(B, H, W, E), randn(E, 1, 3, 3), randn(E) if bias else None


def by_torch(x, weight, bias, activation):
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[3]).permute(0, 2, 3, 1)
    return F.silu(y) if activation == "silu" else y


@pytest.fixture
def registered(monkeypatch):
    """The registered operator, which the public function takes only where a backend has kernels of its own."""
    backend = BACKENDS["portable"]
    conv = backend.conv_forward
    monkeypatch.setitem(BACKENDS, "portable", backend._replace(conv_forward=lambda *t: conv(*t)))
    return lambda *t: DepthwiseConv3x3.apply(*t, "portable")


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_on_the_cpu_it_is_torchs_convolution_to_the_bit(activation, bias, dtype):
    tensors = arguments(dtype=dtype, bias=bias)
    assert torch.equal(depthwise_conv3x3(*tensors, activation), by_torch(*tensors, activation))


def test_autocast_is_that_of_a_convolution():
    x, weight, bias = (t.requires_grad_() for t in arguments(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        ours, wanted = depthwise_conv3x3(x, weight, bias), by_torch(x, weight, bias, "silu")
        assert depthwise_conv3x3(x.double(), weight.double(), bias.double()).dtype == torch.float64
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, wanted)
    gradients = (torch.autograd.grad(y.float().square().sum(), (x, weight, bias)) for y in (ours, wanted))
    for gradient, reference in zip(*gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, reference)


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_registered_operator_and_its_gradients(registered, activation, bias):
    tensors = [t if t is None else t.requires_grad_() for t in arguments(2, 3, 4, 2, bias=bias)]
    assert torch.equal(registered(*tensors, activation), by_torch(*tensors, activation))
    assert torch.autograd.gradcheck(lambda *t: registered(*t, activation), tensors)
    x, weight, bias = (t if t is None else t.detach() for t in tensors)
    torch.library.opcheck(torch.ops.vmamba.depthwise_conv3x3, (x, weight, bias, activation, "portable"))
    torch.library.opcheck(torch.ops.vmamba.depthwise_conv3x3_backward, (x, x, weight, bias, activation, "portable"))


def test_second_derivatives_are_refused_clearly_and_right_with_torchs_convolution(registered):
    tensors = [t.requires_grad_() for t in arguments(1, 1, 2, 1)]
    with pytest.raises(NotImplementedError, match="backend='portable'"):
        torch.autograd.gradgradcheck(lambda *t: registered(*t, "silu"), tensors)


def test_torchs_convolution_has_second_derivatives():
    tensors = [t.requires_grad_() for t in arguments(1, 1, 2, 1)]
    assert torch.autograd.gradgradcheck(lambda *t: depthwise_conv3x3(*t, backend="portable"), tensors)


def test_vmap_over_images_and_over_weights(registered):
    x, weight, bias = arguments()
    xs, weights = torch.randn(3, *x.shape, dtype=x.dtype), torch.randn(3, *weight.shape, dtype=x.dtype)
    mapped = torch.vmap(lambda t: registered(t, weight, bias, "silu"))(xs)
    torch.testing.assert_close(mapped, torch.stack([by_torch(t, weight, bias, "silu") for t in xs]))
    mapped = torch.vmap(lambda t: registered(x, t, bias, "silu"))(weights)
    torch.testing.assert_close(mapped, torch.stack([by_torch(x, t, bias, "silu") for t in weights]))
    gradient = torch.func.grad(lambda w, t: registered(t, w, bias, "silu").square().sum())
    per_sample = torch.vmap(gradient, (None, 0))(weight, xs)
    for t, ours in zip(xs, per_sample, strict=True):
        wanted = torch.func.grad(lambda w, t=t: by_torch(t, w, bias, "silu").square().sum())(weight)
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_compiles_without_a_graph_break(request, kernels, autocast):
    if kernels:
        request.getfixturevalue("registered")
    torch._dynamo.reset()

    def function(*tensors):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return depthwise_conv3x3(*tensors)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 3, 4, 5), (3, 5, 6, 5)):
        tensors = [t.requires_grad_() for t in arguments(*size, dtype=torch.float32)]
        ours, wanted = compiled(*tensors), function(*tensors)
        torch.testing.assert_close(ours, wanted)
        gradients = (torch.autograd.grad(y.float().square().sum(), tensors) for y in (ours, wanted))
        for gradient, reference in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, reference)


def test_flops_are_those_of_torchs_convolution(registered):
    tensors = [t.requires_grad_() for t in arguments(E=16, dtype=torch.float32)]
    with FlopCounterMode(display=False) as wanted:
        by_torch(*tensors, "silu")
    with FlopCounterMode(display=False) as forward:
        y = registered(*tensors, "silu")
    assert forward.get_total_flops() == wanted.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    # torch itself counts the gradient of a depthwise weight E times too often
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_shapes_without_memory():
    x, weight, bias = (t.to("meta") for t in arguments())
    assert depthwise_conv3x3(x, weight, bias).shape == x.shape
    assert depthwise_conv3x3(*arguments(B=0)).shape == (0, 5, 6, 4)


@pytest.mark.parametrize(
    ("position", "value", "exception", "message"),
    [
        (0, torch.zeros(5, 6, 4), ValueError, r"x must be \(B, H, W, E\).*got \(5, 6, 4\)"),
        (0, torch.zeros(2, 0, 6, 4), ValueError, "H, W, E >= 1"),
        (0, torch.zeros(2, 5, 6, 4, dtype=torch.int64), TypeError, "x must be floating point, got torch.int64"),
        (1, torch.zeros(4, 3, 3), ValueError, r"weight must have shape \(4, 1, 3, 3\)"),
        (1, torch.zeros(4, 1, 3, 3).half(), TypeError, "x is torch.float32 and weight torch.float16.*autocast"),
        (1, torch.zeros(4, 1, 3, 3, device="meta"), ValueError, "one device.*weight on meta"),
        (2, torch.zeros(5), ValueError, r"bias must have shape \(4,\)"),
        (2, torch.zeros(4).double(), TypeError, "x is torch.float32 and bias torch.float64"),
        (3, "gelu", ValueError, "unknown activation 'gelu': choose one of silu, none"),
    ],
)
def test_it_names_what_does_not_fit(position, value, exception, message):
    given = [*arguments(dtype=torch.float32), "silu"]
    given[position] = value
    with pytest.raises(exception, match=message):
        depthwise_conv3x3(*given)


def test_unknown_backends_are_errors():
    with pytest.raises(ValueError, match="unknown backend 'cuda_core'.*portable"):
        depthwise_conv3x3(*arguments(), backend="cuda_core")
