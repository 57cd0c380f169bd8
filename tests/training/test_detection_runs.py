"""Detection on the engine: whole runs on a few tiny photos, with masks and without, resumed, evaluated, used."""

import csv
import json
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
from vmamba.models import save_checkpoint
from vmamba.models.detection import mask_rcnn
from vmamba.tasks import Detection, average_precision
from vmamba.training import load_trained, read_checkpoint, resolve, resume, train
from vmamba.training.config import as_dict, from_dict, read_yaml, to_yaml
from vmamba.training.detected_files import evaluate_detection

pytest.importorskip("faster_coco_eval", reason="average precision needs faster-coco-eval: pip install 'vmamba[det]'")

TIMES = ("seconds", "img/s", "memory_gib")
FIGURES = ("ap", "ap50", "ap75", "aps", "apm", "apl")


def make_cells(root, counts, masks=True, seed=0):
    """Dark discs ("cell", id 3) and squares ("debris", id 40) on bright noise, as COCO files and images."""
    generator = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True)
    rows, columns = np.mgrid[0:48, 0:64]
    for part, count in counts.items():
        (root / "images" / part).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            pixels = generator.integers(180, 256, (48, 64, 3), dtype=np.uint8)
            for kind in range(2):
                x, y = int(generator.integers(14, 20)) + 30 * kind, int(generator.integers(14, 34))
                disc = (columns - x) ** 2 + (rows - y) ** 2 <= 100
                square = (abs(columns - x) <= 8) & (abs(rows - y) <= 8)
                mask = (disc, square)[kind]
                pixels[mask] = ((20, 20, 160), (20, 90, 20))[kind]
                side = (10, 8)[kind]
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": (3, 40)[kind],
                    "bbox": [x - side, y - side, 2 * side + 1, 2 * side + 1],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
                if masks:
                    flat = np.concatenate([[0], mask.flatten(order="F"), [0]]).astype(int)
                    changes = np.flatnonzero(np.diff(flat))
                    counts_ = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
                    annotation["segmentation"] = {"size": [48, 64], "counts": counts_}
                annotations.append(annotation)
            Image.fromarray(pixels).save(root / "images" / part / f"{i}.png")
            images.append({"id": i + 1, "file_name": f"{part}/{i}.png", "height": 48, "width": 64})
        contents = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 3, "name": "cell"}, {"id": 40, "name": "debris"}],
        }
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(contents))
    return root


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return make_cells(tmp_path_factory.mktemp("data") / "cells", {"train": 6, "val": 3})


@pytest.fixture(scope="module")
def cells_config(cells):
    """A function: the small recipe on a network of a few thousand parameters, sections laid over it."""

    def make(**sections):
        return resolve(
            {
                "task": "detection",
                "model": {"name": "vmamba_nano", "drop_path": 0.1, "kwargs": {"dims": 8, "depths": [1, 1, 1, 1]}},
                "data": {"source": str(cells), "batch_size": 2, "workers": 0},
                "detection": {
                    "channels": 16,
                    "fc_channels": 32,
                    "anchor_scale": 5.0,
                    "min_size": [40, 48],
                    "max_size": 64,
                    "max_detections": 20,
                },
                "optim": {"lr": 3e-3},
                "schedule": {"iterations": 6, "validate_every": 3, "warmup_iterations": 2},
                "run": {"device": "cpu", "threads": 1, "ema_decay": 0.5, "checkpoint_every": 2},
            },
            sections,
        )

    return make


@pytest.fixture(scope="module")
def finished(cells_config, tmp_path_factory):
    """A run long enough to find some discs and squares."""
    config = cells_config(
        model={"drop_path": 0.0},
        data={"batch_size": 4},
        optim={"lr": 5e-3},
        schedule={"iterations": 60, "validate_every": 30, "warmup_iterations": 5},
    )
    return config, train(config, tmp_path_factory.mktemp("finished") / "run")


def rows_of(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(one, other):
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(run)] for run in (one, other)]
    assert rows[0] == rows[1]
    first, second = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (one, other))
    assert first["model"].keys() == second["model"].keys()
    for key, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][key]), key


