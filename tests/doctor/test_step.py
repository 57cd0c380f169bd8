"""What may be examined, by which names, and sound runs of every task."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from vmamba import create_upernet
from vmamba.data import CocoDataset, collate_detection, detection_evaluation_transform
from vmamba.doctor import Level, session, slow_paths
from vmamba.doctor.step import examine
from vmamba.doctor.subject import Subject
from vmamba.ops.dispatch import BackendStatus
from vmamba.tasks import Detection, Segmentation
from vmamba.training import resolve, train
from vmamba.training.config import as_dict, from_dict, to_yaml

from . import gallery

SMALL = {"dims": 16, "depths": (1, 1, 1, 1), "drop_path_rate": 0.0}
EVERY_STEP = {"devices", "batch", "backend", "loss", "gradients", "custom functions", "learning rate", "memory", "time"}


def wrong(verdicts):
    return [verdict for verdict in verdicts if verdict.level is not Level.OK]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.fixture
def run_config(make_photos):
    """A run small enough to examine in seconds."""
    photos = make_photos("photos", {f"{part}/{name}": 4 for part in ("train", "val") for name in ("cat", "dog", "emu")})

    def make(**sections):
        return resolve(
            {
                "model": {"name": "vmamba_nano", "kwargs": {"dims": 8, "depths": [1, 1, 1, 1]}},
                "data": {"source": str(photos), "image_size": 32, "batch_size": 4, "workers": 0},
                "schedule": {"epochs": 1, "warmup_epochs": 0},
                "run": {"device": "cpu", "threads": 1},
            },
            sections,
        )

    return make


@pytest.fixture
def run_yaml(run_config, tmp_path):
    (tmp_path / "run.yaml").write_text(to_yaml(run_config()))
    return str(tmp_path / "run.yaml")


@pytest.mark.slow
def test_a_sound_config(run_yaml) -> None:
    verdicts = examine(run_yaml)
    assert wrong(verdicts) == []
    assert EVERY_STEP | {"data loader", "growth with L"} == {verdict.name for verdict in verdicts}


@pytest.fixture
def recipe_config(make_photos, make_coco):
    """A function: a recipe for one's own data on networks of a few thousand parameters, sections laid over it."""

    def make(recipe, **sections):
        kwargs = {"dims": 8, "depths": [1, 1, 1, 1]}
        own = {"model": {"name": "vmamba_nano", "kwargs": kwargs}, "run": {"device": "cpu", "threads": 1}}
        if recipe == "small":
            root = make_photos("photos", {f"{part}/{name}": 4 for part in ("train", "val") for name in ("cat", "dog")})
            own["data"] = {"image_size": 32, "batch_size": 4}
        elif recipe == "small_segmentation":
            root = make_photos("street", {"images/train": 4, "images/val": 2})
            for photo in sorted((root / "images").rglob("*.png")):
                mask = np.arange(40 * 36, dtype=np.uint8).reshape(36, 40) % 3
                path = root / "masks" / photo.relative_to(root / "images")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(path)
            (root / "classes.txt").write_text("sky\nroad\ncar\n")
            own["data"] = {"batch_size": 2}
            own["segmentation"] = {"channels": 16, "auxiliary_channels": 8, "augment": {"crop": [32, 32]}}
        else:
            _, file, _ = make_coco()
            root = file.parent
            for part in ("train", "val"):
                shutil.copy(file, root / f"{part}.json")
            file.unlink()
            own["data"] = {"batch_size": 2}
            sizes = {"min_size": [40, 48], "max_size": 64, "anchor_scale": 5.0}
            own["detection"] = {"channels": 16, "fc_channels": 32, "max_detections": 10, **sizes}
        own["data"] |= {"source": str(root), "workers": 0}
        return resolve(own, sections, recipe=recipe)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["small", "small_segmentation", "small_detection"])
def test_sound_configs_of_every_task(recipe_config, tmp_path, recipe) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(recipe_config(recipe)))
    verdicts = examine(str(tmp_path / "run.yaml"))
    assert wrong(verdicts) == []
    assert EVERY_STEP | {"data loader", "growth with L"} == {verdict.name for verdict in verdicts}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["small_segmentation", "small_detection"])
def test_runs_of_other_backbones_are_examined_with_their_weights(recipe_config, tmp_path, recipe) -> None:
    once = {"iterations": 1, "validate_every": None, "warmup_iterations": 0}
    plain = as_dict(recipe_config(recipe, schedule=once, run={"ema_decay": 0.0}))
    config = from_dict({**plain, "model": {"name": "resnet18", "kwargs": {}}})
    run_dir = train(config, tmp_path / "run").run_dir
    assert wrong(examine(str(run_dir))) == []
    last = run_dir / "checkpoints" / "last.ckpt"
    contents = torch.load(last, weights_only=True)
    name = next(name for name in contents["model"] if name.endswith("layer1.0.conv1.weight"))
    contents["model"][name].fill_(float("nan"))
    torch.save(contents, last)
    found = wrong(examine(str(run_dir)))
    assert [verdict.name for verdict in found] == ["parameter is not finite"]
    assert "layer1.0.conv1.weight" in found[0].message


