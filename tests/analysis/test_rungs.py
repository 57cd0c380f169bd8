"""The rungs compute what the layer computes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from vmamba import VMamba
from vmamba.analysis.ladder import FP32_TOLERANCE, HALF_FACTOR, RUNGS, check_rung
from vmamba.analysis.rungs import BackendRung, RungSS2D, on_rung
from vmamba.analysis.throughput import conditions
from vmamba.layers import SS2D
from vmamba.ops.dispatch import BACKENDS
from vmamba.ops.judge import error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND_RUNGS = {rung.name: rung.backend for rung in RUNGS if rung.backend is not None}
CPU = torch.device("cpu")


def results(module, x, gy):
    x = x.clone().requires_grad_()
    y = module(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], gy.to(y.dtype)))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("scan", ["portable", "reference"])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("routes", ["cross2d", "unidi", "bidi"])
def test_every_chain_is_exact_in_fp64(scan, low_precision, linear, gate, routes) -> None:
    layer = SS2D(8, d_state=3, ssm_ratio=2.0, gate=gate, conv_bias=True, routes=routes).double()
    x, gy = (torch.randn(2, 5, 7, 8, dtype=torch.float64) for _ in range(2))
    wanted = results(layer, x, gy)
    found = results(RungSS2D(layer, BackendRung(scan, low_precision, linear)), x, gy)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BACKEND_RUNGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_before_timing_passes_with_the_portable_scan(name, dtype) -> None:
    rung = BACKEND_RUNGS[name]
    assert check_rung(BackendRung("portable", rung.low_precision, rung.linear), CPU, dtype) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_before_timing_finds_what_is_wrong(dtype, monkeypatch) -> None:
    portable = BACKENDS["portable"]

    def scan_forward(*arguments):
        y, *others = portable.scan_forward(*arguments)
        return 1.05 * y, *others

    monkeypatch.setitem(BACKENDS, "portable", portable._replace(scan_forward=scan_forward))
    assert check_rung(BACKEND_RUNGS["plain"], CPU, dtype).startswith("wrong: error ")


def test_the_check_tells_what_is_raised() -> None:
    assert "cannot run on cpu" in check_rung(BACKEND_RUNGS["triton"], CPU, torch.float32)


@pytest.mark.skipif(not INTERPRETED, reason="run by test_through_tritons_interpreter, with TRITON_INTERPRET=1")
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("low_precision", [False, True])
def test_tritons_scan_in_the_chains(linear, low_precision, monkeypatch) -> None:
    kernels = BACKENDS["triton"]._replace(unavailable=lambda device: None)
    monkeypatch.setitem(BACKENDS, "interpreted", kernels)  # the last one, so that nobody else takes it
    layer = SS2D(4, d_state=2, ssm_ratio=2.0, gate=True, conv_bias=True)
    x, gy = (torch.randn(1, 5, 6, 4) for _ in range(2))
    wanted = results(copy.deepcopy(layer).double(), x.double(), gy)
    found = results(RungSS2D(layer, BackendRung("interpreted", low_precision, linear)), x, gy)
    assert max(map(error, found, wanted)) <= FP32_TOLERANCE
    rung = RungSS2D(layer, BackendRung("interpreted", low_precision, linear))
    with torch.autocast("cpu", torch.bfloat16):
        own, found = layer(x), rung(x)
    assert error(found, wanted[0]) <= HALF_FACTOR * error(own, wanted[0])


@pytest.mark.skipif(INTERPRETED, reason="this is the test that starts the interpreter")
def test_through_tritons_interpreter() -> None:
    """In a process of its own: Triton asks whether to interpret when it is imported."""
    pytest.importorskip("triton", reason="needs triton")
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton <= (3, 6) and numpy >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 fails on loops with numpy 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "tritons_scan"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-1000:]
    assert "4 passed" in process.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BACKEND_RUNGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rung_is_right_on_a_gpu(name, dtype) -> None:
    with conditions(torch.device("cuda"), tf32=False):
        assert check_rung(BACKEND_RUNGS[name], torch.device("cuda"), dtype) == ""


def test_a_network_on_a_rung_is_a_copy_that_computes_the_same() -> None:
    model = VMamba(dims=8, depths=(1, 1, 1, 1), d_state=2, ssm_gate=True, num_classes=3).eval()
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    rung = on_rung(model, BACKEND_RUNGS["plain"])
    assert [type(block.ssm) for stage in rung.stages for block in stage.blocks] == [RungSS2D] * 4
    assert [type(block.ssm) for stage in model.stages for block in stage.blocks] == [SS2D] * 4
    assert not rung.training
    x = torch.randn(2, 3, 40, 52)
    torch.testing.assert_close(rung(x), model(x), rtol=1e-4, atol=1e-5)
    for parameter in rung.parameters():
        parameter.data.zero_()
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match=r"Linear has no SS2D"):
        on_rung(torch.nn.Linear(2, 2), BACKEND_RUNGS["plain"])
    with pytest.raises(ValueError, match=r"depthwise 3x3 convolution, SiLU"):
        RungSS2D(SS2D(8, conv=0), BACKEND_RUNGS["plain"])
    with pytest.raises(ValueError, match=r"cascade2d"):
        RungSS2D(SS2D(8, routes="cascade2d"), BACKEND_RUNGS["plain"])
