"""Compiling ahead: a step is gone through once before the first of its kind, and leaves no trace."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from vmamba.ops import ahead
from vmamba.ops.dispatch import BACKENDS


@pytest.fixture
def contexts(monkeypatch):
    """The portable backend with a context for compiling ahead: a list of the threads that entered it."""
    entered = []

    @contextmanager
    def compile_ahead():
        entered.append(threading.current_thread())
        yield

    monkeypatch.setattr(ahead, "_seen", set())
    monkeypatch.setitem(BACKENDS, "portable", BACKENDS["portable"]._replace(compile_ahead=compile_ahead))
    return entered


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("vmamba_nano", drop_path_rate=0.5).eval()


def image(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_first_step_of_a_kind_and_no_other(contexts, model):
    with torch.no_grad():
        for size in (32, 32, 40):
            model(image(size))
        assert len(contexts) == 1
        model(image(64))
    assert len(contexts) == 2
    model(image())  # records gradients
    assert len(contexts) == 3
    with torch.no_grad():
        model.forward_intermediates(image())
        model.double()(image().double())
    assert len(contexts) == 4


def test_a_training_step_is_as_if_there_had_been_none(contexts, model):
    model.train()
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        loss = model(image()).square().sum()
        assert all(p.grad is None for p in model.parameters())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    assert len(contexts) == 1
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_gradients_are_gone_through_in_the_thread_of_the_context(contexts):
    threads = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            threads.append(threading.current_thread())
            return g

    x = torch.ones(3, requires_grad=True)
    ahead.compile_ahead(("a step",), lambda: Spy.apply(x), x, [x])
    assert threads == contexts == [threading.current_thread()]
    assert x.grad is None


def test_whoever_looks_on_sees_one_step(contexts, model):
    seen = []
    handle = model.stages[1].register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        model(image())
    assert len(seen) == 1
    handle.remove()
    with torch.no_grad(), FlopCounterMode(display=False) as first:
        model(image())
    with torch.no_grad(), FlopCounterMode(display=False) as second:
        model(image())
    assert first.get_total_flops() == second.get_total_flops()
    assert not contexts
    # and takes nothing from the first step that nobody looks at
    with torch.no_grad():
        model(image())
    assert len(contexts) == 1


def test_buffers_may_count_what_passes(contexts, model):
    model.stem.register_buffer("count", torch.zeros(1))
    with torch.no_grad():
        model(image())
    assert not contexts


def test_errors_are_left_to_the_step(contexts, model):
    for shape in ((1, 5, 32, 32), (5,), ()):
        with pytest.raises(ValueError, match="expected images"):
            model(torch.zeros(shape))


def test_where_no_kernels_are_nothing_is_gone_through(monkeypatch, model):
    monkeypatch.setattr(ahead, "_seen", set())
    with torch.no_grad():
        model(image())
    assert not ahead._seen


def test_who_traces_takes_in_the_step_alone(contexts, model):
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(image())
        torch.export.export(model, (image(),))
    assert not contexts