def test_it_learns_and_leaves_a_whole_run_directory(finished, cells):
    config, outcome = finished
    run_dir = outcome.run_dir
    assert from_dict(read_yaml(run_dir / "config.yaml")) == config
    rows = rows_of(run_dir)
    names = [f"{kind}_{figure}" for kind in ("box", "mask") for figure in FIGURES]
    # a detector in evaluation has no loss, and none is recorded
    assert list(rows[0])[:28] == ["epoch", "step", "lr", "train_loss", *names, *(f"ema_{name}" for name in names)]
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "30"), ("2", "60")]
    assert outcome.metrics["box_ap50"] > 50
    assert outcome.metrics["mask_ap50"] > 50
    best = max(float(row[name]) for row in rows for name in ("mask_ap", "ema_mask_ap"))
    assert outcome.metrics["mask_ap"] == pytest.approx(best, rel=1e-4)
    report = outcome.report.read_text()
    assert f"| mask AP on the 3 validation images | {outcome.metrics['mask_ap']:.2f} % |" in report
    assert re.search(r"^\| debris \| \d+\.\d\d \| \d+\.\d\d \|$", report, re.MULTILINE)
    assert "| mask AP large | - % |" in report  # there are no such objects
    for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", report):
        assert len(np.unique(np.asarray(Image.open(outcome.report.parent / name)))) > 20, name
    assert outcome.sample_images == tuple(cells / "images" / "val" / f"{i}.png" for i in range(3))
    # the result files of the report give the report's figures
    annotations = cells / "annotations" / "instances_val.json"
    for kind, file in (("box", "boxes.json"), ("mask", "masks.json")):
        found = average_precision(annotations, outcome.report.parent / file, kind, max_dets=20)
        assert found.ap == pytest.approx(outcome.metrics[f"{kind}_ap"], abs=1e-6)


def test_its_checkpoint_says_everything_that_use_needs(finished, cells):
    _, outcome = finished
    model, about = load_trained(outcome.run_dir)
    assert (about.task, about.classes, about.category_ids) == ("detection", ("cell", "debris"), (3, 40))
    assert (model.transform.min_size, model.transform.max_size) == ((40, 48), 64)
    result = evaluate_detection(outcome.run_dir)
    assert (result.images, result.max_dets) == (3, 20)
    assert result.precision["mask"].ap == pytest.approx(outcome.metrics["mask_ap"], rel=1e-5)
    assert evaluate_detection(outcome.run_dir, max_dets=1).precision["box"].ap < result.precision["box"].ap
    other = evaluate_detection(outcome.run_dir, cells / "images", cells / "annotations" / "instances_train.json")
    assert other.images == 6


def test_eval_and_detect_take_the_run(finished, cells, capsys, tmp_path, monkeypatch):
    _, outcome = finished
    monkeypatch.chdir(tmp_path)
    main(["eval", str(outcome.run_dir), "--results", "found"])
    printed = capsys.readouterr().out
    assert f"{outcome.run_dir} on {cells}/annotations/instances_val.json (3 images, at most 20 detections" in printed
    assert re.search(r"^ +AP +AP50 +AP75 +APs +APm +APl$", printed, re.MULTILINE)
    for kind in ("box", "mask"):
        line = re.search(rf"^{kind}   .*$", printed, re.MULTILINE)[0].split()
        assert float(line[1]) == pytest.approx(outcome.metrics[f"{kind}_ap"], abs=0.006)
    assert {entry["category_id"] for entry in json.loads((tmp_path / "found" / "masks.json").read_text())} <= {3, 40}
    main(["detect", "--checkpoint", str(outcome.run_dir), str(cells / "images" / "val")])
    assert "cell" in capsys.readouterr().out
    found = json.loads((tmp_path / "detections" / "detections.json").read_text())
    assert found["categories"] == [{"id": 3, "name": "cell"}, {"id": 40, "name": "debris"}]


