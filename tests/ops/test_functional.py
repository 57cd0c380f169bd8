from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vmamba.ops import ROUTES, backends, selective_scan, ss2d
from vmamba.ops.dispatch import BACKENDS, Backend, choose
from vmamba.ops.reference import ss2d_scan_reference

from .oracle import TOLERANCE, error, ss2d_problem

ALL_ROUTES = [*ROUTES, "cascade2d"]
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def ss2d_arguments(H=5, W=6, E=4, N=2, R=3, dtype=torch.float64, batch=2):
    x, _, *weights = ss2d_problem(batch, H, W, E, N, R, dtype)
    generator = torch.Generator().manual_seed(1)
    x_proj_weight = torch.randn(4, R + 2 * N, E, generator=generator, dtype=torch.float64).to(weights[0].dtype)
    return [x, x_proj_weight, *weights]


def scan_arguments(batch=2, K=2, E=3, N=4, L=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "u": randn(batch, K * E, L),
        "delta": randn(batch, K * E, L),
        "A": -randn(K * E, N).abs(),
        "B": randn(batch, K, N, L),
        "C": randn(batch, K, N, L),
        "D": randn(K * E),
        "delta_bias": randn(K * E),
    }


@pytest.mark.parametrize("N", [1, 16])
def test_selective_scan_is_the_official_one_with_every_gradient(golden, N):
    tensors = load_file(golden / "ops.safetensors")
    case = {name: tensors[f"s6.N{N}.{name}"].requires_grad_() for name in NAMES}
    y = selective_scan(**case, delta_softplus=True)
    assert error(y, tensors[f"s6.N{N}.out"]) <= TOLERANCE[torch.float64]
    gradients = torch.autograd.grad(y, list(case.values()), tensors[f"s6.N{N}.grad_out"])
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert error(gradient, tensors[f"s6.N{N}.grad_{name}"]) <= TOLERANCE[torch.float64], name


@pytest.mark.parametrize("length", [1, 2, 37, 64])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("optional", [True, False])
def test_selective_scan_equals_the_reference(length, softplus, optional):
    arguments = scan_arguments(L=length)
    if not softplus:
        arguments["delta"] = arguments["delta"].abs()
        arguments["delta_bias"] = arguments["delta_bias"].abs()
    if not optional:
        arguments["D"] = arguments["delta_bias"] = None
    present = [t.requires_grad_() for t in arguments.values() if t is not None]
    results = {}
    for backend in ("auto", "reference"):
        y, last_state = selective_scan(**arguments, delta_softplus=softplus, return_last_state=True, backend=backend)
        results[backend] = [y, last_state, *torch.autograd.grad(y.square().sum(), present)]
    for ours, wanted in zip(results["auto"], results["reference"], strict=True):
        assert error(ours, wanted) <= TOLERANCE[torch.float64]


def test_selective_scan_takes_what_mamba_ssm_takes():
    arguments = scan_arguments(K=1)
    u, delta, A, B, C, D, bias = arguments.values()
    z = torch.randn_like(u)
    wanted = selective_scan(u, delta, A, B, C, D, None, bias, True) * F.silu(z)
    torch.testing.assert_close(selective_scan(u, delta, A, B, C, D, z, bias, True), wanted)
    torch.testing.assert_close(selective_scan(u, delta, A, B[:, 0], C[:, 0], D, z, bias, True), wanted)
    constant = torch.randn(3, 4, dtype=torch.float64)
    every_step = constant[None, :, :, None].expand(2, 3, 4, 11)
    torch.testing.assert_close(
        selective_scan(u, delta, A, constant, C), selective_scan(u, delta, A, every_step, C.expand(-1, 3, -1, -1))
    )


@pytest.mark.parametrize("routes", ALL_ROUTES)
def test_ss2d_equals_the_reference_with_every_gradient(routes):
    arguments = [t.requires_grad_() for t in ss2d_arguments()]
    ours, wanted = (ss2d(*arguments, routes=routes, backend=backend) for backend in ("auto", "reference"))
    assert error(ours, wanted) <= TOLERANCE[torch.float64]
    gy = torch.randn_like(ours)
    pairs = zip(torch.autograd.grad(ours, arguments, gy), torch.autograd.grad(wanted, arguments, gy), strict=True)
    for gradient, reference in pairs:
        assert error(gradient, reference) <= TOLERANCE[torch.float64]


def test_ss2d_projects_each_pixel_with_every_routes_weights():
    x, x_proj_weight, *weights = ss2d_arguments()
    p = torch.einsum("bhwe,kce->bhwkc", x, x_proj_weight).flatten(3)
    torch.testing.assert_close(ss2d(x, x_proj_weight, *weights), ss2d_scan_reference(x, p, *weights))


