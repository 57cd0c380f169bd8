"""The engine trains any Task, not classification alone."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vmamba.data import Preprocessing
from vmamba.tasks import Chart
from vmamba.training import About, read_checkpoint, resolve
from vmamba.training.distributed import World
from vmamba.training.lightning_engine import fit
from vmamba.training.lightning_module import TaskModule
from vmamba.training.machine import Machine
from vmamba.training.recorder import Recorder


class LineScores:
    def __init__(self):
        self.errors = []

    def update(self, model, batch):
        x, y = batch
        self.errors.append((model(x) - y).square())

    def merge(self, other):
        self.errors += other.errors

    def compute(self):
        loss = float(torch.cat(self.errors).mean())
        return {"loss": loss, "fit": 1 / (1 + loss)}


class Line:
    """Fit y = 3 x - 1."""

    metric = "fit"
    chart = Chart("fit.png", "Fit", "", {"fit": "fit"})
    trains_at_one_size = evaluates_at_one_size = True

    def training_loss(self, model, batch):
        x, y = batch
        return (model(x) - y).square().mean()

    def scores(self):
        return LineScores()


def test_a_task_of_another_kind(tmp_path, capsys):
    x = torch.linspace(-1, 1, 64)[:, None]
    data = TensorDataset(x, 3 * x - 1)
    config = resolve({"optim": {"lr": 0.3, "weight_decay": 0.0}, "schedule": {"epochs": 40, "warmup_epochs": 0}})
    torch.manual_seed(0)
    module = TaskModule(nn.Linear(1, 1), Line(), config, 4, World())
    about = About("line", {}, (), (), Preprocessing(), {}, epoch=0, metrics={})
    (tmp_path / "checkpoints").mkdir()
    machine = Machine("cpu", "fp32")
    recorder = Recorder(tmp_path, about, machine=machine, world=World(), images_per_step=16, finished_epochs=0)
    fit(module, recorder, DataLoader(data, batch_size=16), DataLoader(data, batch_size=16), machine)
    best = read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")
    assert best["vmamba"]["metrics"]["fit"] > 0.99
    assert abs(float(best["model"]["weight"]) - 3) < 0.2
    assert (tmp_path / "metrics.csv").read_text().splitlines()[
        0
    ] == "epoch,step,lr,train_loss,val_loss,fit,seconds,img/s,memory_gib"
    assert "fit 1.00" in capsys.readouterr().out