def test_weights_alone_are_evaluated_too(finished, cells, capsys, tmp_path):
    """As the released detectors are: what weights do not tell is named."""
    model, _ = load_trained(finished[1].run_dir)
    save_checkpoint(model, tmp_path / "cells.safetensors")
    data = ["--data", str(cells / "images"), "--annotations", str(cells / "annotations" / "instances_val.json")]
    # the small network is no variant of ours, so weights alone do not say which one it is
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "cells.safetensors"), "--task", "detection", *data])
    assert "is none of" in capsys.readouterr().err
    save_checkpoint(mask_rcnn("vmamba_nano", 2, channels=8, fc_channels=8), tmp_path / "nano.safetensors")
    sizes = ["--min-size", "48", "--max-size", "64", "--max-dets", "5"]
    main(["eval", str(tmp_path / "nano.safetensors"), "--task", "detection", *data, *sizes])
    assert "3 images, at most 5 detections each" in capsys.readouterr().out
    with pytest.raises(ValueError, match="name annotated images with --data"):
        evaluate_detection(tmp_path / "nano.safetensors")


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("moment", [1, 5])
def test_interrupted_it_goes_on_to_the_same_bits(cells_config, tmp_path, monkeypatch, in_memory, moment):
    """At step 5, after a checkpoint in the middle of the second epoch; at step 1 before there is any."""
    config = cells_config(data={"in_memory": in_memory})
    train(config, tmp_path / "whole")
    calls, real_loss = [], Detection.training_loss

    def interrupt(task, model, batch):
        calls.append(1)
        if len(calls) == moment + 1:
            raise KeyboardInterrupt
        return real_loss(task, model, batch)

    monkeypatch.setattr(Detection, "training_loss", interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert (read_checkpoint(last)["global_step"] if last.is_file() else 0) == {1: 0, 5: 4}[moment]
    torch.manual_seed(123)
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_memory_and_files_give_the_same_run(cells_config, tmp_path):
    for name, in_memory in (("files", False), ("memory", True)):
        train(cells_config(data={"in_memory": in_memory}), tmp_path / name)
    assert_same_run(tmp_path / "files", tmp_path / "memory")


def test_boxes_alone_train_a_faster_rcnn_with_the_same_command(cells_config, tmp_path, capsys, monkeypatch):
    root = make_cells(tmp_path / "boxes", {"train": 4, "val": 2, "test": 2}, masks=False)
    once = {"iterations": 2, "validate_every": None, "warmup_iterations": 0}
    outcome = train(cells_config(data={"source": str(root)}, schedule=once), tmp_path / "run")
    model, _ = load_trained(outcome.run_dir)
    assert not model.has_masks
    assert list(outcome.figures) == [f"box_{figure}" for figure in FIGURES]
    assert (outcome.part, outcome.images) == ("test", 2)
    assert not (outcome.report.parent / "masks.json").exists()
    monkeypatch.chdir(tmp_path)
    main(["eval", str(tmp_path / "run")])
    assert "instances_test.json (2 images" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no segmentations"):
        train(cells_config(data={"source": str(root)}, detection={"masks": True}), tmp_path / "other")


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "swin_tiny_patch4_window7_224"])
def test_other_backbones_train_with_the_same_command(cells_config, tmp_path, name):
    once = {"iterations": 1, "validate_every": None, "warmup_iterations": 0}
    plain = as_dict(cells_config(schedule=once, run={"ema_decay": 0.0}))
    swin = {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    model = {"name": name, "kwargs": swin if name.startswith("swin") else {}}
    outcome = train(from_dict({**plain, "model": model}), tmp_path / "run")
    assert load_trained(outcome.run_dir)[1].model == name


def test_precision_accumulation_epochs_and_steps(cells_config, tmp_path):
    schedule = {"epochs": 3, "iterations": None, "validate_every": None, "warmup_iterations": 2}
    schedule |= {"shape": "steps", "drops": [1, 2]}
    run = {"precision": "bf16", "accumulate": 2, "grad_checkpointing": True, "ema_decay": 0.0}
    outcome = train(cells_config(schedule=schedule, run=run), tmp_path / "run")
    rates = [float(row["lr"]) for row in rows_of(outcome.run_dir)]
    assert rates == pytest.approx([3e-3, 3e-4, 3e-5], rel=1e-5)
    assert outcome.images == 3


def test_it_starts_from_a_classifier(cells_config, tmp_path):
    classifier = timm.create_model("vmamba_nano", dims=8, depths=[1, 1, 1, 1], num_classes=5)
    save_checkpoint(classifier, tmp_path / "classifier.safetensors")
    config = cells_config(
        model={"weights": str(tmp_path / "classifier.safetensors")},
        optim={"lr": 1e-30, "weight_decay": 0.0},
        schedule={"iterations": 1, "validate_every": None, "warmup_iterations": 0},
        run={"ema_decay": 0.0},
    )
    model, _ = load_trained(train(config, tmp_path / "run").run_dir)
    ours = model.backbone.body.model.state_dict()
    taken = {name: t for name, t in classifier.state_dict().items() if name in ours}
    assert len(taken) > 20
    assert all(torch.allclose(ours[name], t, rtol=0, atol=1e-12) for name, t in taken.items())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"source": "nowhere"}}, "no such data folder: nowhere"),
        ({"data": {"crop_pct": 0.5}}, "data.crop_pct is of classification"),
        ({"run": {"mode": "compile"}}, "run.mode=compile needs training images of one size, which detection has not"),
        ({"detection": {"min_size": [100], "max_size": 64}}, "max_size must be at least min_size"),
        ({"detection": {"max_detections": 0}}, "detection.max_detections must be at least 1"),
        ({"segmentation": {"channels": 4}}, "segmentation is a section of segmentation, and this is detection"),
        ({"model": {"name": "vit_tiny_patch16_224", "kwargs": {}, "drop_path": None}}, "vit_tiny_patch16_224|pyramid"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(cells_config, tmp_path, sections, message):
    config = as_dict(cells_config())
    merged = {**config, **{name: {**config.get(name, {}), **values} for name, values in sections.items()}}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(from_dict(merged), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_eval_refuses_data_of_other_categories(finished, cells, tmp_path):
    """Ids are often 1, 2, ... whatever they stand for."""
    contents = json.loads((cells / "annotations" / "instances_val.json").read_text())
    contents["categories"] = [{"id": 3, "name": "nucleus"}, {"id": 40, "name": "debris"}]
    (tmp_path / "val.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=r"val\.json has categories that the detector does not know.*: 3 'nucleus'$"):
        evaluate_detection(finished[1].run_dir, cells / "images", tmp_path / "val.json")


def test_bad_annotations_are_named_before_training_or_left_out(cells_config, tmp_path, caplog):
    root = make_cells(tmp_path / "cells", {"train": 4, "val": 2})
    file = root / "annotations" / "instances_train.json"
    contents = json.loads(file.read_text())
    contents["annotations"][0]["bbox"][2] = 0
    file.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match="annotation 1: bbox .* has a side of less than a pixel"):
        train(cells_config(data={"source": str(root)}), tmp_path / "run")
    once = {"iterations": 1, "validate_every": None, "warmup_iterations": 0}
    train(cells_config(data={"source": str(root), "on_unreadable": "skip"}, schedule=once), tmp_path / "run2")
    assert "instances_train.json: annotation 1: bbox" in caplog.text
    assert "left out" in caplog.text


@pytest.mark.parametrize(("recipe", "epochs", "drops"), [("coco_1x", 12, "8 and 11"), ("coco_3x", 36, "27 and 33")])
def test_the_published_recipes_on_paper(tmp_path, monkeypatch, capsys, recipe, epochs, drops):
    monkeypatch.chdir(tmp_path)
    main(["train", "--recipe", recipe, "--dry-run"])
    printed = capsys.readouterr().out
    assert "vmamba_tiny_s1l8, 49,755,312 parameters, 800 x 1280 px" in printed
    assert "117,266 training and 5,000 validation images, 80 classes" in printed
    assert "16 a step = 8 processes x 1 passes x 2 images" in printed
    assert f"7,329 an epoch, {7_329 * epochs:,} in {epochs} epochs" in printed
    assert f"warm-up over 1,000 steps from 1e-07 to 0.0001, then times 0.1 after {drops} epochs" in printed
    assert "adamw, weight decay 0.05, gradients not clipped" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_train_and_measure_every_image_once(cells_config, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(cells_config(data={"batch_size": 4})))
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
    assert [row["step"] for row in rows] == ["3", "6"]
    best = max(float(row[name]) for row in rows for name in ("mask_ap", "ema_mask_ap"))
    assert evaluate_detection(tmp_path / "run").precision["mask"].ap == pytest.approx(best, rel=1e-4, abs=1e-6)
