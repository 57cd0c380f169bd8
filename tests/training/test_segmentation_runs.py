"""Segmentation on the engine: whole runs on a street of a few tiny pictures, resumed, evaluated, used."""

import csv
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vmamba.cli import main
from vmamba.data.segmentation import class_shares, find_segmentation, read_index_mask
from vmamba.models import save_checkpoint
from vmamba.tasks import Segmentation
from vmamba.training import load_trained, read_checkpoint, resolve, resume, train
from vmamba.training.config import as_dict, from_dict, read_yaml, to_yaml
from vmamba.training.segmentation import SegmentationJob
from vmamba.training.segmented_files import evaluate_segmentation

NAMES = ("sky", "road", "car")
COLOURS = np.array([(90, 160, 240), (90, 90, 90), (220, 30, 40), (0, 0, 0)], dtype=np.uint8)
TIMES = ("seconds", "img/s", "memory_gib")


def make_street(root, counts):
    """Sky above a road with a red car, and a line without label; masks of index PNGs, 255 for none."""
    generator = np.random.default_rng(0)
    for part, count in counts.items():
        for folder in ("images", "masks"):
            (root / folder / part).mkdir(parents=True)
        for i in range(count):
            horizon, x, y = generator.integers(15, 30), generator.integers(0, 40), generator.integers(30, 36)
            mask = np.zeros((48, 64), dtype=np.uint8)
            mask[horizon:] = 1
            mask[y : y + 8, x : x + 20] = 2
            mask[horizon] = 255
            photo = COLOURS[mask.clip(max=3)] + generator.integers(0, 12, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(photo).save(root / "images" / part / f"{i}.png")
            Image.fromarray(mask).save(root / "masks" / part / f"{i}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return root


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    return make_street(tmp_path_factory.mktemp("data") / "street", {"train": 7, "val": 3})


@pytest.fixture(scope="module")
def street_config(street):
    """A function: the small recipe on a network of a few thousand parameters, sections laid over it."""

    def make(**sections):
        return resolve(
            {
                "task": "segmentation",
                "model": {"name": "vmamba_nano", "drop_path": 0.2, "kwargs": {"dims": 8, "depths": [1, 1, 1, 1]}},
                "data": {"source": str(street), "batch_size": 4, "workers": 0},
                "segmentation": {"channels": 16, "auxiliary_channels": 8, "augment": {"crop": [32, 48]}},
                "optim": {"lr": 1e-2},
                "schedule": {"iterations": 8, "validate_every": 4, "warmup_iterations": 2},
                "run": {"device": "cpu", "threads": 1, "ema_decay": 0.5, "checkpoint_every": 3},
            },
            sections,
        )

    return make


@pytest.fixture(scope="module")
def finished(street_config, tmp_path_factory):
    """A run long enough to learn three colours."""
    schedule = {"iterations": 100, "validate_every": 50}
    config = street_config(schedule=schedule, model={"drop_path": 0.0}, segmentation={"dropout": 0.0})
    return config, train(config, tmp_path_factory.mktemp("finished") / "run")


def rows_of(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(one, other):
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(run)] for run in (one, other)]
    assert rows[0] == rows[1]
    for name in ("best.ckpt", "last.ckpt"):
        first, second = (read_checkpoint(run / "checkpoints" / name) for run in (one, other))
        assert first["vmamba"] == second["vmamba"]
        assert first["model"].keys() == second["model"].keys()
        for key, tensor in first["model"].items():
            assert torch.equal(tensor, second["model"][key]), key


def test_balanced_classes_count_by_how_rare_they_are(street_config):
    config = street_config(segmentation={"class_weights": "balanced"})
    weights = SegmentationJob(config).task.class_weights
    shares = class_shares(SegmentationJob(config).files["train"])
    assert weights == pytest.approx([1 / math.log(1.02 + share) for share in shares])
    assert weights[NAMES.index("car")] == max(weights) > 4
    assert SegmentationJob(street_config()).task.class_weights is None


def test_it_learns_and_leaves_a_whole_run_directory(finished, street):
    config, outcome = finished
    run_dir = outcome.run_dir
    assert from_dict(read_yaml(run_dir / "config.yaml")) == config
    assert set(read_yaml(run_dir / "config.yaml")) == {
        "task", "model", "data", "segmentation", "optim", "schedule", "run"
    }  # fmt: skip
    assert (run_dir / "classes.txt").read_text().split() == list(NAMES)
    rows = rows_of(run_dir)
    own = ["val_loss", "miou", "macc", "accuracy"]
    assert list(rows[0])[:12] == [
        "epoch", "step", "lr", "train_loss", *own, *(f"ema_{name}" for name in own)
    ]  # fmt: skip
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "50"), ("2", "100")]
    assert (outcome.part, outcome.images) == ("val", 3)
    assert outcome.metrics["miou"] > 70
    assert outcome.metrics["miou"] == pytest.approx(
        max(float(row[name]) for row in rows for name in ("miou", "ema_miou")), rel=1e-4
    )
    report = outcome.report.read_text()
    assert f"| mean IoU on the 3 validation images | {outcome.metrics['miou']:.2f} % |" in report
    assert re.search(r"^\| car \| \d+\.\d\d \| \d+\.\d\d \| \d+ \|$", report, re.MULTILINE)
    for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", report):
        assert len(np.unique(np.asarray(Image.open(outcome.report.parent / name)))) > 20, name
    assert {"loss.png", "iou.png", "predictions.png"} <= {path.name for path in outcome.report.parent.iterdir()}
    assert outcome.sample_images == tuple(street / "images" / "val" / f"{i}.png" for i in range(3))


