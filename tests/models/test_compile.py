"""The smallest model under torch.compile and torch.export, with everything about the input dynamic."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch

from vmamba import VMamba

pytestmark = pytest.mark.slow


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("vmamba_nano", num_classes=3).eval()


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_traces_in_one_graph_forward_and_backward(model):
    # aot_eager traces both as inductor does, without needing a C++ compiler
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, size in ((2, 64), (3, 96)):
        x = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 3, 64, 64)
    for ours, wanted in zip(gradients(compiled, x), gradients(model, x), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5 * wanted.norm().item() + 1e-6)


def test_compiles_with_inductor():
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile's inductor needs a C++ compiler on the CPU, and there is neither g++ nor clang++")
    torch._dynamo.reset()
    model = VMamba(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3).eval()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_exports_with_dynamic_batch_height_and_width(model):
    dim = torch.export.Dim
    # torch.export takes a size of 1 for a constant, and 32 pixels are 1 at the last stage; from 33 on one graph does
    dynamic = {"x": {0: dim("batch"), 2: dim("height", min=33), 3: dim("width", min=33)}}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=dynamic)
    for shape in ((1, 3, 33, 33), (3, 3, 47, 70), (2, 3, 128, 64)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
