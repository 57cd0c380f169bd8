"""What the numbers in mask files mean."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vmamba.data.segmentation import ADE20K_CLASSES, IGNORED, LabelMap, MaskedImages, class_shares, read_index_mask

NUMBERS = np.array([[0, 1, 2], [150, 3, 255]], dtype=np.uint8)


def test_labels_become_classes() -> None:
    ade20k = LabelMap(tuple(range(1, 151)), ignored=(0,))
    assert ade20k.apply(NUMBERS).tolist() == [[IGNORED, 0, 1], [149, 2, IGNORED]]
    assert ade20k.unknown(NUMBERS) == [255]
    scattered = LabelMap((150, 3, 0), ignored=(1, 255))
    assert scattered.apply(NUMBERS).tolist() == [[2, IGNORED, IGNORED], [0, 1, IGNORED]]
    assert scattered.unknown(NUMBERS) == [2]
    assert scattered.apply(NUMBERS).dtype == np.uint8


@pytest.mark.parametrize(
    ("values", "ignored"), [((), ()), (range(256), ()), ((0, 1), (1,)), ((0, 0), ())], ids=["0", "256", "both", "twice"]
)
def test_meanings_that_cannot_be(values, ignored) -> None:
    with pytest.raises(ValueError, match=r"1 to 255 classes|one meaning"):
        LabelMap(tuple(values), tuple(ignored))


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_masks_are_read_in_every_index_format(tmp_path, mode) -> None:
    if mode == "I;16":
        image = Image.fromarray(NUMBERS.astype(np.uint16) * 200)
    else:
        image = Image.fromarray(NUMBERS)
        if mode == "P":
            image.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
    assert image.mode == mode
    image.save(tmp_path / "m.png")
    expected = NUMBERS.astype(int) * (200 if mode == "I;16" else 1)
    assert np.array_equal(read_index_mask(tmp_path / "m.png"), expected)


def test_files_that_are_no_masks_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such mask: .*none\.png"):
        read_index_mask(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot read the mask .*text\.png"):
        read_index_mask(tmp_path / "text.png")
    Image.new("RGB", (3, 2)).save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match=r"colour\.png: it is a colour picture \(RGB\); an index mask has one number"):
        read_index_mask(tmp_path / "colour.png")


def _pair(tmp_path, numbers: np.ndarray) -> MaskedImages:
    Image.new("RGB", (3, 2), (10, 20, 30)).save(tmp_path / "i.png")
    Image.fromarray(numbers).save(tmp_path / "m.png")
    labels = LabelMap((0, 1, 2, 3, 150))
    return MaskedImages(("a", "b", "c", "d", "e"), labels, (tmp_path / "i.png",), (tmp_path / "m.png",))


def test_an_item_is_an_image_and_its_classes(tmp_path) -> None:
    image, mask = _pair(tmp_path, NUMBERS)[0]
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (3, 2), (10, 20, 30))
    assert mask.tolist() == [[0, 1, 2], [4, 3, IGNORED]]


def test_unknown_labels_and_other_sizes_name_the_file(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"m\.png holds the unknown label\(s\) 9, 77: the 5 classes are 0 to 150, ignored"
    ):
        _pair(tmp_path, np.array([[0, 9, 2], [77, 3, 255]], dtype=np.uint8))[0]
    with pytest.raises(ValueError, match=r"m\.png is 2x3 pixels, its image .*i\.png is 3x2"):
        _pair(tmp_path, NUMBERS.T)[0]


def test_ade20k_has_its_150_classes() -> None:
    assert len(ADE20K_CLASSES) == len(set(ADE20K_CLASSES)) == 150
    assert [ADE20K_CLASSES[i] for i in (0, 2, 12, 44, 149)] == ["wall", "sky", "person", "chest of drawers", "flag"]


def test_shares_of_classes_are_of_labelled_pixels(tmp_path) -> None:
    labels = LabelMap((0, 7, 9), ignored=(255,))
    files = []
    for i, numbers in enumerate(([[0, 0, 7], [255, 255, 0]], [[7, 255, 255], [255, 255, 255]])):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(np.array(numbers, dtype=np.uint8)).save(files[-1])
    samples = MaskedImages(("a", "b", "c"), labels, tuple(files), tuple(files))
    assert class_shares(samples).tolist() == [3 / 5, 2 / 5, 0]
    Image.fromarray(np.full((2, 3), 255, dtype=np.uint8)).save(files[0])
    with pytest.raises(ValueError, match="none of the 1 masks has a labelled pixel"):
        class_shares(samples.subset([0]))
