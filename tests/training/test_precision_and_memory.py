"""Half precision with skipped steps, accumulation, checkpointed gradients, compilation, averaged weights."""

import csv
import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vmamba.data import Preprocessing
from vmamba.tasks import Chart
from vmamba.training import About, evaluate_checkpoint, load_trained, read_checkpoint, resolve, train
from vmamba.training.distributed import World
from vmamba.training.lightning_engine import fit
from vmamba.training.lightning_module import TaskModule
from vmamba.training.machine import Machine, matrix_precision
from vmamba.training.recorder import Recorder


def rows_of(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


class LineScores:
    def __init__(self):
        self.errors = []

    def update(self, model, batch):
        x, y = batch
        self.errors.append((model(x).float() - y).square())

    def compute(self):
        loss = float(torch.cat(self.errors).mean())
        return {"loss": loss, "fit": 1 / (1 + loss)}


class Watched:
    """Fit y = 3 x - 1 and remember the weights before every step; ``blow_up`` maps steps to factors on the loss."""

    metric = "fit"
    chart = Chart("fit.png", "Fit", "", {"fit": "fit"})
    trains_at_one_size = evaluates_at_one_size = True

    def __init__(self, blow_up):
        self.blow_up = blow_up
        self.before = []

    def training_loss(self, model, batch):
        self.before.append(model.weight.detach().clone())
        x, y = batch
        loss = (model(x).float() - y).square().mean()
        return loss * self.blow_up.get(len(self.before), 1.0)

    def scores(self):
        return LineScores()


def fit_line(tmp_path, task, precision, epochs=8):
    x = torch.linspace(-1, 1, 64)[:, None]
    loader = DataLoader(TensorDataset(x, 3 * x - 1), batch_size=16)
    config = resolve(
        {
            "optim": {"lr": 0.5, "weight_decay": 0.0},
            "schedule": {"epochs": epochs, "warmup_epochs": 0},
            "run": {"ema_decay": 0.5},
        }
    )
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    module = TaskModule(model, task, config, 4, World())
    (tmp_path / "checkpoints").mkdir()
    about = About("line", {}, (), (), Preprocessing(), {}, epoch=0, metrics={})
    machine = Machine("cpu", precision)
    recorder = Recorder(tmp_path, about, machine=machine, world=World(), images_per_step=16, finished_epochs=0)
    fit(module, recorder, loader, loader, machine)
    return [*task.before, model.weight.detach().clone()]


def test_fp16_skips_a_step_that_overflows_and_goes_on(tmp_path):
    # the loss itself stays finite; its gradient, times the scale, does not fit into fp16
    task = Watched({9: 1e6, 10: 1e6, 17: float("inf")})
    weights = fit_line(tmp_path, task, "fp16")
    skipped = [bool(torch.equal(before, after)) for before, after in itertools.pairwise(weights)]
    assert all(skipped[step - 1] for step in (9, 10, 17))
    # the scale starts too high and is halved until it fits
    assert sum(skipped) <= 8
    assert not any(skipped[18:])
    rows = rows_of(tmp_path)
    assert [row["skipped_steps"] for row in rows] == [sum(skipped[i : i + 4]) for i in range(0, 32, 4)]
    last = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    # the average with decay 1/2, of the steps that were taken
    average = weights[0]
    for after, skip in zip(weights[1:], skipped, strict=True):
        average = average if skip else (average + after) / 2
    torch.testing.assert_close(last["model"]["weight"], average)
    assert last["MixedPrecision"]["scale"] == 65536.0 / 2 ** sum(skipped)
    assert all(tensor.isfinite().all() for tensor in last["model"].values())
    assert rows[-1]["fit"] > 0.9


def test_fp16_stops_when_every_step_overflows(tmp_path):
    with pytest.raises(FloatingPointError, match="loss became inf at step 24"):
        fit_line(tmp_path, Watched({step: float("inf") for step in range(5, 99)}), "fp16", epochs=20)


def test_without_fp16_the_first_infinite_loss_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="loss became inf at step 3 "):
        fit_line(tmp_path, Watched({3: float("inf")}), "bf16")


def test_vmamba_in_fp16(tiny_config, tmp_path):
    outcome = train(tiny_config(run={"precision": "fp16"}), tmp_path / "run")
    assert 0 <= rows_of(tmp_path / "run")[0]["skipped_steps"] <= 3
    assert outcome.metrics["loss"] > 0


