"""Whole runs: what they leave behind, that they repeat, resume, and fail without harm."""

import csv
import errno
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.tasks import warmup_cosine
from vmamba.training import evaluate_checkpoint, load_trained, read_checkpoint, resolve, resume, train
from vmamba.training.config import as_dict, from_dict, read_yaml

TIMES = ("seconds", "img/s", "memory_gib")
# everything random at once: order, augmentation, drop path, mixup, CutMix; and a moving average of the weights
RANDOM = {
    "model": {"drop_path": 0.3},
    "augment": {"rand_augment": "rand-m9-mstd0.5-inc1", "random_erase": 0.5},
    "loss": {"mixup": 0.8, "cutmix": 1.0},
    "schedule": {"epochs": 4},
    "run": {"ema_decay": 0.8},
}


def metrics_of(run_dir, without=TIMES):
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def assert_same_run(one, other):
    assert metrics_of(one) == metrics_of(other)
    for name in ("best.ckpt", "last.ckpt"):
        first, second = (read_checkpoint(run / "checkpoints" / name) for run in (one, other))
        assert first["vmamba"] == second["vmamba"]
        assert first["model"].keys() == second["model"].keys()
        for key, tensor in first["model"].items():
            assert torch.equal(tensor, second["model"][key]), key


def test_run_directory(tiny_config, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config()
    outcome = train(config, tmp_path / "run")
    run_dir = outcome.run_dir
    assert from_dict(read_yaml(run_dir / "config.yaml")) == config
    assert (run_dir / "classes.txt").read_text() == "cat\ndog\nemu\n"

    rows = metrics_of(run_dir, without=())
    assert list(rows[0]) == [
        "epoch",
        "step",
        "lr",
        "train_loss",
        "val_loss",
        "top1",
        "top5",
        "seconds",
        "img/s",
        "memory_gib",
    ]
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6")]
    assert all(float(row["img/s"]) > 0 for row in rows)

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    rates = [event.value for event in events.Scalars("step/lr")]
    schedule = config.schedule
    wanted = [
        config.optim.lr * warmup_cosine(step, steps=6, warmup=3, start=schedule.warmup_from, end=schedule.decay_to)
        for step in range(6)
    ]
    assert rates == pytest.approx(wanted)
    assert [float(row["lr"]) for row in rows] == pytest.approx([wanted[2], wanted[5]], rel=1e-5)
    losses = [event.value for event in events.Scalars("step/train_loss")]
    assert float(rows[1]["train_loss"]) == pytest.approx(np.mean(losses[3:]), rel=1e-5)

    assert len(np.unique(np.asarray(Image.open(outcome.pictures["Confusion matrix"])))) > 20
    # the photos are noise: if they are on the sheet, its grey values are many and common
    sheet = np.asarray(Image.open(outcome.pictures["Predictions"]).convert("L"))
    assert (np.unique(sheet, return_counts=True)[1] > 100).sum() > 100
    assert all(path.is_file() for path in outcome.sample_images)
    lines = capsys.readouterr().out
    assert "epoch   2/2" in lines
    assert not list(run_dir.rglob("*writing*"))


def test_checkpoints_say_everything_prediction_needs(tiny_config, tmp_path):
    outcome = train(tiny_config(), tmp_path / "run")
    assert outcome.part == "val"
    for name in ("best.ckpt", "last.ckpt"):
        model, about = load_trained(tmp_path / "run" / "checkpoints" / name)
        assert not model.training
        assert (about.model, about.classes) == ("vmamba_nano", ("cat", "dog", "emu"))
        assert about.preprocessing.image_size == (32, 32)
    result = evaluate_checkpoint(tmp_path / "run", batch_size=5)
    assert result.images == 12
    assert result.metrics == pytest.approx(outcome.metrics, rel=1e-5)
    best = max(metrics_of(tmp_path / "run"), key=lambda row: (float(row["top1"]), -float(row["val_loss"])))
    assert outcome.best_epoch == int(best["epoch"])
    assert outcome.metrics["top1"] == pytest.approx(float(best["top1"]), rel=1e-5)
    assert outcome.metrics["loss"] == pytest.approx(float(best["val_loss"]), rel=1e-4)


def test_same_seed_same_run_and_another_seed_another(tiny_config, tmp_path):
    for name in ("one", "two"):
        train(tiny_config(**RANDOM), tmp_path / name)
        # what a program did before must not matter
        torch.manual_seed(123)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    train(tiny_config(**{**RANDOM, "run": {"ema_decay": 0.8, "seed": 1}}), tmp_path / "three")
    assert metrics_of(tmp_path / "one") != metrics_of(tmp_path / "three")


def test_full_disk_keeps_the_good_checkpoint_and_the_run_resumes_exactly(tiny_config, tmp_path, monkeypatch):
    train(tiny_config(**RANDOM), tmp_path / "whole")

    real_save, run_dir = torch.save, tmp_path / "broken"

    def disk_full_in_epoch_3(contents, path):
        if contents.get("epoch") == 2:  # Lightning counts from 0
            path.write_bytes(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(contents, path)

    monkeypatch.setattr(torch, "save", disk_full_in_epoch_3)
    with pytest.raises(OSError, match=r"cannot write .*last\.ckpt.*No space left.*earlier file is untouched"):
        train(tiny_config(**RANDOM), run_dir)
    monkeypatch.undo()
    assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["vmamba"]["epoch"] == 2
    assert not list(run_dir.rglob("*writing*"))
    assert len(metrics_of(run_dir)) == 3

    torch.manual_seed(123)
    outcome = resume(run_dir)
    assert_same_run(tmp_path / "whole", run_dir)
    assert outcome.metrics["top1"] >= 0
    with pytest.raises(ValueError, match="is finished: it has done its 4 epochs"):
        resume(run_dir)


def test_interrupted_run_says_how_to_go_on(tiny_config, tmp_path, monkeypatch, capsys):
    from vmamba.tasks import Classification

    steps = []

    def interrupt_in_epoch_2(task, model, batch):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real_loss(task, model, batch)

    real_loss = Classification.training_loss
    monkeypatch.setattr(Classification, "training_loss", interrupt_in_epoch_2)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(tiny_config(), tmp_path / "run")
    assert f"go on with: vmamba train --resume {tmp_path / 'run'}" in capsys.readouterr().out
    monkeypatch.undo()
    resume(tmp_path / "run")
    train(tiny_config(), tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_average_is_what_is_kept(tiny_config, tmp_path):
    train(tiny_config(run={"ema_decay": 0.8}), tmp_path / "run")
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    name = "head.fc.weight"
    assert torch.equal(last["model"][name], last["state_dict"][f"averaged.module.{name}"])
    assert not torch.equal(last["model"][name], last["state_dict"][f"model.{name}"])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_any_timm_model_at_any_precision(tiny_config, tmp_path, precision):
    plain = as_dict(tiny_config(schedule={"epochs": 1}, run={"precision": precision}))
    config = from_dict({**plain, "model": {"name": "test_vit", "kwargs": {"img_size": 32}}})
    outcome = train(config, tmp_path / "run")
    assert outcome.metrics["loss"] > 0


def test_fine_tuning_keeps_the_body_and_makes_a_new_head(tiny_config, make_photos, tmp_path):
    train(tiny_config(), tmp_path / "first")
    two = make_photos("two", {"owl": 4, "yak": 4})
    source = {"source": str(two), "val_fraction": 0.25}
    weights = str(tmp_path / "first" / "checkpoints" / "best.ckpt")
    # a step so small that fp32 weights do not move
    still = {"lr": 1e-30, "weight_decay": 0.0}
    config = tiny_config(model={"weights": weights}, data=source, optim=still, schedule={"epochs": 1})
    train(config, tmp_path / "second")
    before, after = (load_trained(tmp_path / run)[0].state_dict() for run in ("first", "second"))
    assert before["head.fc.weight"].shape[0] == 3
    assert after["head.fc.weight"].shape[0] == 2
    for name, tensor in before.items():
        if not name.startswith("head.fc"):
            assert torch.equal(tensor, after[name]), name


def test_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path):
    config = tiny_config(optim={"name": "sgd", "lr": 1e30, "clip_norm": 0.0}, schedule={"warmup_epochs": 0})
    with pytest.raises(FloatingPointError, match=r"loss became nan at step 2 with learning rate 9.33e\+29"):
        train(config, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_directory_that_holds_a_run_is_not_touched(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine")
    with pytest.raises(FileExistsError, match=r"already exists.*--out.*--resume"):
        train(tiny_config(), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_an_unwritable_directory_is_named(tiny_config, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(OSError, match="file"):
        train(tiny_config(), tmp_path / "file" / "run")


@pytest.mark.parametrize("module", ["lightning.pytorch", "matplotlib.figure", "tensorboard", "rich"])
def test_missing_extra_is_said_before_anything_is_written(tiny_config, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vmamba\[train\]'"):
        train(tiny_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name": "vmamba_nona"}}, "no model 'vmamba_nona'; did you mean vmamba_nano"),
        ({"model": {"kwargs": {"colour": 3}}}, "vmamba_nano cannot be made with.*colour"),
        ({"model": {"weights": "nothing.pth"}}, r"nothing\.pth"),
        ({"data": {"source": "nowhere"}}, "no such data folder: nowhere"),
        ({"data": {"batch_size": 3}, "loss": {"mixup": 0.8}}, "even number of images in a pass"),
        ({"data": {"batch_size": 64}, "loss": {"mixup": 0.8}}, "at most the 12 training images"),
        ({"augment": {"rand_augment": "autumn"}}, "rand_augment must be a timm policy"),
        ({"optim": {"name": "adamwow"}}, "no optimiser 'adamwow'"),
        ({"run": {"device": "cpu", "accumulate": 3}}, r"run.accumulate \(3\) must divide it"),
        (
            {"schedule": {"epochs": 3}, "run": {"evaluate_every": 2}},
            r"evaluate_every \(2\) must divide schedule.epochs",
        ),
        ({"run": {"mode": "graphs", "accumulate": 2}}, "mode=graphs does not go with run.accumulate=2"),
        ({"data": {"batch_size": 24}, "run": {"device": "cpu", "accumulate": 2}}, "24 is more than the 12 training"),
        ({"loss": {"mixup": 0.8}, "run": {"device": "cpu", "accumulate": 4}}, "even number of images in a pass"),
        ({"run": {"device": "cpu", "strategy": "fsdp", "precision": "fp16"}}, "fsdp does not go with fp16"),
        ({"model": {"weights": "pretrained"}}, "no pretrained weights of vmamba_nano"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(tiny_config, tmp_path, sections, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tiny_config(**sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_device_that_is_not_there(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="run.device=cuda: this machine has only"):
        train(tiny_config(run={"device": "cuda"}), tmp_path / "run")


def test_model_that_does_not_take_the_image_size(tiny_config, tmp_path):
    plain = as_dict(tiny_config(data={"image_size": 40}))
    config = from_dict({**plain, "model": {"name": "test_vit"}})
    with pytest.raises(ValueError, match="test_vit does not take images of 40 x 40 px"):
        train(config, tmp_path / "run")


def test_resuming_where_nothing_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        resume(tmp_path)


def test_resuming_when_the_classes_have_changed(tiny_config, photos, make_photos, tmp_path, monkeypatch):
    real_save = torch.save

    def stop_after_epoch_1(contents, path):
        if contents.get("epoch") == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(contents, path)

    monkeypatch.setattr(torch, "save", stop_after_epoch_1)
    with pytest.raises(OSError, match="No space left"):
        train(tiny_config(), tmp_path / "run")
    monkeypatch.undo()
    make_photos("photos", {"train/gnu": 2, "val/gnu": 2})
    with pytest.raises(ValueError, match="other classes now than when the run .* began: gnu"):
        resume(tmp_path / "run")


@pytest.mark.slow
def test_digits_are_learned(tmp_path):
    outcome = train(resolve({"schedule": {"epochs": 4}}), tmp_path / "run")
    assert outcome.part == "test"
    assert outcome.images == 359
    assert outcome.metrics["top1"] > 88
    assert evaluate_checkpoint(tmp_path / "run").metrics == pytest.approx(outcome.metrics, rel=1e-4)
