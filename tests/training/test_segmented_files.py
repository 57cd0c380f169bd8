"""Photos segmented by a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba import create_upernet, save_checkpoint
from vmamba.data import read_image
from vmamba.data.segmentation import open_segmentation, read_index_mask, segmentation_evaluation_transform
from vmamba.tasks import SegmentationInference, SegmentationScores, segment
from vmamba.training.segmented_files import evaluate_segmentation, segment_files

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


def test_pictures_that_are_there_are_kept_unless_told(checkpoint, make_photos, tmp_path) -> None:
    photos, out = make_photos("photos", {"": 2}), tmp_path / "out"
    (one,) = segment_files(checkpoint, [photos / "1.png"], out)
    one.overlay.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"1\.mask\.png exists already: .*--overwrite"):
        segment_files(checkpoint, [photos], out)
    assert len(list(out.iterdir())) == 3
    assert one.overlay.read_bytes() == b"mine"
    assert len(segment_files(checkpoint, [photos], out, overwrite=True)) == 2
    assert read_image(one.overlay).size == (40, 36)


@pytest.fixture
def data(tmp_path):
    """Two validation images with masks of three classes, of different sizes."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for i, size in enumerate([(40, 60), (50, 45)]):
            for folder, shape in (("images", (*size, 3)), ("masks", size)):
                path = tmp_path / "data" / folder / part / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 3, shape, dtype=np.uint8)).save(path)
    (tmp_path / "data" / "classes.txt").write_text("sky\nroad\ncar\n")
    return tmp_path / "data"


def test_a_checkpoint_is_measured_image_by_image(model, checkpoint, data) -> None:
    inference = SegmentationInference(size=(96, 64), flip=True)
    result = evaluate_segmentation(checkpoint, data, inference=inference)
    assert (result.part, result.images, result.classes) == ("validation", 2, NAMES)
    expected = SegmentationScores(3, inference)
    transform = segmentation_evaluation_transform()
    with torch.inference_mode():
        for image, mask in open_segmentation(data).val:
            expected.update(model, tuple(tensor[None] for tensor in transform(image, mask)))
    assert result.metrics == expected.compute()
    assert [row["pixels"] for row in result.by_class] == expected.confusion().sum(1).tolist()
    assert sum(row["pixels"] for row in result.by_class) == 40 * 60 + 50 * 45


def test_model_and_data_must_have_the_same_classes(checkpoint, data) -> None:
    (data / "classes.txt").write_text("a\nb\nc\nd")
    with pytest.raises(ValueError, match="the model knows 3 classes, the data has 4"):
        evaluate_segmentation(checkpoint, data)