def test_tf32_is_asked_for_and_given_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with matrix_precision("tf32"):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        with matrix_precision("fp32"):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_accumulated_passes_are_one_step(tiny_config, tmp_path):
    for passes in (1, 2, 4):
        train(tiny_config(run={"accumulate": passes, "ema_decay": 0.5}), tmp_path / str(passes))
    whole, *parts = (rows_of(tmp_path / name) for name in "124")
    for rows in parts:
        for row, wanted in zip(rows, whole, strict=True):
            assert (row["step"], row["lr"]) == (wanted["step"], wanted["lr"])
            for name in ("train_loss", "val_loss", "ema_val_loss"):
                assert row[name] == pytest.approx(wanted[name], rel=1e-4), name


def test_checkpointed_gradients_change_nothing(tiny_config, tmp_path, monkeypatch):
    recomputed = []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: recomputed.append(1) or real(*a, **k))
    for flag in (False, True):
        train(tiny_config(model={"drop_path": 0.3}, run={"grad_checkpointing": flag}), tmp_path / str(flag))
        assert bool(recomputed) == flag
    kept, again = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["model"] for name in ("False", "True")
    )
    for name, tensor in kept.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(tiny_config, tmp_path, monkeypatch):
    torch._dynamo.reset()
    # traces as inductor does and leaves out the C++ compiler, which takes minutes
    real, asked = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda module, **options: asked.append(options) or real(module, backend="aot_eager")
    )
    ready = []
    monkeypatch.setattr(TaskModule, "_compile_kernels", lambda self, images: ready.append(images.shape))
    for mode in ("eager", "compile"):
        train(tiny_config(run={"mode": mode, "ema_decay": 0.5}), tmp_path / mode)
    assert asked == [{"dynamic": False, "mode": None}]
    assert ready == [(4, 3, 32, 32)]
    plain, compiled = (rows_of(tmp_path / name) for name in ("eager", "compile"))
    for row, wanted in zip(compiled, plain, strict=True):
        assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-3)
        assert row["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-3)
    assert load_trained(tmp_path / "compile")[1].model == "vmamba_nano"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_run_in_graphs_is_the_same_run(tiny_config, tmp_path, in_memory):
    sections = {"data": {"in_memory": in_memory}, "schedule": {"epochs": 6}}
    for mode in ("eager", "graphs"):
        run = {"device": "cuda", "mode": mode, "ema_decay": 0.5, "precision": "fp32"}
        train(tiny_config(run=run, **sections), tmp_path / mode)
    for row, wanted in zip(rows_of(tmp_path / "graphs"), rows_of(tmp_path / "eager"), strict=True):
        for name in ("train_loss", "val_loss", "ema_val_loss"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-3)


def test_graphs_need_one_process_with_a_gpu(tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"run\.mode=graphs needs CUDA.*not cpu"):
        train(tiny_config(run={"mode": "graphs"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluated_every_other_epoch_a_run_learns_the_same(tiny_config, tmp_path):
    for every in (1, 2):
        train(tiny_config(schedule={"epochs": 4}, run={"evaluate_every": every}), tmp_path / str(every))
    each, other = (rows_of(tmp_path / name) for name in ("1", "2"))
    assert [row["epoch"] for row in other] == [2, 4]
    for row, (before, wanted) in zip(other, (each[:2], each[2:]), strict=True):
        assert row["train_loss"] == pytest.approx((before["train_loss"] + wanted["train_loss"]) / 2, rel=1e-4)
        assert all(row[name] == wanted[name] for name in ("step", "lr", "val_loss", "top1"))


def test_averaged_weights_are_measured_beside_the_raw_ones(tiny_config, tmp_path):
    train(tiny_config(run={"ema_decay": 0.99}, schedule={"epochs": 3}), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    names = ["val_loss", "top1", "top5", "ema_val_loss", "ema_top1", "ema_top5"]
    assert [name for name in rows[0] if name in names] == names
    assert any(row["val_loss"] != row["ema_val_loss"] for row in rows)
    # the weights kept are whichever did better, in whichever epoch
    best = max(rows, key=lambda row: max((row["top1"], -row["val_loss"]), (row["ema_top1"], -row["ema_val_loss"])))
    raw, averaged = ((best[f"{prefix}top1"], -best[f"{prefix}val_loss"]) for prefix in ("", "ema_"))
    _, about = load_trained(tmp_path / "run")
    assert (about.epoch, about.averaged) == (best["epoch"], averaged > raw)
    measured = evaluate_checkpoint(tmp_path / "run").metrics
    assert measured["loss"] == pytest.approx(-max(raw, averaged)[1], rel=1e-4)
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert last["vmamba"]["averaged"]
    assert last["vmamba"]["metrics"]["loss"] == pytest.approx(rows[-1]["ema_val_loss"], rel=1e-5)
