"""Whole runs on data sets in memory: that batches made on the device change nothing a run promises."""

import errno

import pytest
import torch

from vmamba.training import evaluate_checkpoint, read_checkpoint, resume, train

# everything random at once: order, augmentation, drop path, mixup, CutMix
RANDOM = {
    "model": {"drop_path": 0.3},
    "data": {"in_memory": True, "memory_size": 38},
    "augment": {"rand_augment": "rand-m9-mstd0.5-inc1", "random_erase": 0.5},
    "loss": {"mixup": 0.8, "cutmix": 1.0},
    "schedule": {"epochs": 3},
}


def weights_of(run_dir):
    return read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["model"]


def assert_same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_ends_as_one_that_never_stopped(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(**RANDOM)
    whole = train(config, tmp_path / "whole")
    real_save = torch.save

    def disk_full_in_epoch_2(contents, path):
        if contents.get("epoch") == 1:  # Lightning counts from 0
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(contents, path)

    monkeypatch.setattr(torch, "save", disk_full_in_epoch_2)
    with pytest.raises(OSError, match="No space left"):
        train(config, tmp_path / "stopped")
    monkeypatch.undo()
    resumed = resume(tmp_path / "stopped")
    assert resumed.metrics == whole.metrics
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    other = train(tiny_config(**RANDOM, run={"device": "cpu", "seed": 1}), tmp_path / "other")
    assert any(
        not torch.equal(one, two)
        for one, two in zip(weights_of(other.run_dir).values(), weights_of(whole.run_dir).values(), strict=True)
    )


def test_the_images_held_out_are_evaluated_as_from_files(tiny_config, tmp_path):
    outcome = train(tiny_config(data={"in_memory": True}), tmp_path / "run")
    result = evaluate_checkpoint(tmp_path / "run")
    best = read_checkpoint(outcome.checkpoint)["vmamba"]["metrics"]  # of the validation from memory
    assert result.metrics == pytest.approx(best, rel=1e-5)


def test_a_policy_for_single_images_is_refused_before_anything_is_written(tiny_config, tmp_path):
    config = tiny_config(data={"in_memory": True}, augment={"rand_augment": "augmix-m3"})
    with pytest.raises(ValueError, match="cannot be done in batches"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