def test_its_checkpoints_say_everything_that_use_needs(finished):
    _, outcome = finished
    for name in ("best.ckpt", "last.ckpt"):
        model, about = load_trained(outcome.run_dir / "checkpoints" / name)
        assert (about.task, about.model, about.classes) == ("segmentation", "vmamba_nano", NAMES)
        assert model.num_classes == 3
        assert not model.training
    result = evaluate_segmentation(outcome.run_dir)
    assert result.metrics == pytest.approx(outcome.metrics, rel=1e-5)
    assert (result.part, result.classes) == ("validation", NAMES)
    with pytest.raises(ValueError, match=r"best\.ckpt is of segmentation, not of classification"):
        load_trained(outcome.run_dir, task="classification")


def test_eval_and_segment_take_the_run(finished, street, capsys, tmp_path, monkeypatch):
    _, outcome = finished
    monkeypatch.chdir(tmp_path)
    main(["eval", str(outcome.run_dir)])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{outcome.run_dir} on {street} (3 validation images)")
    assert f"mean IoU {outcome.metrics['miou']:.2f} %" in printed
    main(["eval", str(outcome.run_dir), "--data", str(street), "--short-side", "96"])
    assert f"mean IoU {outcome.metrics['miou']:.2f} %" not in capsys.readouterr().out
    other = find_segmentation(street, classes=("sky", "car", "road"))
    with pytest.raises(ValueError, match="knows class 1 as 'road', in the data it is 'car'"):
        evaluate_segmentation(outcome.run_dir, other)
    main(["segment", "--checkpoint", str(outcome.run_dir), str(street / "images" / "val")])
    assert "road" in capsys.readouterr().out
    found = read_index_mask("segmented/0.mask.png")
    truth = read_index_mask(street / "masks" / "val" / "0.png")
    assert (found == truth)[truth != 255].mean() > 0.8
    with pytest.raises(SystemExit):
        main(["predict", "--checkpoint", str(outcome.run_dir), str(street / "images" / "val" / "0.png")])
    assert "is of segmentation, not of classification" in capsys.readouterr().err


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("moment", [2, 6])
def test_interrupted_it_goes_on_to_the_same_bits(street_config, tmp_path, monkeypatch, in_memory, moment):
    """At step 6, after a checkpoint in the middle of the second epoch; at step 2 before there is any."""
    config = street_config(data={"in_memory": in_memory})
    train(config, tmp_path / "whole")
    calls, real_loss = [], Segmentation.training_loss

    def interrupt(task, model, batch):
        calls.append(1)
        if len(calls) == moment + 1:
            raise KeyboardInterrupt
        return real_loss(task, model, batch)

    monkeypatch.setattr(Segmentation, "training_loss", interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert (read_checkpoint(last)["global_step"] if last.is_file() else 0) == {2: 0, 6: 6}[moment]
    torch.manual_seed(123)
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_memory_and_files_give_the_same_run(street_config, tmp_path):
    for name, in_memory in (("files", False), ("memory", True)):
        train(street_config(data={"in_memory": in_memory}), tmp_path / name)
    kept = [read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("files", "memory")]
    for key, tensor in kept[0]["model"].items():
        assert torch.equal(tensor, kept[1]["model"][key]), key


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "swin_tiny_patch4_window7_224"])
def test_other_backbones_train_with_the_same_command(street_config, tmp_path, name):
    plain = as_dict(street_config(schedule={"iterations": 1, "validate_every": None, "warmup_iterations": 0}))
    swin = {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    model = {"name": name, "kwargs": swin if name.startswith("swin") else {}}
    outcome = train(from_dict({**plain, "model": model, "run": {**plain["run"], "ema_decay": 0.0}}), tmp_path / "run")
    assert load_trained(outcome.run_dir)[1].model == name
    assert outcome.metrics["loss"] > 0


def test_precision_accumulation_and_epochs(street_config, tmp_path):
    schedule = {"epochs": 2, "iterations": None, "validate_every": None, "warmup_epochs": 1, "warmup_iterations": None}
    config = street_config(schedule=schedule, run={"precision": "bf16", "accumulate": 2, "grad_checkpointing": True})
    outcome = train(config, tmp_path / "run")
    assert [row["step"] for row in rows_of(outcome.run_dir)] == ["1", "2"]


def test_it_starts_from_a_classifier_and_from_a_segmenter(street_config, finished, tmp_path):
    still = {"lr": 1e-30, "weight_decay": 0.0}
    classifier = timm.create_model("vmamba_nano", dims=8, depths=[1, 1, 1, 1], num_classes=5)
    save_checkpoint(classifier, tmp_path / "classifier.safetensors")
    run = {"ema_decay": 0.0}
    once = {"iterations": 1, "validate_every": None, "warmup_iterations": 0}
    config = street_config(
        model={"weights": str(tmp_path / "classifier.safetensors")}, optim=still, run=run, schedule=once
    )
    model, _ = load_trained(train(config, tmp_path / "one").run_dir)
    ours = model.backbone.model.state_dict()
    assert all(
        torch.allclose(ours[name], t, rtol=0, atol=1e-12) for name, t in classifier.state_dict().items() if name in ours
    )
    whole = str(finished[1].checkpoint)
    config = street_config(model={"weights": whole}, optim=still, run=run, schedule=once)
    model, _ = load_trained(train(config, tmp_path / "two").run_dir)
    before, _ = load_trained(whole)
    assert torch.equal(model.decode_head.fusion.conv.weight, before.decode_head.fusion.conv.weight)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"batch_size": 1}}, "batch norms need at least 2 images in a pass"),
        ({"data": {"image_size": 64}}, "data.image_size is of classification.*segmentation.augment.crop"),
        ({"augment": {"scale": [0.5, 1.0]}}, "augment is a section of classification, and this is segmentation"),
        ({"data": {"source": "nowhere"}}, "no such data folder: nowhere"),
        ({"model": {"name": "vmamba_nona"}}, "no model 'vmamba_nona'; did you mean"),
        ({"model": {"weights": "nothing.pth"}}, r"nothing\.pth"),
        ({"schedule": {"epochs": 3}}, "of schedule.epochs and schedule.iterations one must be a number"),
        ({"schedule": {"validate_every": 3}}, "3 does not divide 8"),
        ({"segmentation": {"augment": {"crop": [0, 4]}}}, "crop must be two positive numbers"),
        ({"segmentation": {"chanels": 4}}, "unknown config field 'segmentation.chanels'; did you mean"),
        ({"model": {"name": "vit_tiny_patch16_224"}}, "vit_tiny_patch16_224"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(street_config, tmp_path, sections, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(street_config(**sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_files_are_named_before_training_or_left_out(street_config, tmp_path, caplog):
    root = make_street(tmp_path / "street", {"train": 5, "val": 2})
    Image.new("L", (9, 9)).save(root / "masks" / "train" / "2.png")
    data = {"source": str(root)}
    with pytest.raises(ValueError, match=r"masks/train/2\.png: is 9x9 pixels, its image .*2\.png is 64x48.*skip"):
        train(street_config(data=data), tmp_path / "run")
    Image.new("L", (64, 48), 77).save(root / "masks" / "train" / "2.png")
    for in_memory in (False, True):
        with pytest.raises(ValueError, match=r"masks/train/2\.png: holds the unknown label\(s\) 77.*skip"):
            train(street_config(data={**data, "in_memory": in_memory}), tmp_path / "run")
    photo = root / "images" / "val" / "1.png"
    sound = photo.read_bytes()
    photo.write_bytes(sound[:-300])  # the header tells nothing
    Image.new("L", (64, 48), 1).save(root / "masks" / "train" / "2.png")
    with pytest.raises(ValueError, match=r"cannot read the image .*images/val/1\.png"):
        train(street_config(data={**data, "in_memory": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    photo.write_bytes(sound)
    Image.new("L", (64, 48), 77).save(root / "masks" / "train" / "2.png")
    once = {"iterations": 1, "validate_every": None, "warmup_iterations": 0}
    train(street_config(data={**data, "on_unreadable": "skip"}, schedule=once), tmp_path / "run")
    assert "left out" in caplog.text
    assert "2.png" in caplog.text


def test_the_published_recipe_on_paper(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["train", "--recipe", "ade20k", "--dry-run"])
    printed = capsys.readouterr().out
    assert "vmamba_tiny_s1l8, 61,902,572 parameters, 512 px, 237.6" in printed
    assert "20,210 training and 2,000 validation images, 150 classes" in printed
    assert "16 a step = 8 processes x 1 passes x 2 images" in printed
    assert "160,000, which is 126.7 times all images; validation after every 16,000" in printed
    assert "warm-up over 1,500 steps from 6e-11 to 6e-05, then a polynomial of power 1 to 0" in printed
    assert "adamw, weight decay 0.01, gradients not clipped" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_train_measure_every_image_once_and_agree(street_config, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(street_config()))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "vmamba", "train", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == ["4", "8"]
    # what both processes measured, and what one process measures with the weights that were kept
    best = max(float(row[name]) for row in rows for name in ("miou", "ema_miou"))
    assert evaluate_segmentation(tmp_path / "run").metrics["miou"] == pytest.approx(best, rel=1e-4)
