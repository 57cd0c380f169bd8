"""What is wrong with a data set, before training starts."""

from __future__ import annotations

import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from vmamba.data.segmentation import Finding, check_segmentation, find_segmentation


def _overwrite(path, numbers) -> None:
    Image.fromarray(np.asarray(numbers, dtype=np.uint8)).save(path)


def test_nothing_is_wrong(folder) -> None:
    assert check_segmentation(folder) == []
    assert check_segmentation(find_segmentation(folder)) == []


def test_every_fault_is_found_and_its_file_named(folder) -> None:
    images, masks = folder / "images", folder / "masks"
    _overwrite(masks / "train" / "0.png", np.full((18, 24), 7))
    _overwrite(masks / "train" / "1.png", np.zeros((24, 18)))
    Image.new("RGB", (24, 18)).save(masks / "train" / "2.png")
    (images / "train" / "3.png").write_bytes(b"no image")
    (masks / "val" / "0.png").unlink()
    shutil.copy(masks / "val" / "1.png", masks / "val" / "stray.png")
    shutil.copy(images / "val" / "1.png", images / "val" / "1.jpg")
    found = {finding.file.relative_to(folder).as_posix(): finding for finding in check_segmentation(folder)}
    expected = {
        "masks/train/0.png": ("unknown label", "label(s) 7: the 3 classes are 0 to 2, ignored is 255"),
        "masks/train/1.png": ("other size", "is 18x24 pixels, its image"),
        "masks/train/2.png": ("unreadable mask", "is a colour picture (RGB)"),
        "images/train/3.png": ("unreadable image", "cannot be read: "),
        "images/val/0.png": ("no mask", "has no mask under"),
        "masks/val/stray.png": ("no image", "has no image under"),
        "images/val/1.png": ("same name", "has the name of another file"),
    }
    assert found.keys() == expected.keys()
    for name, (kind, message) in expected.items():
        assert found[name].kind == kind
        assert message in found[name].message
        assert str(found[name]).startswith(f"{folder / name}: ")
        assert "\n" not in str(found[name])
        assert str(found[name]).count(str(folder / name)) == 1


def test_a_part_without_pairs(folder) -> None:
    for path in (folder / "masks" / "val").iterdir():
        path.unlink()
    empty, *images = check_segmentation(folder)
    assert empty == Finding("empty part", folder / "images" / "val", empty.message)
    assert f"under {folder / 'masks' / 'val'}" in empty.message
    assert [finding.kind for finding in images] == ["no mask", "no mask"]


def test_images_without_mask_are_fine_where_some_are_labelled(make_masked) -> None:
    root = make_masked({"train/1.png": "semseg/train/1.png", "train/2.png": None, "val/3.png": "semseg/val/3.png"})
    (root / "semseg" / "classes.json").write_text('[{"name": "a"}, {"name": "b"}, {"name": "c"}]')
    assert check_segmentation(root) == []


@pytest.mark.slow
@pytest.mark.parametrize("pack", ["camvid", "coco_mini"])
def test_the_shared_data_sets_are_whole(shared, tmp_path, pack) -> None:
    with zipfile.ZipFile(shared / "data" / pack / f"{pack}.zip") as archive:
        archive.extractall(tmp_path)
    assert check_segmentation(tmp_path) == []
    mask = next(path for path in sorted(tmp_path.rglob("*.png")) if "val" in path.parts)
    numbers = np.array(Image.open(mask))
    numbers[0, 0] = 200
    _overwrite(mask, numbers)
    (finding,) = check_segmentation(tmp_path)
    assert finding.file == mask
    assert "unknown label(s) 200" in finding.message
