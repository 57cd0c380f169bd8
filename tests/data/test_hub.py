"""Data sets of the Hugging Face library, from the disk."""

import pytest

from vmamba.data import open_source


def test_a_data_set_on_the_disk(make_photos, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the extra hf is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = make_photos("photos", {f"{part}/{name}": 3 for part in ("train", "validation") for name in ("cat", "dog")})
    splits = open_source(f"hfds/{root}", val_fraction=0.1, split_seed=0, on_unreadable="skip")
    assert splits.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.val), splits.test) == (6, 6, None)
    image, label = splits.train.subset([5])[0]
    assert (image.mode, image.size, label) == ("RGB", (40, 36), 1)
    wanted = {path.read_bytes() for path in (root / "train").rglob("*.png")}
    assert {splits.train.encoded(i) for i in range(6)} == wanted


def test_no_such_data_set(tmp_path):
    pytest.importorskip("datasets", reason="the extra hf is not installed")
    with pytest.raises(ValueError, match="hfds/.*cannot be opened as labelled images"):
        open_source(f"hfds/{tmp_path / 'nowhere'}", val_fraction=0.1, split_seed=0)


def test_without_the_library(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vmamba\[hf\]'"):
        open_source("hfds/some/thing", val_fraction=0.1, split_seed=0)
