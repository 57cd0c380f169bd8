"""`vmamba train --watchdog`: a run that hangs is reported or stopped, goes on, and its report shows the resources."""

import re
import time

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image

from vmamba.cli import main
from vmamba.doctor.watchdog_callback import WatchdogCallback
from vmamba.tasks import Classification
from vmamba.training import read_checkpoint
from vmamba.training.report import save_resources

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def arguments(make_photos, tmp_path, monkeypatch):
    """Two epochs of two steps, of a model of a few thousand parameters."""
    monkeypatch.chdir(tmp_path)
    root = make_photos("photos", {f"{part}/{name}": 4 for part in ("train", "val") for name in ("cat", "dog")})
    return [
        *("train", "--data", str(root), "--model", "vmamba_nano", "--image-size", "32", "--batch-size", "4"),
        *("--epochs", "2", "--device", "cpu", "--set", "model.kwargs={dims: 8, depths: [1, 1, 1, 1]}"),
        *("--set", "data.workers=0", "--set", "schedule.warmup_epochs=1", "--out", "run"),
    ]


def is_a_picture(path):
    with Image.open(path) as image:
        return min(image.size) > 200 and len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_a_healthy_run_shows_its_resources_and_nothing_else(arguments, tmp_path, capfd):
    main([*arguments, "--watchdog", "120"])
    assert "watchdog" not in capfd.readouterr().err
    run = tmp_path / "run"
    assert not list(run.glob("stall*"))
    assert "![Memory and utilisation](resources.png)" in (run / "report" / "summary.md").read_text()
    assert is_a_picture(run / "report" / "resources.png")


def test_a_run_without_a_watchdog_has_no_such_picture(arguments, tmp_path):
    main(arguments)
    assert not (tmp_path / "run" / "resources.csv").exists()
    assert "resources.png" not in (tmp_path / "run" / "report" / "summary.md").read_text()


@pytest.mark.slow
def test_a_stalled_run_stops_and_goes_on(arguments, tmp_path, monkeypatch, capfd):
    real, calls = Classification.training_loss, []

    def hang_in_the_second_epoch(*args):
        calls.append(1)
        if len(calls) == 3:
            time.sleep(250)
        return real(*args)

    monkeypatch.setattr(Classification, "training_loss", hang_in_the_second_epoch)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--watchdog", "5", "--on-stall", "stop"])
    assert stop.value.code == 2
    errors = capfd.readouterr().err
    assert re.search(
        r"vmamba train: stalled in forward, after step 2 for 5 s: see run/stall-1.txt; "
        r"go on with: vmamba train --resume run$",
        errors,
        re.MULTILINE,
    )
    text = (tmp_path / "run" / "stall-1.txt").read_text()
    assert "in hang_in_the_second_epoch" in text
    assert "in training_step" in text
    main(["train", "--resume", "run", "--watchdog", "120"])
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert is_a_picture(tmp_path / "run" / "report" / "resources.png")


class Lazy(pl.LightningModule):
    """Waits in one hook of its second step until the report is there."""

    def __init__(self, hook, report):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.hook, self.report, self.step = hook, report, 0

    def wait(self, hook):
        deadline = time.monotonic() + 60
        while hook == self.hook and self.step == 2 and not self.report.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def training_step(self, batch, batch_idx):
        self.step += 1
        self.wait("forward")
        y = self.layer(batch)
        y.register_hook(lambda _: self.wait("backward"))
        return y.sum()

    def validation_step(self, batch, batch_idx):
        self.wait("validation")

    def on_before_optimizer_step(self, optimizer):
        self.wait("optimiser")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
@pytest.mark.filterwarnings("ignore:.*interval_steps|.*log_every_n_steps")
@pytest.mark.parametrize("hook", ["forward", "backward", "optimiser", "validation"])
def test_anyones_trainer(tmp_path, hook):
    loader = torch.utils.data.DataLoader(torch.ones(4, 3), batch_size=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        callbacks=[WatchdogCallback(1)],
    )
    trainer.fit(Lazy(hook, tmp_path / "stall-1.txt"), loader, loader)
    assert f"in {hook}, after step {2 if hook == 'validation' else 1}\n" in (tmp_path / "stall-1.txt").read_text()


def test_options_that_do_not_go_together(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--on-stall", "stop"])
    assert "--watchdog" in capsys.readouterr().err


def test_a_picture_of_a_gpu_machine_with_a_stall(tmp_path):
    path = tmp_path / "resources.csv"
    lines = [
        "seconds,step,phase,stalled,host_gib,workers_gib,cpu_percent,gpu_allocated_gib,gpu_reserved_gib,"
        "gpu_used_gib,gpu_percent"
    ]
    for i in range(90):
        stalled = 30 < i < 50
        gpu = "" if i == 0 else f"{4 + 0.02 * i},{6 + 0.02 * i},{7 + 0.02 * i},{0 if stalled else 90}"
        lines.append(f"{10 * i},{i},data,{int(stalled)},{2 + i / 100},{0.5},{5 if stalled else 180},{gpu or ',,,'}")
    path.write_text("\n".join(lines) + "\n")
    assert save_resources(str(path), str(tmp_path / "resources.png"))
    with Image.open(tmp_path / "resources.png") as image:
        assert image.height > 700  # three panels
        pixels = {pixel for _, pixel in image.convert("RGB").getcolors(1 << 24)}
    # a fifth of vermillion on white
    assert any(all(abs(a - b) < 3 for a, b in zip(pixel, (247, 223, 204), strict=True)) for pixel in pixels)
