"""Whole networks side by side: every row is there, failures are told, a wrong scan makes figures invalid."""

import json

import pytest
import timm
import torch
from torch import nn

from vmamba import list_models
from vmamba.analysis import ModelSettings, measure_models
from vmamba.analysis.throughput import TASKS, _is_convolutional

QUICK = {"device": "cpu", "batch": 2, "size": 32, "repeats": 2, "round_seconds": 0.001}


class Refusing(nn.Module):
    """A network that no size suits."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        raise RuntimeError(f"no room for {len(x)} images")


@pytest.fixture
def networks(tiny):
    peer = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.LazyLinear(3))
    peer(torch.randn(1, 3, 32, 32))
    return {"tiny": tiny, "peer": peer}


def test_every_task_of_every_model_has_a_row(networks):
    told = []
    report = measure_models(networks, ModelSettings(**QUICK), told.append)
    assert [(row.task, row.model, row.mode) for row in report.rows] == [
        (task, name, "eager") for task in TASKS for name in networks
    ]
    assert report.valid
    for row in report.rows:
        assert row.error is None
        assert 0 < row.seconds.low <= row.seconds.median <= row.seconds.high
        assert row.batch == (1 if row.task == "latency" else 2)
        assert row.images_per_second == row.batch / row.seconds.median
        ratio = report.relative(row)
        assert ratio == 1 if row.model == "tiny" else ratio > 0
    first, second = report.rows[:2]
    assert report.relative(second) == first.seconds.median / second.seconds.median
    assert any("training: preparing training tiny eager" in line for line in told)


def test_the_report_is_plain_data(networks):
    report = measure_models(networks, ModelSettings(**QUICK, tasks=("latency",)))
    data = json.loads(json.dumps(report.as_dict()))
    assert data["kind"] == "models"
    assert data["valid"] is True
    assert data["baseline"] == "tiny"
    assert data["settings"]["batch"] == 2
    assert data["settings"]["dtype"] == "fp32"
    assert data["environment"]["torch"] == torch.__version__
    assert "right" in data["correctness"]
    row = data["rows"][1]
    assert set(row) == {
        *("task", "model", "mode", "batch", "channels_last", "median_ms", "low_ms", "high_ms"),
        *("images_per_second", "peak_memory_gb", "relative", "error"),
    }
    assert row["images_per_second"] == pytest.approx(1000 / row["median_ms"])


def test_modules_and_global_state_are_left_as_they_were(networks):
    tiny = networks["tiny"].eval()
    weights = {name: t.clone() for name, t in tiny.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    cudnn = torch.backends.cudnn
    flags = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, torch.is_grad_enabled()
    measure_models(
        networks, ModelSettings(**QUICK, tf32=True, optimizer="adamw", tasks=("training",), dtype="bf16-weights")
    )
    assert not tiny.training
    assert all(p.grad is None for p in tiny.parameters())
    assert all(torch.equal(t, weights[name]) for name, t in tiny.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)
    after = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, torch.is_grad_enabled()
    assert after == flags


def test_gradients_of_a_module_given_are_not_there_when_it_is_measured(networks):
    class Looking(nn.Linear):
        def forward(self, x):
            assert self.weight.grad is None
            return super().forward(x.mean((2, 3)))

    looking = Looking(3, 2)
    looking.weight.grad = torch.ones(2, 3)
    report = measure_models({"looking": looking}, ModelSettings(**QUICK, tasks=("inference",)))
    assert report.rows[0].error is None
    assert torch.equal(looking.weight.grad, torch.ones(2, 3))


def test_a_model_that_fails_has_the_reason_in_its_row(networks):
    report = measure_models({**networks, "refusing": Refusing()}, ModelSettings(**QUICK, tasks=("inference",)))
    *others, refusing = report.rows
    assert refusing.error == "RuntimeError: no room for 2 images"
    assert refusing.seconds is refusing.images_per_second is report.relative(refusing) is None
    assert all(row.error is None and report.relative(row) for row in others)


def test_a_wrong_scan_makes_the_figures_invalid(networks, wrong_backend):
    report = measure_models(networks, ModelSettings(**QUICK, tasks=("inference",)))
    assert not report.valid
    assert all(row.seconds is not None and report.relative(row) is None for row in report.rows)
    assert report.as_dict()["valid"] is False
    assert "WRONG" in report.as_dict()["correctness"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "bf16-weights"])
def test_networks_run_in_the_dtype_asked_for(dtype):
    seen = {}

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            y = self.fc(x.mean((2, 3)))
            seen.update(images=x.dtype, weights=self.fc.weight.dtype, outputs=y.dtype)
            return y

    report = measure_models({"looking": Looking()}, ModelSettings(**QUICK, tasks=("inference",), dtype=dtype))
    assert report.rows[0].error is None
    low = {"fp16": torch.float16, "fp32": torch.float32}.get(dtype, torch.bfloat16)
    weights = torch.bfloat16 if dtype == "bf16-weights" else torch.float32
    assert seen == {"images": weights, "weights": weights, "outputs": low}


def test_compiled_networks_are_measured(monkeypatch):
    """That the mode reaches torch.compile, at a fixed size; what it compiles to is tested with the models."""
    asked = []

    def compile_(model, **options):
        asked.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    names = {"net": nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))}
    report = measure_models(names, ModelSettings(**QUICK, tasks=("training",), modes=("eager", "compile")))
    assert [row.mode for row in report.rows] == ["eager", "compile"]
    assert asked == [{"dynamic": False, "mode": None}]


def test_channels_last_is_for_convolutional_networks_unless_said():
    convolutional = {name: _is_convolutional(timm.create_model(name)) for name in ("resnet10t", "convnext_atto")}
    assert convolutional == dict.fromkeys(convolutional, True)
    assert not _is_convolutional(timm.create_model("swin_s3_tiny_224"))
    assert not any(_is_convolutional(timm.create_model(name, device="meta")) for name in list_models())
    settings = ModelSettings(**QUICK, tasks=("latency",), channels_last="on")
    assert measure_models(["vmamba_nano"], settings).rows[0].channels_last


def test_models_of_a_fixed_size_are_made_for_the_size_asked_for():
    settings = ModelSettings(**{**QUICK, "size": 64}, tasks=("latency",))
    report = measure_models(["deit_tiny_patch16_224", "vmamba_nano"], settings)
    assert [row.error for row in report.rows] == [None, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("inferance",)}, "choose from inference, latency, training"),
        ({"tasks": ()}, "tasks must name at least one"),
        ({"modes": ("jit",)}, "choose from eager, compile, graphs"),
        ({"modes": ("graphs",)}, "graphs needs CUDA"),
        ({"dtype": "int8"}, "choose from fp32, bf16"),
        ({"channels_last": "perhaps"}, "choose from auto, on, off"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"repeats": 0}, "repeats must be at least 1, not 0"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelSettings(**{**QUICK, **changes})


def test_names_are_checked_before_anything_is_measured():
    told = []
    with pytest.raises(ValueError, match="did you mean vmamba_nano"):
        measure_models(["convnext_atto", "vmamba_nona"], ModelSettings(**QUICK), told.append)
    with pytest.raises(ValueError, match="at least one model"):
        measure_models([], ModelSettings(**QUICK), told.append)
    assert told == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_modes_on_cuda():
    settings = ModelSettings(device="cuda", batch=4, size=64, repeats=2, round_seconds=0.01, modes=("eager", "graphs"))
    report = measure_models(["vmamba_nano", "resnet10t"], settings)
    assert {row.error for row in report.rows} == {None}
    assert all((row.peak_memory or 0) > 0 for row in report.rows if row.mode == "eager")
