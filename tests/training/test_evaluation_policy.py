"""Evaluation at another resolution and crop than the training's."""

from dataclasses import replace

import pytest

from vmamba.data import evaluation_loader, evaluation_transform, open_labelled
from vmamba.tasks import Classification
from vmamba.training import evaluate, evaluate_checkpoint, load_trained, train
from vmamba.training.config import ModelConfig


def test_another_resolution_and_crop(tiny_config, photos, tmp_path):
    run_dir = train(tiny_config(schedule={"epochs": 1}, data={"crop_mode": "squash"}), tmp_path / "run").run_dir
    model, about = load_trained(run_dir)
    assert about.preprocessing.crop_mode == "squash"
    results = {}
    for size, crop in ((None, None), (48, None), (64, 1.0)):
        preprocessing = about.preprocessing.at(size, crop)
        samples = open_labelled(str(photos), about.classes)
        batches = evaluation_loader(samples, evaluation_transform(preprocessing), batch_size=8, workers=0)
        wanted = evaluate(model, Classification(3), batches).compute()
        results[size] = evaluate_checkpoint(run_dir, image_size=size, crop_pct=crop).metrics
        assert results[size] == pytest.approx(wanted, rel=1e-5)
    assert len({metrics["loss"] for metrics in results.values()}) == 3


def test_a_size_the_model_does_not_take(tiny_config, tmp_path):
    # one whose position embedding is made for a single size
    kwargs = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 1}
    config = replace(tiny_config(schedule={"epochs": 1}), model=ModelConfig("vit_tiny_patch16_224", kwargs=kwargs))
    run_dir = train(config, tmp_path / "run").run_dir
    with pytest.raises(ValueError, match="does not take images of 48 x 48 px"):
        evaluate_checkpoint(run_dir, image_size=48)
