"""The scan alone: shapes of VMamba-T, bytes counted, wrong backends refused a ratio."""

import json

import pytest
import timm
import torch

from vmamba.analysis import OperatorSettings, measure_operator
from vmamba.analysis.operator_speed import PASSES, Shape, _floor_bytes, _stages
from vmamba.layers import SS2D
from vmamba.ops.dispatch import BACKENDS

QUICK = {"device": "cpu", "size": 32, "repeats": 1, "round_seconds": 0.001}


@pytest.mark.parametrize(("N", "name"), [(1, "vmamba_tiny_s1l8"), (16, "vanilla_vmamba_tiny")])
def test_the_shapes_are_those_in_the_network(N, name):
    model = timm.create_model(name).eval()
    states = []
    for stage in model.stages:
        module = next(m for m in stage.modules() if isinstance(m, SS2D))
        _, E, R = module.dt_weight.shape
        states.append((E, R, module.A_log.shape[1]))
    with torch.no_grad():
        features = model.forward_intermediates(torch.zeros(1, 3, 224, 224), intermediates_only=True)
    sides = [tuple(feature.shape[2:]) for feature in features]
    shapes = _stages(OperatorSettings(batch=5, d_state=N))
    assert [(s.E, s.R, s.N) for s in shapes] == states
    assert [(s.H, s.W) for s in shapes] == sides
    assert {s.B for s in shapes} == {5}


def test_the_floor_counts_every_byte_once():
    shape = Shape(1, 128, 56, 56, 96, 6, 1)
    x, p = 128 * 56 * 56 * 96, 128 * 56 * 56 * 4 * 8
    assert _floor_bytes(shape, torch.bfloat16, "scan forward") == 2 * (2 * x + p)
    assert _floor_bytes(shape, torch.float32, "scan backward") == 4 * (3 * x + 2 * p)
    assert _floor_bytes(shape, torch.float32, "ss2d forward") is None


@pytest.mark.parametrize(("N", "dtype"), [(1, "fp32"), (16, "bf16")])
def test_every_stage_and_pass_has_a_row(N, dtype):
    report = measure_operator(OperatorSettings(**QUICK, d_state=N, dtype=dtype))
    assert report.valid
    assert report.bandwidth > 0
    assert [(row.shape.stage, row.work) for row in report.rows] == [(s, work) for s in range(1, 5) for work in PASSES]
    for row in report.rows:
        assert row.error is None
        assert row.seconds.median > 0
        assert (row.fraction_of_floor is None) == row.work.startswith("ss2d")
        assert row.fraction_of_floor is None or 0 < row.fraction_of_floor < 1
        assert report.speed_up(row) == 1  # over itself, the only backend
    data = json.loads(json.dumps(report.as_dict()))
    assert data["kind"] == "operator"
    assert data["rows"][0]["H"] == 8
    assert data["rows"][0]["floor_ms"] == pytest.approx(1000 * report.rows[0].floor)


def test_backends_are_compared_only_where_both_are_right(monkeypatch):
    portable = BACKENDS["portable"]

    def wrong(*arguments):
        y, states = portable.ss2d_forward(*arguments)
        return 1.001 * y, states

    def broken(*arguments):
        raise RuntimeError("no such instruction")

    others = {
        "right": portable,
        "wrong": portable._replace(ss2d_forward=wrong),
        "broken": portable._replace(ss2d_backward=broken),
        "absent": portable._replace(unavailable=lambda device_type: "not built"),
    }
    monkeypatch.delitem(BACKENDS, "portable")  # to come last again
    for name, backend in {**others, "portable": portable}.items():
        monkeypatch.setitem(BACKENDS, name, backend)
    report = measure_operator(OperatorSettings(**QUICK))
    assert not report.valid
    assert list(report.verdicts) == ["right", "wrong", "broken", "portable"]
    assert report.baseline == "portable"
    for row in report.rows:
        compared = report.speed_up(row)
        assert compared > 0 if row.backend in ("right", "portable") else compared is None
        backward = row.work in ("scan backward", "ss2d forward + backward")
        assert row.error == ("RuntimeError: no such instruction" if row.backend == "broken" and backward else None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_state": 4}, "d_state must be one of 1, 16, not 4"),
        ({"dtype": "bf16-weights"}, "choose from fp32, bf16, fp16"),
        ({"size": 0}, "size must be at least 1, not 0"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        OperatorSettings(**{**QUICK, **changes})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_backend_on_cuda():
    report = measure_operator(OperatorSettings(device="cuda", batch=2, size=64, repeats=2, round_seconds=0.01))
    assert {row.error for row in report.rows} == {None}
