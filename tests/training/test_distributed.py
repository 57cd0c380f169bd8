"""Two processes under torchrun (gloo, CPU) against one: the same steps, the same metrics, one writer."""

import csv
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch

from vmamba import list_models
from vmamba.training import evaluate_checkpoint, read_checkpoint, resolve, resume, train
from vmamba.training.config import to_yaml
from vmamba.training.distributed import World, is_first_process, join_world, launched_processes

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]


def torchrun(*arguments):
    return subprocess.Popen(
        [sys.executable, *TORCHRUN, "--rdzv-endpoint", "localhost:0", "-m", "vmamba", "train", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    return output


def rows_of(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def shared_config(make_photos, tmp_path):
    """A run whose validation images do not divide by two processes or by their batches: 17, in batches of 2."""
    train_counts, val_counts = {"cat": 7, "dog": 6, "emu": 6}, {"cat": 7, "dog": 6, "emu": 4}
    counts = {f"train/{name}": n for name, n in train_counts.items()} | {
        f"val/{name}": n for name, n in val_counts.items()
    }
    photos = make_photos("photos", counts)

    def make(in_memory=False, **run):
        config = resolve(
            {
                "model": {"name": "vmamba_nano", "drop_path": 0.0, "kwargs": {"dims": 8, "depths": [1, 1, 1, 1]}},
                "data": {
                    "source": str(photos),
                    "image_size": 32,
                    "batch_size": 4,
                    "workers": 0,
                    "in_memory": in_memory,
                },
                "schedule": {"epochs": 2, "warmup_epochs": 1},
                "run": {"device": "cpu", "ema_decay": 0.8, "threads": 1, **run},
            }
        )
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        return config

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "in_memory"), [("ddp", False), ("ddp", True), ("fsdp", False)])
def test_two_processes_are_one_run(shared_config, tmp_path, strategy, in_memory):
    config = shared_config(in_memory=in_memory, strategy=strategy)
    output = finish(torchrun("--config", tmp_path / "config.yaml", "--out", tmp_path / "two"))
    train(config, tmp_path / "one")
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    for row, wanted in zip(two, one, strict=True):
        assert (row["step"], row["lr"]) == (wanted["step"], wanted["lr"])
        for name in ("train_loss", "val_loss", "ema_val_loss"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-4), name
        # shares of 17 images: none counted twice, none left out
        for name in ("top1", "top5", "ema_top1", "ema_top5"):
            assert row[name] * 17 / 100 == pytest.approx(round(row[name] * 17 / 100), abs=1e-3)
            assert row[name] == pytest.approx(wanted[name], rel=1e-5), name
    weights = [read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt")["model"] for run in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)
    # one process prints, and once
    assert "cpu x 2 processes" in output
    for line in (r"^epoch   1/2", r"^epoch   2/2", r"^validation accuracy", r"^run directory"):
        assert len(re.findall(line, output, re.MULTILINE)) == 1, line
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("two")] == ["two"]
    # a run of several processes goes on, or is evaluated, with one
    assert evaluate_checkpoint(tmp_path / "two").images == 17


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_stop_together_at_sigterm_and_the_run_goes_on(shared_config, tmp_path, strategy):
    shared_config(checkpoint_every=0, strategy=strategy)
    run_dir = tmp_path / "stopped"
    arguments = ["--config", tmp_path / "config.yaml", "--out", run_dir, "--epochs", "500"]
    process = torchrun(*arguments)
    while not (run_dir / "metrics.csv").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    step = int(re.search(r"stopped by SIGTERM after step (\d+), checkpoint written", output)[1])
    assert "Error" not in errors.replace("ChildFailedError", "")
    assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == step
    path = run_dir / "config.yaml"
    epochs = -(-step // 4) + 1
    path.write_text(path.read_text().replace("epochs: 500", f"epochs: {epochs}"))
    if strategy == "fsdp":
        assert f"resumed in epoch {step // 4 + 1} after step {step}" in finish(torchrun("--resume", run_dir))
    else:  # what is left may be done by one process
        resume(run_dir)
    assert [row["step"] for row in rows_of(run_dir)] == [4.0 * epoch for epoch in range(1, epochs + 1)]


@pytest.mark.slow
def test_mistakes_of_several_processes(shared_config, tmp_path):
    shared_config()
    process = torchrun("--config", tmp_path / "config.yaml", "--out", tmp_path / "run", "--batch-size", "5")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "2 processes times run.accumulate 1 must divide it, and 2 does not divide 5" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", list_models())
def test_every_parameter_gets_a_gradient(name, one_thread):
    # or DDP would wait for it, or need to search for it at every step
    model = timm.create_model(name, dims=8, depths=[1, 1, 1, 1], num_classes=3)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_single_process_needs_nobody():
    world = World()
    assert launched_processes() == 1
    assert is_first_process()
    with join_world("cpu") as alone:
        assert alone == world
    assert not torch.distributed.is_initialized()
    assert world.any(True)
    assert not world.any(False)
    assert world.from_first("x") == "x"
    assert torch.equal(world.mean(torch.ones(2)), torch.ones(2))
