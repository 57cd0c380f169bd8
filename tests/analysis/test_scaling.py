"""Scaling: slopes known by hand, a row for everything, failures told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from vmamba.analysis import ModelSettings, accuracy_by_size, fit_slope, measure_scaling

QUICK = ModelSettings(
    device="cpu", batch=2, repeats=2, round_seconds=0.001, tasks=("inference", "training"), dtype="fp32"
)


class Pairs(nn.Module):
    """Of every second row and column each pixel against every other: quadratic, but for the projection."""

    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, x):
        x = self.project(x[:, :, ::2, ::2]).flatten(2)
        return (x.transpose(1, 2) @ x).mean((1, 2))[:, None].expand(-1, 3)


class Refusing(nn.Conv2d):
    """Takes 32 pixels alone."""

    def forward(self, x):
        if x.shape[-1] != 32:
            raise RuntimeError(f"no room for {x.shape[-1]} px")
        return super().forward(x).mean((2, 3))


def test_slopes_by_hand() -> None:
    linear, quadratic = ([(size, 7.0 * size ** (2 * e)) for size in (32, 64, 96)] for e in (1, 2))
    assert fit_slope(linear) == pytest.approx(1)
    assert fit_slope(quadratic) == pytest.approx(2)
    mixed = [(32, 1.0), (64, 4.0), (128, 64.0)]  # linear, then quadratic
    assert fit_slope(mixed) == pytest.approx(1.5)
    assert fit_slope(mixed[-2:]) == pytest.approx(2)
    with pytest.raises(ValueError, match="two different sizes"):
        fit_slope([(32, 1.0)])


def test_every_model_at_every_size_has_a_row(tiny) -> None:
    told, grown = [], []
    report = measure_scaling(
        {"tiny": tiny, "pairs": Pairs()},
        (64, 32),
        QUICK,
        progress=told.append,
        finished=lambda report: grown.append(len(report.rows)),
    )
    assert report.sizes == (32, 64)
    assert grown == list(range(1, 9))
    assert [(row.size, row.model, row.task) for row in report.rows] == [
        (size, name, task) for size in (32, 64) for name in ("tiny", "pairs") for task in QUICK.tasks
    ]
    assert [row.measured.batch for row in report.rows[::4]] == [98, 24]  # 2 x 224 x 224 pixels
    for row in report.rows:
        assert row.measured.error is None
        assert row.milliseconds == pytest.approx(1000 * row.measured.seconds.median / row.measured.batch)
        assert row.megabytes is None  # a CPU does not tell
    slopes = {(slope.model, slope.quantity): slope for slope in report.slopes}
    assert set(slopes) == {
        (model, quantity) for model in ("tiny", "pairs") for quantity in ("macs", "time inference", "time training")
    }
    pixels = 16 * 16
    macs = dict(report.points("pairs", "macs"))
    assert macs == {32: 12 * pixels + 4 * pixels**2, 64: 48 * pixels + 64 * pixels**2}
    assert slopes["pairs", "macs"].fit == pytest.approx(2, abs=0.01)
    assert slopes["tiny", "macs"].fit == pytest.approx(1, abs=0.01)
    assert any("pairs: 64 px, training" in line for line in told)
    data = json.loads(json.dumps(report.as_dict()))
    assert len(data["rows"]) == 8
    assert data["published_vmamba_tiny_s1l8"]["224"] == {"images_per_second_a100_batch_32": 1490, "top1": 82.60}


def test_a_size_that_fails_is_a_row_with_the_reason(tiny) -> None:
    report = measure_scaling({"refusing": Refusing(3, 3, 1), "tiny": tiny}, (32, 40), replace(QUICK, batch=1))
    rows = {(row.model, row.size, row.task): row for row in report.rows}
    failed = rows["refusing", 40, "training"]
    assert failed.measured.error == "RuntimeError: no room for 40 px"
    assert failed.complexity is None
    assert rows["refusing", 32, "training"].measured.error is None
    assert rows["tiny", 40, "training"].measured.error is None
    assert {slope.model for slope in report.slopes} == {"tiny"}


def test_running_out_of_memory_is_no_crash(tiny, monkeypatch) -> None:
    class Hungry(nn.Conv2d):
        def forward(self, x):
            if not isinstance(x, torch._subclasses.FakeTensor) and x.shape[-1] > 32:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x).mean((2, 3))

    report = measure_scaling({"hungry": Hungry(3, 3, 1)}, (32, 40), replace(QUICK, tasks=("inference",), batch=1))
    small, large = report.rows
    assert small.measured.error is None
    assert large.measured.error == "OutOfMemoryError: CUDA out of memory"
    assert large.complexity.macs == 9 * 40 * 40


def test_memory_is_what_a_step_takes_beyond_weights_and_gradients(tiny) -> None:
    report = measure_scaling({"tiny": tiny}, (32,), replace(QUICK, batch=1))
    weights = 4 * report.rows[0].complexity.parameters
    for row, held in zip(report.rows, (weights, 2 * weights), strict=True):
        row.measured.peak_memory = held + 49 * 3_000_000
        assert row.megabytes == pytest.approx(3)


def test_what_a_time_limit_cuts_off_is_told_and_counted(tiny) -> None:
    report = measure_scaling({"tiny": tiny}, (32, 64), QUICK, time_limit=0)
    assert {row.measured.error for row in report.rows} == {"not measured: the time limit of 0 s was over"}
    assert all(row.complexity is not None for row in report.rows)


def test_a_wrong_scan_is_not_measured(tiny, wrong_backend) -> None:
    report = measure_scaling({"tiny": tiny}, (32,), QUICK)
    assert not report.valid
    assert not report.rows


def test_accuracy_by_size() -> None:
    def evaluate(size):
        if size == 96:
            raise ValueError("takes 64 px alone")
        return {"top1": 80.0 + size / 64, "top5": 95.0}

    entries = accuracy_by_size(evaluate, (96, 64))
    assert entries == [(64, 81.0, 95.0, ""), (96, None, None, "ValueError: takes 64 px alone")]
    with pytest.raises(ValueError, match=r"no size could be measured; at 96 px: ValueError: takes 64 px alone"):
        accuracy_by_size(evaluate, (96,))


def test_mistakes_are_told(tiny) -> None:
    for models, sizes, settings, message in (
        ((), (32,), QUICK, "at least one model"),
        ({"tiny": tiny}, (), QUICK, "one size"),
        ({"tiny": tiny}, (0,), QUICK, "positive"),
        (("vmamba_nanoo",), (32,), QUICK, "did you mean vmamba_nano"),
        ({"tiny": tiny}, (32,), replace(QUICK, tasks=("latency",)), "inference and training"),
        ({"tiny": tiny}, (32,), replace(QUICK, modes=("eager", "compile")), "one mode"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_scaling(models, sizes, settings)
