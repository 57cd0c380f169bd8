from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vmamba.ops import selective_scan, ss2d

from .oracle import ss2d_problem
from .test_functional import ALL_ROUTES, scan_arguments, ss2d_arguments


def small_arguments(dtype=torch.float64):
    return ss2d_arguments(H=3, W=4, E=2, N=2, R=2, dtype=dtype, batch=1)


@pytest.mark.parametrize("routes", ALL_ROUTES)
def test_gradcheck_of_ss2d(routes):
    arguments = [t.requires_grad_() for t in small_arguments()]
    assert torch.autograd.gradcheck(lambda *t: ss2d(*t, routes=routes), arguments)


def test_gradcheck_of_selective_scan():
    arguments = [t.requires_grad_() for t in scan_arguments(batch=1, E=2, N=2, L=5).values()]
    assert torch.autograd.gradcheck(
        lambda u, d, A, B, C, D, bias: selective_scan(u, d, A, B, C, D, None, bias, True), arguments
    )


def test_second_derivatives_are_refused_clearly_and_right_with_the_reference():
    arguments = [t.requires_grad_() for t in ss2d_arguments(H=1, W=2, E=1, N=1, R=1, batch=1)]
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.gradgradcheck(ss2d, arguments)
    assert torch.autograd.gradgradcheck(lambda *t: ss2d(*t, backend="reference"), arguments)
    scan = [t.requires_grad_() for t in scan_arguments(batch=1, E=1, N=1, L=3).values()]
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.gradgradcheck(selective_scan, scan[:5])


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_of_the_two_dimensional_operators(keep):
    problem = ss2d_problem(1, 3, 4, E=2, N=2, R=2)
    torch.library.opcheck(torch.ops.vmamba.ss2d_scan, (*problem, "cross2d", "auto", keep))
    states = torch.empty(0)
    torch.library.opcheck(torch.ops.vmamba.ss2d_scan_backward, (problem[0], *problem, states, "cross2d", "auto"))


@pytest.mark.parametrize("optional", [True, False])
def test_opcheck_of_the_one_dimensional_operators(optional):
    arguments = scan_arguments()
    if not optional:
        arguments["D"] = arguments["delta_bias"] = None
    tensors = list(arguments.values())
    torch.library.opcheck(torch.ops.vmamba.selective_scan, (*tensors, True, "auto", True))
    states = torch.empty(0)
    torch.library.opcheck(torch.ops.vmamba.selective_scan_backward, (tensors[0], *tensors, states, True, "auto"))


# aot_eager traces forward and backward as inductor does, without needing a C++ compiler
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("routes", ALL_ROUTES)
def test_compiles_without_a_graph_break(routes, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: ss2d(*t, routes=routes), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((3, 4), (5, 6)):
        arguments = [t.requires_grad_() for t in ss2d_arguments(*size, dtype=torch.float32)]
        ours, wanted = compiled(*arguments), ss2d(*arguments, routes=routes)
        torch.testing.assert_close(ours, wanted)
        gy = torch.randn_like(wanted)
        pairs = zip(torch.autograd.grad(ours, arguments, gy), torch.autograd.grad(wanted, arguments, gy), strict=True)
        for gradient, reference in pairs:
            torch.testing.assert_close(gradient, reference)


class Module(torch.nn.Module):
    def __init__(self, routes: str):
        super().__init__()
        self.routes = routes
        self.weights = torch.nn.ParameterList(ss2d_arguments(E=2, dtype=torch.float32)[1:])

    def forward(self, x):
        return ss2d(x, *self.weights, routes=self.routes)


@pytest.mark.parametrize("routes", ALL_ROUTES)
def test_exports_with_dynamic_batch_height_and_width(routes):
    module, dim = Module(routes).eval(), torch.export.Dim
    dynamic = {"x": {0: dim("batch"), 1: dim("height"), 2: dim("width")}}
    program = torch.export.export(module, (torch.randn(2, 5, 6, 2),), dynamic_shapes=dynamic)
    for shape in ((3, 4, 9, 2), (2, 8, 8, 2)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), module(x))


def test_vmap_over_images_and_over_weights():
    x, *weights = ss2d_arguments(dtype=torch.float32)
    xs = torch.randn(3, *x.shape)
    mapped = torch.vmap(lambda t: ss2d(t, *weights))(xs)
    torch.testing.assert_close(mapped, torch.stack([ss2d(t, *weights) for t in xs]))
    Ds = torch.randn(3, *weights[-1].shape)
    mapped = torch.vmap(lambda D: ss2d(x, *weights[:-1], D))(Ds)
    torch.testing.assert_close(mapped, torch.stack([ss2d(x, *weights[:-1], D) for D in Ds]))
    u, *rest = scan_arguments().values()
    us = torch.randn(3, *u.shape, dtype=u.dtype)
    mapped = torch.vmap(lambda t: selective_scan(t, *rest[:5]))(us)
    torch.testing.assert_close(mapped, torch.stack([selective_scan(t, *rest[:5]) for t in us]))


def test_gradients_per_sample_with_torch_func():
    x, w, *weights = ss2d_arguments()
    xs = torch.randn(3, *x.shape, dtype=x.dtype)
    gradient = torch.func.grad(lambda w, t: ss2d(t, w, *weights).square().sum())
    per_sample = torch.vmap(gradient, (None, 0))(w, xs)
    for t, mapped in zip(xs, per_sample, strict=True):
        leaf = w.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(ss2d(t, leaf, *weights).square().sum(), leaf)
        torch.testing.assert_close(mapped, wanted)


# torch's own: it scripts its forward-mode formulas when first asked for one
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")
def test_forward_mode_is_refused_not_silently_zero():
    x, *weights = small_arguments()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda t: ss2d(t, *weights), (x,), (x,))


def test_autocast_runs_the_projection_in_low_precision_and_the_scan_in_fp32():
    x, *weights = ss2d_arguments(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ss2d(x, *weights).dtype == torch.float32
        assert ss2d(x.bfloat16(), *weights).dtype == torch.bfloat16


def test_flops_are_counted_by_formula():
    B, H, W, E, N, R, K = 2, 5, 6, 4, 2, 3, 4
    x, *weights = (t.requires_grad_() for t in ss2d_arguments(H, W, E, N, R, torch.float32, B))
    with FlopCounterMode(display=False) as forward:
        y = ss2d(x, *weights)
    pixels = B * H * W
    scan = pixels * K * E * (9 * N + 2) + 2 * pixels * K * E * R
    projection = 2 * pixels * E * K * (R + 2 * N)
    assert forward.get_total_flops() == scan + projection
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * (scan + projection)
    arguments = scan_arguments()
    u, A = arguments["u"], arguments["A"]
    with FlopCounterMode(display=False) as counter:
        selective_scan(**arguments)
    assert counter.get_total_flops() == u.numel() * (9 * A.shape[1] + 2)
