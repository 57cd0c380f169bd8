"""Where a network's first step is gone through once ahead of it, as on a GPU, no figure and no map changes."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from vmamba.analysis import (
    ModelSettings,
    attention_map,
    count_modules,
    effective_receptive_field,
    measure_models,
    scan_of_layer,
)
from vmamba.analysis.measuring import Stopwatch
from vmamba.ops import ahead
from vmamba.ops.dispatch import BACKENDS


@pytest.fixture
def passes(monkeypatch):
    """A list that grows with every pass ahead, which the portable backend now has, too."""
    made = []

    @contextmanager
    def compile_ahead():
        made.append(1)
        yield

    monkeypatch.setattr(ahead, "_seen", set())
    monkeypatch.setitem(BACKENDS, "portable", BACKENDS["portable"]._replace(compile_ahead=compile_ahead))
    return made


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_hooks_see_what_is_computed_alone(passes, tiny, images):
    first = scan_of_layer(tiny, images[:1], "stages.2.blocks.0")
    again = scan_of_layer(tiny, images[:1], "stages.2.blocks.0")
    assert torch.equal(first.output, again.output)
    assert torch.equal(attention_map(first, (1, 2)).weights, attention_map(again, (1, 2)).weights)
    fields = [effective_receptive_field(tiny, images).contribution for _ in range(2)]
    np.testing.assert_array_equal(*fields)
    assert not passes


def test_operations_are_counted_once(passes, tiny, images):
    expected = count_modules(tiny, (1, 3, 64, 64))
    assert not passes
    tiny(images)
    assert len(passes) == 1
    assert count_modules(tiny, (1, 3, 64, 64)) == expected


def test_time_is_taken_after_the_pass(passes, tiny, monkeypatch):
    at_start = []
    for name in ("back_to_back", "one_by_one"):
        measure = getattr(Stopwatch, name)

        def counting(self, step, count, measure=measure):
            before = len(passes)
            seconds = measure(self, step, count)
            at_start.append((before, len(passes)))
            return seconds

        monkeypatch.setattr(Stopwatch, name, counting)
    settings = ModelSettings(device="cpu", batch=2, size=32, repeats=2, round_seconds=0.001)
    measure_models({"tiny": tiny}, settings)
    assert len(passes) == 3  # of a batch, of one image, and of a training step
    assert at_start
    assert all(before == after for before, after in at_start)