@pytest.mark.slow
def test_a_config_that_cannot_train(run_yaml) -> None:
    found = wrong(examine(run_yaml, overrides=["optim.lr=1e4", "optim.name=sgd", "optim.clip_norm=0"], device="cpu"))
    assert [verdict.name for verdict in found] == ["learning rate too high"]
    assert found[0].figures["sane"] < 1e3


@pytest.mark.slow
def test_a_run_directory_is_examined_with_its_weights(run_config, tmp_path) -> None:
    run_dir = train(run_config(), tmp_path / "run").run_dir
    assert wrong(examine(str(run_dir))) == []
    last = run_dir / "checkpoints" / "last.ckpt"
    contents = torch.load(last, weights_only=True)
    contents["model"]["head.fc.weight"].fill_(float("nan"))
    torch.save(contents, last)
    found = wrong(examine(str(run_dir)))
    assert [verdict.name for verdict in found] == ["parameter is not finite"]
    assert "head.fc.weight" in found[0].message


def test_sound_segmentation() -> None:
    torch.manual_seed(0)
    model = create_upernet("vmamba_nano", 5, channels=16, auxiliary_channels=16, **SMALL)
    masks = torch.randint(5, (2, 64, 64))
    masks[0, :8] = 255
    task = Segmentation(5)
    verdicts = examine(
        Subject(
            model,
            training_loss=task.training_loss,
            batch=(torch.randn(2, 3, 64, 64), masks),
            optimizer=adamw(model),
        )
    )
    assert wrong(verdicts) == []
    assert {verdict.name for verdict in verdicts} == EVERY_STEP | {"growth with L"}


def test_labels_of_segmentation_are_looked_at() -> None:
    model = create_upernet("vmamba_nano", 5, channels=16, auxiliary_channels=16, **SMALL)
    masks = torch.randint(5, (2, 64, 64))
    masks[0, 3, 3] = 200
    found = wrong(
        examine(Subject(model, training_loss=Segmentation(5).training_loss, batch=(torch.randn(2, 3, 64, 64), masks)))
    )
    assert [verdict.name for verdict in found] == ["label out of range"]
    assert "A label is 200, but the output has 5 classes" in found[0].message
    assert "255" in found[0].remedy


def test_why_growth_is_not_measured_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 16 * 16, 5))
    batch = torch.randn(4, 3, 16, 16), torch.randint(5, (4,))
    verdicts = examine(Subject(model, loss=nn.CrossEntropyLoss(), batch=batch, optimizer=adamw(model)))
    (growth,) = (verdict for verdict in verdicts if verdict.name == "growth with L")
    assert growth.level is Level.OK
    assert "Not measured: at length 1024 it raises RuntimeError: mat1 and mat2 shapes" in growth.message


@pytest.mark.slow
def test_sound_detection(make_coco) -> None:
    from vmamba.models.detection import mask_rcnn

    torch.manual_seed(0)
    images, file, _ = make_coco()
    dataset = CocoDataset(images, file, keep_empty=True, transform=detection_evaluation_transform())
    task = Detection(dataset.coco, dataset.categories)
    sizes = {"channels": 16, "fc_channels": 32, "min_size": 48, "max_size": 64, "anchor_scale": 5}
    model = mask_rcnn("vmamba_nano", 2, backbone_kwargs=SMALL, **sizes)
    loader = DataLoader(dataset, batch_size=3, collate_fn=collate_detection)
    verdicts = examine(
        Subject(model, training_loss=task.training_loss, loader=loader, optimizer=adamw(model)), time_limit=60
    )
    assert wrong(verdicts) == []
    assert {verdict.name for verdict in verdicts} == EVERY_STEP | {"data loader", "growth with L"}


@pytest.mark.slow
def test_a_function_by_its_name() -> None:
    verdicts = examine("tests.doctor.gallery:sound_parts")
    assert wrong(verdicts) == []
    assert "gradients" in {verdict.name for verdict in verdicts}
    found = wrong(examine("tests.doctor.gallery:vector_loss"))
    assert [verdict.name for verdict in found] == ["loss is not a scalar"]


OFFERS = slow_paths.Offers(
    "NVIDIA H100",
    {"triton": BackendStatus(False, False, "Triton is not installed"), "portable": BackendStatus(True, True, "")},
)


def test_the_slow_backend() -> None:
    (verdict,) = slow_paths.judge_paths(torch.device("cuda"), True, OFFERS)
    assert (verdict.name, verdict.level) == ("slow portable backend", Level.WARNING)
    assert "Triton is not installed" in verdict.message
    assert "pip install triton" in verdict.remedy
    # a model without a scan does not care
    assert slow_paths.judge_paths(torch.device("cuda"), False, OFFERS) == []