def test_cascade_scans_rows_then_columns_and_does_not_flip_back():
    x, x_proj_weight, dt_weight, dt_bias, A, D = ss2d_arguments(H=3, W=4, E=2, N=1, R=1, batch=1)

    def one_way(sequence, k):  # (L, E) -> (L, E)
        E = sequence.shape[1]
        delta_code, B, C = (sequence @ x_proj_weight[k].t()).split([1, 1, 1], dim=1)
        rows = slice(k * E, (k + 1) * E)
        return selective_scan(
            sequence.t()[None],
            (delta_code @ dt_weight[k].t()).t()[None],
            A[rows],
            B.t()[None],
            C.t()[None],
            D[rows],
            delta_bias=dt_bias[k],
            delta_softplus=True,
            backend="reference",
        )[0].t()

    def both_ways(sequence, k):
        return one_way(sequence, k) + one_way(sequence.flip(0), k + 1)

    image = F.layer_norm(x[0], (2,))
    image = torch.stack([both_ways(row, 0) for row in image])
    image = F.layer_norm(image, (2,))
    image = torch.stack([both_ways(column, 2) for column in image.unbind(1)], dim=1)
    torch.testing.assert_close(ss2d(x, x_proj_weight, dt_weight, dt_bias, A, D, routes="cascade2d")[0], image)


@pytest.mark.parametrize("routes", ALL_ROUTES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_in_and_out(routes, dtype):
    arguments = ss2d_arguments(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        y = ss2d(arguments[0].to(dtype), *arguments[1:], routes=routes)
    assert y.dtype == dtype
    assert error(y, ss2d(*arguments, routes=routes)) <= 8 * TOLERANCE[dtype]


def replaced(arguments, position, value):
    return [value if i == position else t for i, t in enumerate(arguments)]


@pytest.mark.parametrize(
    ("position", "change", "exception", "message"),
    [
        (0, lambda t: t[0], ValueError, r"x must be \(B, H, W, E\)"),
        (0, lambda t: t[:, :0], ValueError, r"H, W, E >= 1"),
        (0, lambda t: t.long(), TypeError, "x must be floating point, got torch.int64"),
        (0, lambda t: t.tolist(), TypeError, "x must be a tensor, got list"),
        (0, lambda t: t.to("meta"), ValueError, "one device.*x on meta"),
        (1, lambda t: t[:, :-1], ValueError, r"x_proj_weight must have shape \(4, 7, 4\)"),
        (2, lambda t: t[:3], ValueError, r"dt_weight must be \(4, 4, R\)"),
        (3, lambda t: t.flatten(), ValueError, r"dt_bias must have shape \(4, 4\)"),
        (4, lambda t: t[:-1], ValueError, r"A must be \(16, N\)"),
        (4, lambda t: t + 1j, TypeError, "A is complex"),
        (5, lambda t: t[:-1], ValueError, r"D must have shape \(16,\)"),
    ],
)
def test_ss2d_names_what_does_not_fit(position, change, exception, message):
    arguments = ss2d_arguments()
    with pytest.raises(exception, match=message):
        ss2d(*replaced(arguments, position, change(arguments[position])))


@pytest.mark.parametrize(
    ("name", "change", "exception", "message"),
    [
        ("u", lambda t: t[0], ValueError, r"u must be \(batch, channels, L\)"),
        ("u", lambda t: t[..., :0], ValueError, "L >= 1"),
        ("delta", lambda t: t[..., :-1], ValueError, r"delta must have shape \(2, 6, 11\)"),
        ("A", lambda t: t[:-1], ValueError, r"A must be \(6, N\)"),
        ("A", lambda t: t + 1j, TypeError, "A is complex"),
        ("B", lambda t: t[..., :-1], ValueError, r"B must be \(batch, K, N, L\)"),
        ("C", lambda t: t.repeat(1, 2, 1, 1), ValueError, "4 groups, which do not divide the 6 channels"),
        ("C", lambda t: t.repeat_interleave(3, 1)[:, :3], ValueError, "B has 2 groups and C 3"),
        ("D", lambda t: t[:-1], ValueError, r"D must have shape \(6,\)"),
        ("delta_bias", lambda t: t[:-1], ValueError, r"delta_bias must have shape \(6,\)"),
    ],
)
def test_selective_scan_names_what_does_not_fit(name, change, exception, message):
    arguments = scan_arguments()
    with pytest.raises(exception, match=message):
        selective_scan(**{**arguments, name: change(arguments[name])})


def test_unknown_names_are_errors_with_the_choices():
    with pytest.raises(ValueError, match="unknown routes 'spiral'.*cross2d.*cascade2d"):
        ss2d(*ss2d_arguments(), routes="spiral")
    with pytest.raises(ValueError, match="unknown backend 'cuda_core'.*portable"):
        ss2d(*ss2d_arguments(), backend="cuda_core")
    with pytest.raises(ValueError, match="unknown backend 'cuda_core'.*portable"):
        selective_scan(**scan_arguments(), backend="cuda_core")


def test_backends_says_what_there_is():
    statuses = backends("cpu")
    assert statuses["portable"].available
    assert [name for name, status in statuses.items() if status.chosen] == ["portable"]
    assert all(status.reason for status in statuses.values() if not status.available)


def test_an_automatic_choice_falls_back_once_and_audibly_and_an_explicit_one_raises(monkeypatch):
    fast = Backend(lambda device_type: f"needs a card, not {device_type}", *[None] * 6)
    monkeypatch.setattr("vmamba.ops.dispatch.BACKENDS", {"fast": fast, "portable": BACKENDS["portable"]})
    with pytest.warns(UserWarning, match="'portable'.*'fast' cannot: needs a card, not xpu"):
        assert choose("auto", "xpu") == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", "xpu") == "portable"
        assert choose("auto", "cpu") == "portable"
    with pytest.raises(
        RuntimeError, match="'fast' cannot run on cpu: needs a card, not cpu.*Available there: .*portable"
    ):
        choose("fast", "cpu")
