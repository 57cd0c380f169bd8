"""Photos segmented by a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vmamba import create_upernet, save_checkpoint
from vmamba.analysis.segmentation import segment_files
from vmamba.data import read_image
from vmamba.data.segmentation import read_index_mask, segmentation_evaluation_transform
from vmamba.tasks import SegmentationInference, segment

NAMES = ("sky", "road", "car")


@pytest.fixture
def model(one_thread):
    torch.manual_seed(0)
    return create_upernet("vmamba_nano", 3, channels=8, auxiliary_channels=8).eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    save_checkpoint(model, tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def test_files_hold_what_the_model_says(model, checkpoint, make_photos, tmp_path) -> None:
    photos = make_photos("photos", {"": 2}, size=(70, 45))
    inference = SegmentationInference(size=(96, 64))
    one, two = segment_files(checkpoint, [photos], tmp_path / "out", classes=NAMES, inference=inference)
    assert [one.image.name, two.image.name] == ["0.png", "1.png"]
    photo = read_image(one.image)
    pixels, _ = segmentation_evaluation_transform()(photo, np.zeros((45, 70), dtype=np.uint8))
    with torch.inference_mode():
        expected = segment(model, pixels[None], inference)[0].numpy()
    assert np.array_equal(read_index_mask(one.mask), expected)
    assert read_image(one.overlay).size == (70, 45)
    counts = np.bincount(expected.ravel(), minlength=3)
    order = np.argsort(-counts, kind="stable")
    assert [entry.name for entry in one.classes] == [NAMES[i] for i in order if counts[i]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{i}.{kind}.png" for i in (0, 1) for kind in ("legend", "mask", "overlay")
    ]


def test_what_does_not_fit_is_told_and_nothing_written(checkpoint, make_photos, tmp_path) -> None:
    photos = make_photos("photos", {"a": 1, "b": 1})
    out = tmp_path / "out"
    for images, options, message in (
        ([tmp_path / "none.png"], {}, r"no such image: .*none\.png"),
        ([photos], {}, r"the folder .*photos holds no images"),
        ([photos / "a", photos / "b"], {}, r"a/0\.png and .*b/0\.png would write the same files"),
        ([photos / "a"], {"classes": ["x"]}, "1 class names are given, the model knows 3 classes"),
        ([photos / "a"], {"device": "cuda:77"}, "cannot compute on device 'cuda:77'"),
        ([photos / "a"], {"opacity": 2.0}, "opacity must lie between 0 and 1"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            segment_files(checkpoint, images, out, **options)
    with pytest.raises(FileNotFoundError, match="no checkpoint file nowhere"):
        segment_files("nowhere", [photos / "a"], out)
    assert not out.exists()
