"""An epoch with a damaged image in the folder: left out and named once, or fatal and named; never a hang."""

import pytest
import torch

from vmamba.data import Augmentation, Preprocessing, open_source, training_batches

PREPROCESSING = Preprocessing((32, 32))


@pytest.fixture
def damaged(make_photos):
    """Six photos to train on, of which one is cut off behind its header."""
    root = make_photos("photos", {"train/cat": 3, "train/dog": 3, "val/cat": 1, "val/dog": 1})
    whole = (root / "train/dog/1.png").read_bytes()
    (root / "train/dog/1.png").write_bytes(whole[: len(whole) // 2])
    return str(root)


def batches(source, on_unreadable, **options):
    samples = open_source(source, val_fraction=0.1, split_seed=0, on_unreadable=on_unreadable).train
    return training_batches(samples, PREPROCESSING, Augmentation(), batch_size=1, seed=0, **options)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 2])
def test_fatal_and_named(damaged, workers):
    with pytest.raises(ValueError, match=r"cannot read the image .*train/dog/1\.png"):
        list(batches(damaged, "error", workers=workers))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 2}, {"in_memory": True}])
def test_left_out_and_named_once(damaged, options, caplog):
    loader = batches(damaged, "skip", **options)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        labels = torch.cat([labels for _, labels in loader])
        assert torch.bincount(labels).tolist() == [3, 2]
    assert caplog.text.count("train/dog/1.png") == 1
    assert "1 unreadable image(s)" in caplog.text


@pytest.mark.timeout(60)
def test_a_file_that_vanishes_in_the_middle_is_fatal_and_named(damaged, make_photos, tmp_path):
    loader = batches(damaged, "skip", workers=1)
    (tmp_path / "photos/train/cat/2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no such image: .*train/cat/2\.png"):
        list(loader)
