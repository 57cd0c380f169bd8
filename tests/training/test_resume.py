"""Killed at any moment, a run goes on from its last checkpoint and ends with the bits of one that was never stopped."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.training import read_checkpoint, resolve, resume, train
from vmamba.training.config import to_yaml

KILLED_RUN = Path(__file__).with_name("killed_run.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TIMES = ("seconds", "img/s", "memory_gib")


@pytest.fixture(scope="module")
def random_config(tmp_path_factory):
    """Everything random at once, an average of the weights, two epochs of six steps, a checkpoint every two steps."""
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog", "emu"):
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = generator.integers(0, 256, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")

    def make(**changes):
        return resolve(
            {
                "model": {"kwargs": {"dims": 8, "depths": [1, 1, 1, 1]}, "name": "vmamba_nano", "drop_path": 0.3},
                "data": {"source": str(root), "image_size": 32, "batch_size": 2, "workers": 0},
                "augment": {"rand_augment": "rand-m9-mstd0.5-inc1", "random_erase": 0.5},
                "loss": {"mixup": 0.8, "cutmix": 1.0},
                "schedule": {"epochs": 2, "warmup_epochs": 1},
                "run": {"device": "cpu", "ema_decay": 0.8, "checkpoint_every": 2, "threads": 1},
            },
            changes,
        )

    return make


@pytest.fixture(scope="module")
def whole(random_config, tmp_path_factory):
    """The run that nobody stopped."""
    return train(random_config(), tmp_path_factory.mktemp("whole") / "run").run_dir


def metrics_of(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def assert_same_run(one, other, settings=True):
    assert metrics_of(one) == metrics_of(other)
    for name in ("best.ckpt", "last.ckpt"):
        first, second = (read_checkpoint(run / "checkpoints" / name) for run in (one, other))
        for about in (first["vmamba"], second["vmamba"]):
            if not settings:
                about.pop("config")
        assert first["vmamba"] == second["vmamba"]
        assert first["model"].keys() == second["model"].keys()
        for key, tensor in first["model"].items():
            assert torch.equal(tensor, second["model"][key]), key
    states = [read_checkpoint(run / "checkpoints" / "last.ckpt")["optimizer_states"] for run in (one, other)]
    for index, state in states[0][0]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, states[1][0]["state"][index][name]), (index, name)


@pytest.fixture
def killed(tmp_path):
    """A function: run ``config`` in a process that kills itself at ``moment``, and return the run directory."""

    def run(config, moment):
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        done = subprocess.run(
            [sys.executable, str(KILLED_RUN), str(tmp_path / "config.yaml"), str(tmp_path / "killed"), moment],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        return tmp_path / "killed"

    return run


# With six steps an epoch and a checkpoint every two, files are written in this order: last at step 2, last at 4, best
# and last at the end of epoch 1, and so on.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("step:2", None),  # before the first checkpoint
        ("step:6", 4),  # in the last step of an epoch
        ("step:10", 8),
        ("validation", 4),
        ("write:2", 2),  # half a last.ckpt
        ("after:3", 4),  # best.ckpt is there, last.ckpt of the same epoch is not
        ("after:4", 6),  # just after the end of an epoch
    ],
)
def test_killed_for_real(random_config, killed, whole, moment, step):
    run_dir = killed(random_config(), moment)
    last = run_dir / "checkpoints" / "last.ckpt"
    assert (read_checkpoint(last)["global_step"] if last.is_file() else None) == step
    torch.manual_seed(123)
    resume(run_dir)
    assert not list(run_dir.rglob("*writing*"))
    assert_same_run(whole, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "step"), [("step:4", 2), ("step:7", 6), ("step:9", 8)])
def test_killed_between_evaluations(random_config, killed, tmp_path, moment, step):
    config = random_config(run={"evaluate_every": 2})
    run_dir = killed(config, moment)
    assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == step
    resume(run_dir)
    train(config, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", run_dir)


@pytest.mark.slow
def test_killed_with_accumulation_and_loading_processes(random_config, killed, tmp_path):
    # without mixing, a pass may be a single image
    config = random_config(data={"workers": 1}, run={"accumulate": 2}, loss={"mixup": 0.0, "cutmix": 0.0})
    run_dir = killed(config, "step:18")
    assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == 8
    resume(run_dir)
    train(config, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", run_dir)


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_first(random_config, whole, tmp_path):
    config = random_config(run={"checkpoint_every": 0})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    run_dir = tmp_path / "stopped"
    command = [
        sys.executable,
        "-m",
        "vmamba",
        "train",
        "--config",
        str(tmp_path / "config.yaml"),
        "--out",
        str(run_dir),
    ]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(run_dir.glob("tensorboard/*")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    step = int(re.search(r"stopped by SIGTERM after step (\d+), checkpoint written; go on with: (.*)", output)[1])
    assert f"vmamba train --resume {run_dir}" in output
    assert "Traceback" not in errors
    assert 1 <= step < 12
    assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == step
    resume(run_dir)
    assert_same_run(whole, run_dir, settings=False)


def test_sigterm_in_the_last_validation_leaves_the_report_to_a_resume(random_config, whole, tmp_path, capsys):
    from lightning.pytorch import Callback

    class Asked(Callback):
        def on_validation_start(self, trainer, module):
            if trainer.current_epoch == trainer.max_epochs - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train(random_config(), run_dir, callbacks=lambda: [Asked()])
    assert stop.value.code == 143
    assert f"go on with: vmamba train --resume {run_dir}" in capsys.readouterr().out
    assert not (run_dir / "report").exists()
    resume(run_dir)
    assert_same_run(whole, run_dir)


def test_a_report_that_is_missing_is_written(random_config, tmp_path):
    outcome = train(random_config(), tmp_path / "run")
    outcome.report.unlink()
    again = resume(tmp_path / "run")
    assert again == outcome
    assert again.report.is_file()
    with pytest.raises(ValueError, match="is finished"):
        resume(tmp_path / "run")
