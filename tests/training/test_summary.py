"""The report of a run: curves with what metrics.csv holds, and a page that leads to all of it."""

import re

import numpy as np
import pytest
from PIL import Image

from vmamba.training import report, summary, train


@pytest.fixture
def drawn(monkeypatch):
    """The curves that were drawn: file name -> {label: values}."""
    curves = {}
    real = report.save_curves

    def save(epochs, found, path, ylabel, **options):
        curves[path.name] = {label: list(values) for label, values in found.items()}
        real(epochs, found, path, ylabel, **options)

    monkeypatch.setattr(summary, "save_curves", save)
    return curves


def test_report(tiny_config, tmp_path, drawn):
    outcome = train(tiny_config(run={"ema_decay": 0.9}, schedule={"epochs": 3}), tmp_path / "run")
    folder = tmp_path / "run" / "report"
    assert outcome.report == folder / "summary.md"
    text = outcome.report.read_text()
    assert f"| accuracy on the 12 validation images | {outcome.metrics['top1']:.2f} % |" in text
    assert f"| loss | {outcome.metrics['loss']:.4f} |" in text
    assert re.search(rf"weights \| epoch {outcome.best_epoch} of 3, (as trained|their moving average)", text)
    assert re.search(r"hardware \| cpu \(.*\), fp32", text)
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert sorted(pictures) == sorted(path.name for path in folder.glob("*.png"))
    assert len(pictures) == 6
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (folder / link).is_file(), link
    for name in pictures:
        assert len(np.unique(np.asarray(Image.open(folder / name)))) > 20
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("ema_val_loss")
    assert drawn["loss.png"]["validation, averaged weights"] == [float(row.split(",")[column]) for row in rows[1:]]
    assert list(drawn["accuracy.png"]) == ["top-1", "top-1, averaged weights", "top-5", "top-5, averaged weights"]
    assert list(drawn["learning_rate.png"]) == ["lr"]


def test_without_an_average_no_curve_of_one(tiny_config, tmp_path, drawn):
    train(tiny_config(schedule={"epochs": 1}), tmp_path / "run")
    assert list(drawn["loss.png"]) == ["training", "validation"]
    assert list(drawn["accuracy.png"]) == ["top-1", "top-5"]
