"""The ladder: every rung is the network that the paper describes, and every one has its place in the report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from vmamba.analysis import ModelSettings, climb_ladder, ladder, make_rung, measure_complexity
from vmamba.analysis.ladder import RUNGS, make_rung_config
from vmamba.ops.dispatch import BACKENDS

# parameters and GFLOPs at 224 px, as the official code counts them
COUNTS = {
    "plain": (22_893_448, 5.627),
    "triton": (22_893_448, 5.627),
    "low": (22_893_448, 5.627),
    "linear": (22_893_448, 5.627),
    "fused": (22_893_448, 5.627),
    "d": (28_991_656, 5.63),
    "d+": (28_256_680, 5.18),
    "e": (26_247_592, 4.86),
    "f-": (30_633_256, 4.83),
    "f": (30_705_832, 4.86),
    "g": (30_249_064, 4.91),
}
QUICK = ModelSettings(device="cpu", batch=2, size=32, repeats=2, round_seconds=0.001, tasks=("inference", "training"))


@pytest.fixture
def small(monkeypatch):
    """The rungs with eight channels and one block a stage."""
    rungs = tuple(replace(r, changes={**r.changes, "dims": 8, "depths": (1, 1, 1, 1)}) for r in RUNGS)
    monkeypatch.setattr(ladder, "RUNGS", rungs)
    return rungs


@pytest.mark.parametrize("rung", RUNGS, ids=[rung.name for rung in RUNGS])
def test_every_rung_has_the_published_size_and_cost(rung) -> None:
    parameters, giga = COUNTS[rung.name]
    model = make_rung(rung, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert make_rung_config(rung).drop_path_rate == 0.2
    found = measure_complexity(make_rung(replace(rung, backend=None), device="meta"), (1, 3, 224, 224))
    assert found.macs / 1e9 == pytest.approx(giga, rel=0.005)


def test_neighbours_differ_in_what_the_change_says() -> None:
    configs = [make_rung_config(rung).to_dict() for rung in RUNGS]
    names = [rung.name for rung in RUNGS]

    def changed(name):
        i = names.index(name)
        return {field for field, value in configs[i].items() if value != configs[i - 1][field]}

    assert all(changed(name) == set() for name in ("triton", "low", "linear", "fused"))
    assert changed("d") == {"depths", "mlp_ratio", "ssm_conv", "ssm_conv_bias", "stem", "downsample"}
    assert changed("d+") == {"depths", "ssm_ratio"}
    assert changed("e") == {"ssm_gate"}
    assert changed("f-") == {"d_state", "ssm_ratio"}
    assert changed("f") == {"ssm_conv"}
    assert changed("g") == {"depths", "ssm_ratio"}


def test_published_figures_stand_beside_the_papers_steps() -> None:
    inference = {rung.step: rung.published.inference for rung in RUNGS if rung.step}
    steps = ("vanilla", "(a)", "(b)", "(c)", "(d)", "(e)", "(f)", "(g)")
    assert inference == dict(zip(steps, (426, 467, 464, 638, 813, 1179, 1340, 1686), strict=True))
    assert all(rung.published.inference is None for rung in RUNGS if not rung.step)


def test_every_rung_is_in_the_report_measured_or_with_a_reason(small) -> None:
    sizes = []
    report = climb_ladder(QUICK, finished=lambda report: sizes.append(sum(len(r.measured) for r in report.rows)))
    assert [row.rung.name for row in report.rows] == [rung.name for rung in RUNGS]
    for row in report.rows:
        if row.rung.name in ("triton", "low", "linear"):
            assert row.unavailable == "its kernels run on CUDA devices, not on cpu"
            assert not row.measured
            continue
        assert [(case.task, case.mode) for case in row.measured] == [("inference", "eager"), ("training", "eager")]
        assert all(case.error is None and case.images_per_second > 0 for case in row.measured)
    assert sizes == list(range(2 * 8 + 1))  # the report is handed out as it grows
    data = json.loads(json.dumps(report.as_dict()))
    assert [rung["name"] for rung in data["rungs"]] == [rung.name for rung in RUNGS]
    assert data["rungs"][0]["published_a100_fp32"] == {"inference": 426, "training": None, "top1": "82.2"}
    assert data["valid"] is True


def test_some_rungs_and_one_task(small) -> None:
    report = climb_ladder(replace(QUICK, tasks=("training",)), ["g", "plain"])
    assert [(row.rung.name, [case.task for case in row.measured]) for row in report.rows] == [
        ("plain", ["training"]),
        ("g", ["training"]),
    ]


def test_what_a_time_limit_cuts_off_is_told(small) -> None:
    report = climb_ladder(QUICK, ["fused", "g"], time_limit=0)
    errors = {case.error for row in report.rows for case in row.measured}
    assert errors == {"not measured: the time limit of 0 s was over"}


def test_a_rung_that_fails_or_is_wrong_leaves_the_others(small, monkeypatch) -> None:
    measure = ladder.measure_case

    def measure_all_but_one(name, module, *others):
        return measure(name, torch.nn.Conv2d(4, 4, 1) if name == "f" else module, *others)

    monkeypatch.setattr(ladder, "measure_case", measure_all_but_one)
    portable = BACKENDS["portable"]

    def scan_forward(*arguments):
        y, *others = portable.scan_forward(*arguments)
        return 1.01 * y, *others

    monkeypatch.setitem(BACKENDS, "portable", portable._replace(scan_forward=scan_forward))
    rows = {row.rung.name: row for row in climb_ladder(QUICK, ["plain", "f", "g"]).rows}
    assert rows["plain"].unavailable.startswith("wrong: error ")
    assert not rows["plain"].measured
    assert all("to have 4 channels, but got 3 channels" in case.error for case in rows["f"].measured)
    assert all(case.error is None for case in rows["g"].measured)


def test_a_wrong_scan_is_not_measured(small, wrong_backend) -> None:
    report = climb_ladder(QUICK, ["g"])
    assert not report.valid
    assert report.rows[0].measured == []


def test_global_state_is_left_as_it_was(small) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    names = list(BACKENDS)
    climb_ladder(QUICK, ["plain"])
    assert torch.equal(torch.get_rng_state(), before)
    assert list(BACKENDS) == names
    assert torch.is_grad_enabled()


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match=r"no rung h: there are plain, triton"):
        climb_ladder(QUICK, ["h"])
    with pytest.raises(ValueError, match=r"measured in inference and training, not in latency"):
        climb_ladder(replace(QUICK, tasks=("latency",)))
