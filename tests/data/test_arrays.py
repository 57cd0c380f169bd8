"""Mosaics: cut into the images they were laid from."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from vmamba.data import open_source


def mosaic(tiles, side):
    """(n, side, side, 3) laid 25 a row."""
    rows = tiles.reshape(-1, 25, side, side, 3).swapaxes(1, 2).reshape(-1, 25 * side, 3)
    file = io.BytesIO()
    Image.fromarray(rows).save(file, "PNG")
    return file.getvalue()


def packed(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


@pytest.fixture
def tiles():
    return np.random.default_rng(0).integers(0, 256, (2, 2, 50, 6, 6, 3), dtype=np.uint8)


def test_tiles_are_found_again(tiles, tmp_path):
    files = {
        f"{split}/0{label}_{name}.png": mosaic(tiles[s, label], 6)
        for s, split in enumerate(("train", "test"))
        for label, name in enumerate(("dog", "cat"))
    }
    splits = open_source(packed(tmp_path / "m.zip", files), val_fraction=0.1, split_seed=0)
    assert splits.classes == ("dog", "cat")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (90, 10, 100)
    assert np.array_equal(splits.test.images, tiles[1].reshape(100, 6, 6, 3))
    image, label = splits.test[51]
    assert (np.asarray(image) == tiles[1, 1, 1]).all()
    assert label == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/00_dog.png", "train/02_cat.png"], r"must be 0, 1, 2 ..., not \[0, 2\]"),
        (["train/00_dog.png", "train/01_cat.png", "val/00_dog.png"], "val has no images of cat"),
        (["train/00_dog.png", "val/00_cat.png"], "label 0 is 'dog' and.*'cat'"),
    ],
)
def test_labels_that_do_not_fit(tiles, tmp_path, names, message):
    path = packed(tmp_path / "m.zip", {name: mosaic(tiles[0, 0], 6) for name in names})
    with pytest.raises(ValueError, match=message):
        open_source(path, val_fraction=0.1, split_seed=0)


def test_a_picture_that_is_no_mosaic(tiles, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (60, 12)).save(file, "PNG")
    path = packed(tmp_path / "m.zip", {"train/00_dog.png": file.getvalue(), "train/01_cat.png": file.getvalue()})
    with pytest.raises(ValueError, match=r"00_dog\.png: 60 x 12 px is no mosaic"):
        open_source(path, val_fraction=0.1, split_seed=0)
