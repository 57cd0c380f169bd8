"""Data sets by the layout of their folder."""

from __future__ import annotations

import json
import shutil
import zipfile

import numpy as np
import pytest

from vmamba.data.segmentation import ADE20K_CLASSES, CAMVID_CLASSES, IGNORED, find_segmentation, open_segmentation


def test_a_folder_of_images_and_a_folder_of_masks(folder) -> None:
    splits = open_segmentation(folder)
    assert splits.classes == ("sky", "road", "car")
    assert (len(splits.train), len(splits.val), splits.test) == (4, 2, None)
    image, mask = splits.val[1]
    assert image.size == (24, 18)
    assert (mask.shape, set(np.unique(mask))) == ((18, 24), {0, 1, 2, IGNORED})
    assert splits.val.masks[1] == folder / "masks" / "val" / "1.png"


def test_endings_may_differ_and_folders_may_nest(make_masked) -> None:
    root = make_masked({"images/train/x/a.jpg": "masks/train/x/a.png", "images/val/a.webp": "masks/val/a.png"})
    (root / "classes.txt").write_text("a\nb\nc")
    splits = open_segmentation(root)
    assert splits.train.images == (root / "images" / "train" / "x" / "a.jpg",)
    assert splits.train.masks == (root / "masks" / "train" / "x" / "a.png",)


def test_without_parts_some_images_are_held_out(make_masked) -> None:
    root = make_masked({f"images/{i}.png": f"masks/{i}.png" for i in range(10)})
    (root / "classes.txt").write_text("a\nb\nc")
    splits = open_segmentation(root, val_fraction=0.3)
    assert (len(splits.train), len(splits.val)) == (7, 3)
    assert len({*splits.train.images, *splits.val.images}) == 10
    assert open_segmentation(root, val_fraction=0.3).val == splits.val
    assert open_segmentation(root, val_fraction=0.3, split_seed=1).val != splits.val
    with pytest.raises(ValueError, match="between 0 and 1, not 1"):
        open_segmentation(root, val_fraction=1)


def test_ignored_numbers_are_no_classes(folder) -> None:
    source = find_segmentation(folder, ignored=(0, 255))
    assert source.classes == ("road", "car")
    _, mask = open_segmentation(source).val[0]
    assert set(np.unique(mask)) == {0, 1, IGNORED}
    assert find_segmentation(folder, classes=["x", "y", "z"]).classes == ("x", "y", "z")


@pytest.mark.parametrize("inside", ["", "ADEChallengeData2016/"])
def test_ade20k(make_masked, inside) -> None:
    root = make_masked(
        {
            f"{inside}images/{part}/{i}.jpg": f"{inside}annotations/{part}/{i}.png"
            for part in ("training", "validation")
            for i in (1, 2)
        },
        labels=(0, 1, 150),
    )
    splits = open_segmentation(root)
    assert splits.classes == ADE20K_CLASSES
    _, mask = splits.train[0]
    assert set(np.unique(mask)) == {IGNORED, 0, 149}


@pytest.mark.parametrize("layout", ["trainannot", "annotations"])
def test_camvid(make_masked, layout) -> None:
    image, mask = (
        ("{}/{}.png", "{}annot/{}.png") if layout == "trainannot" else ("images/{}/{}.png", "annotations/{}/{}.png")
    )
    root = make_masked(
        {image.format(part, i): mask.format(part, i) for part in ("train", "val", "test") for i in (1, 2)},
        labels=(0, 10, 11),
    )
    if layout == "annotations":
        (root / "classes.txt").write_text("\n".join([*CAMVID_CLASSES, "Unlabelled(ignore)"]))
    splits = open_segmentation(root)
    assert splits.classes == CAMVID_CLASSES
    assert len(splits.test) == 2
    _, numbers = splits.train[0]
    assert set(np.unique(numbers)) == {0, 10, IGNORED}


def test_masks_of_some_of_the_images(make_masked) -> None:
    root = make_masked({"train/1.png": "semseg/train/1.png", "train/2.png": None, "val/3.png": "semseg/val/3.png"})
    (root / "semseg" / "classes.json").write_text(json.dumps([{"name": name} for name in "abc"]))
    splits = open_segmentation(root)
    assert splits.classes == ("a", "b", "c")
    assert [path.name for path in splits.train.images] == ["1.png"]


def test_what_is_missing_is_named(folder, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such data folder: nowhere"):
        open_segmentation("nowhere")
    with pytest.raises(FileNotFoundError, match=r"no segmentation data set: put the pictures under .*images.*masks"):
        open_segmentation(tmp_path)
    (folder / "classes.txt").rename(folder / "names.txt")
    with pytest.raises(FileNotFoundError, match=r"does not name its classes: write .*classes\.txt"):
        open_segmentation(folder)
    (folder / "classes.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"classes\.txt is empty"):
        open_segmentation(folder)


def test_parts_must_be_there_and_hold_pairs(folder) -> None:
    shutil.move(folder / "masks" / "val" / "0.png", folder / "masks" / "train" / "other.png")
    with pytest.raises(ValueError, match=r"1 mask\(s\) without an image under .*train: .*other\.png"):
        open_segmentation(folder)
    (folder / "masks" / "train" / "other.png").unlink()
    with pytest.raises(ValueError, match=r"1 image\(s\) without a mask under .*val: .*images/val/0\.png"):
        open_segmentation(folder)
    (folder / "masks" / "val" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"no image under .*images/val has a mask"):
        open_segmentation(folder)
    shutil.rmtree(folder / "masks" / "val")
    with pytest.raises(ValueError, match="has no part 'val': it has train"):
        open_segmentation(folder)


def test_two_images_of_one_name(folder) -> None:
    shutil.copy(folder / "images" / "train" / "0.png", folder / "images" / "train" / "0.jpg")
    with pytest.raises(ValueError, match=r"1 file\(s\) with the name of another, apart from the ending: .*0\.png"):
        open_segmentation(folder)


def test_camvid_as_it_lies_in_shared(shared, tmp_path) -> None:
    with zipfile.ZipFile(shared / "data" / "camvid" / "camvid.zip") as archive:
        archive.extractall(tmp_path)
    splits = open_segmentation(tmp_path)
    assert splits.classes == CAMVID_CLASSES
    assert (len(splits.train), len(splits.val), len(splits.test)) == (367, 101, 233)
    image, mask = splits.test[0]
    assert (image.size, mask.shape) == ((480, 360), (360, 480))
    assert set(np.unique(mask)) <= {*range(11), IGNORED}


def test_coco_mini_as_it_lies_in_shared(shared, tmp_path) -> None:
    with zipfile.ZipFile(shared / "data" / "coco_mini" / "coco_mini.zip") as archive:
        archive.extractall(tmp_path)
    splits = open_segmentation(tmp_path)
    assert (len(splits.classes), splits.classes[0]) == (133, "person")
    assert (len(splits.train), len(splits.val)) == (150, 50)
    seen = {label for i in range(50) for label in np.unique(splits.val[i][1])} - {IGNORED}
    assert len(seen) == 104