def test_switches_that_slow_a_step_down(monkeypatch) -> None:
    found = wrong(examine("tests.doctor.gallery:anomaly_detection"))
    assert [verdict.name for verdict in found] == ["anomaly detection is on"]
    # a model on a GPU sees it
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.setattr(slow_paths, "offers_of", lambda device: OFFERS)
    patient = SimpleNamespace(subject=SimpleNamespace(device=torch.device("cuda"), model=nn.ReLU()))
    assert [v.name for v in slow_paths.examine_slow_paths(patient)] == ["slow by environment variable"]


def test_the_unused_gpu(monkeypatch, forks) -> None:
    monkeypatch.setattr(slow_paths, "offers_of", lambda device: OFFERS)
    found = wrong(examine(gallery.sound()))
    assert [verdict.name for verdict in found] == ["GPU is not used"]
    assert "model.to('cuda')" in found[0].remedy


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        ("missing.yaml", FileNotFoundError, "no such config file"),
        ("neither", FileNotFoundError, "MODULE:FUNCTION"),
        ("no_such_module:f", ModuleNotFoundError, "no_such_module"),
        ("tests.doctor.gallery:nothing", ValueError, "no function 'nothing'"),
        ("tests.doctor.gallery:labels", TypeError, "gallery:labels raises TypeError: .*missing 2 required"),
        ("tests.doctor.gallery:wrong_values", ValueError, r"raises ValueError: no such shape \(.*gallery.py:\d+\)"),
        (":f", FileNotFoundError, "MODULE:FUNCTION"),
        ("tests.doctor.gallery:Net", ValueError, r"\(model, loss, batch\), not a Net"),
    ],
)
def test_mistakes_are_told_at_once(target, error, words) -> None:
    with pytest.raises(error, match=words):
        examine(target)


@pytest.mark.slow
def test_a_config_with_a_mistake_and_overrides_without_a_config(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("model: {name: vmamba_nano}\nrun: {speed: high}\n")
    with pytest.raises(ValueError, match=r"run\.speed"):
        examine(str(tmp_path / "run.yaml"))
    with pytest.raises(FileNotFoundError, match="no run directory"):
        examine(str(tmp_path))
    with pytest.raises(ValueError, match="examined as it is"):
        examine(gallery.sound(), overrides=["optim.lr=1"])
    with pytest.raises(ValueError, match="belongs to a config"):
        examine("tests.doctor.gallery:sound", overrides=["optim.lr=1"])
    with pytest.raises(ValueError, match="positive"):
        examine(gallery.sound(), time_limit=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": None}, "either loss"),
        ({"training_loss": lambda model, batch: 0}, "either loss"),
        ({"batch": None}, "a batch, or a loader"),
        ({"batch": torch.ones(3)}, r"needs a batch \(inputs, target\), not a Tensor"),
        ({"precision": "fp8"}, "'fp8'"),
        ({"model": "resnet"}, "not str"),
    ],
)
def test_subjects_that_cannot_be(changes, words) -> None:
    sound = {"model": gallery.Net(), "loss": nn.CrossEntropyLoss(), "batch": (torch.ones(2, 8), torch.ones(2))}
    with pytest.raises(ValueError, match=words):
        Subject(**{**sound, **changes})


def test_the_model_is_as_it_was() -> None:
    subject = gallery.sound()
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    state = torch.get_rng_state()
    examine(subject)
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    assert all(p.grad is None for p in subject.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_left_running(monkeypatch, forks) -> None:
    """Workers of a loader that is stuck, and the process that waits for them: they are a group."""
    groups = []
    fork = session._fork

    def noting_fork(run):
        child = fork(run)
        groups.append(child.pid)
        return child

    def left():
        listed = subprocess.run(["ps", "-eo", "pgid,stat"], capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in listed.splitlines()[1:]]
        return [group for group, state in rows if int(group) in groups and not state.startswith("Z")]

    monkeypatch.setattr(session, "_fork", noting_fork)
    found = wrong(examine(gallery.worker_deadlock(), time_limit=2))
    assert [verdict.name for verdict in found] == ["data loader is stuck"]
    assert groups
    assert _happens(lambda: not left(), 10), left()


def test_nobody_is_left_when_the_doctor_is_killed(tmp_path) -> None:
    program = (
        "from tests.doctor import gallery\n"
        "from vmamba.doctor import examine\n"
        f"subject = gallery.telling_blocking_forward({str(tmp_path / 'pid')!r})\n"
        "examine(subject, time_limit=600)\n"
    )
    doctor = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    try:
        assert _happens(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text(), 120)
    finally:
        doctor.kill()
        doctor.wait()
    patient = (tmp_path / "pid").read_text()
    assert _happens(lambda: _program(patient) != str(Path(sys.executable).resolve()), 20)


def _happens(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _program(pid: int | str) -> str:
    try:
        return str(Path(f"/proc/{pid}/exe").resolve())
    except OSError:
        return ""
