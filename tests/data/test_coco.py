"""COCO data: what is read, what the check finds, what is left out."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from vmamba.data import Category, CocoDataset, check_detection, coco_categories, decode_segmentation, read_coco

pytest.importorskip("faster_coco_eval", reason="COCO masks need faster-coco-eval: pip install 'vmamba[det]'")


def _rewrite(file: Path, contents: dict) -> Path:
    file.write_text(json.dumps(contents))
    return file


def test_boxes_labels_and_masks_are_read(make_coco) -> None:
    images, file, _ = make_coco()
    dataset = CocoDataset(images, file)
    assert dataset.categories == (Category(3, "box"), Category(90, "tri"))
    assert dataset.image_ids == [7, 30]  # 31 has no object
    image, target = dataset[0]
    assert isinstance(image, tv_tensors.Image)
    assert image.shape == (3, 48, 64)
    assert image.dtype == torch.uint8
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].tolist() == [[5, 6, 25, 30], [30, 10, 56, 40]]
    assert target["labels"].tolist() == [1, 2]  # of the sparse ids 3 and 90
    assert target["image_id"] == 7
    assert target["masks"].dtype == torch.bool
    polygon, runs = target["masks"]
    wanted = torch.zeros(48, 64, dtype=torch.bool)
    wanted[6:30, 5:25] = True
    assert torch.equal(polygon, wanted)
    assert torch.equal(runs, image.float().mean(0).lt(100) & ~wanted)  # the dark pixels of the triangle


def test_crowds_are_left_out_and_empty_images_kept_for_evaluation(make_coco) -> None:
    images, file, _ = make_coco()
    dataset = CocoDataset(images, file, keep_empty=True)
    assert dataset.image_ids == [7, 30, 31]
    assert len(dataset[1][1]["labels"]) == 2
    empty = dataset[2][1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 48, 64)


def test_boxes_alone(make_coco) -> None:
    images, file, _ = make_coco(masks=False)
    dataset = CocoDataset(images, file)
    assert not dataset.masks
    assert set(dataset[0][1]) == {"boxes", "labels", "image_id"}
    with pytest.raises(ValueError, match="has no segmentations: set masks=False"):
        CocoDataset(images, file, masks=True)
    images, file, _ = make_coco("with masks")
    assert "masks" not in CocoDataset(images, file, masks=False)[0][1]


def test_compressed_run_lengths_are_the_same_mask() -> None:
    from faster_coco_eval.core import mask as library

    mask = torch.rand(13, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    compressed = library.encode(mask.numpy().astype("uint8").copy(order="F"))
    assert torch.equal(decode_segmentation(compressed, (13, 9)), mask)
    as_json = {"size": compressed["size"], "counts": compressed["counts"].decode()}
    assert torch.equal(decode_segmentation(as_json, (13, 9)), mask)
    two = [[0, 0, 3, 0, 3, 2, 0, 2], [5, 5, 7, 5, 7, 9, 5, 9]]  # one object in two parts
    parts = decode_segmentation(two, (13, 9))
    assert int(parts.sum()) == 6 + 8


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[0, 0, 1, 1]], "at least three points"),
        ([[0, 0, 1, 1, 2, 2, 3]], "at least three points"),
        ([], "at least three points"),
        ({"counts": [1, 2]}, "run lengths with 'size' and 'counts'"),
        ({"size": [3, 4], "counts": [12]}, r"run lengths for height and width \[3, 4\] in an image of \[4, 3\]"),
        ({"size": [4, 3], "counts": [3, 4]}, "run lengths of 7 pixels in an image of 12"),
        ({"size": [4, 3], "counts": [-3, 15]}, "none of them negative"),
        ({"size": [4, 3], "counts": "garb@ge"}, "malformed"),
        ({"size": 12, "counts": [12]}, r"height and width 12 in an image of \[4, 3\]"),
        ([[0, 0, 1, 1, 2, "x"]], "at least three points"),
        (7, "a list of polygons, or run lengths"),
    ],
)
def test_what_is_no_segmentation_is_refused(segmentation, message) -> None:
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, (4, 3))


def test_a_sound_data_set_has_no_findings(make_coco) -> None:
    images, file, _ = make_coco()
    assert check_detection(images, file) == []
    images, file, _ = make_coco("boxes", masks=False)
    assert check_detection(images, file) == []


# annotation of id 1 changed -> kind of finding, what its text says, whether the annotation can still be used
ANNOTATION_MISTAKES = {
    "flat": ({"bbox": [5, 6, 0, 24]}, "degenerate box", r"bbox \[5, 6, 0, 24\]", False),
    "thin": ({"bbox": [5, 6, 20, 0.4]}, "degenerate box", "less than a pixel", False),
    "negative": ({"bbox": [5, 6, -20, 24]}, "degenerate box", "less than a pixel", False),
    "three numbers": ({"bbox": [5, 6, 20]}, "degenerate box", "four numbers", False),
    "not a number": ({"bbox": [5, 6, float("nan"), 2]}, "degenerate box", "four numbers", False),
    "outside": ({"bbox": [70, 6, 20, 24]}, "outside the image", "outside image 7 of 64 x 48 pixels", False),
    "beyond": ({"bbox": [5, 6, 90, 24]}, "beyond the image", "reaches beyond image 7", True),
    "no such image": ({"image_id": 8}, "unknown image", "no image of id 8", False),
    "no such category": ({"category_id": 4}, "unknown category", "category id 4", False),
    "without mask": ({"segmentation": None}, "no segmentation", "others have", False),
    "two points": ({"segmentation": [[1, 1, 2, 2]]}, "bad segmentation", "three points", False),
    "runs of another size": ({"segmentation": {"size": [9, 9], "counts": [81]}}, "bad segmentation", "height", False),
    "no pixel": ({"segmentation": [[5, 6, 5, 6, 5, 6]]}, "empty mask", "no pixel", False),
    "no id": ({"id": None}, "incomplete entry", "integer id", False),
    "a list for an image": ({"image_id": [7]}, "unknown image", r"no image of id \[7\]", False),
    "a list for a category": ({"category_id": [3]}, "unknown category", r"category id \[3\]", False),
    "words for runs": (
        {"segmentation": {"size": [48, 64], "counts": "garb@ge"}},
        "bad segmentation",
        "early end",
        False,
    ),
    "too few runs": (
        {"segmentation": {"size": [48, 64], "counts": "01"}},
        "bad segmentation",
        "decoded 1 pixel",
        False,
    ),
    "second of its id": ({"id": 2}, "duplicate annotation id", "another one", True),
}


@pytest.mark.parametrize("mistake", ANNOTATION_MISTAKES)
def test_mistakes_in_annotations_are_found_and_named(make_coco, mistake) -> None:
    change, kind, text, usable = ANNOTATION_MISTAKES[mistake]
    images, file, contents = make_coco()
    contents["annotations"][0].update(change)
    _rewrite(file, contents)
    (finding,) = check_detection(images, file)
    assert (finding.kind, finding.file) == (kind, file)
    number = contents["annotations"][0]["id"]
    assert finding.id == number
    assert str(finding).startswith(f"{file}: annotation {number}: ")
    with pytest.raises(ValueError, match=rf"1 finding.*{file.name}.*annotation {number}: .*{text}.*on_finding='skip'"):
        CocoDataset(images, file)
    dataset = CocoDataset(images, file, on_finding="skip")
    _, target = dataset[0]
    assert target["labels"].tolist() == ([1, 2] if mistake == "beyond" else [1] if usable else [2])
    assert (target["boxes"] <= torch.tensor([64, 48, 64, 48])).all()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("no image file", "image 7 is not there"),
        ("unreadable image", "image 7 cannot be read"),
        ("other image size", r"image 7 is \(20, 30\) pixels high and wide, annotations.json says \(48, 64\)"),
    ],
)
def test_mistakes_in_images_are_found_and_named(make_coco, kind, text) -> None:
    images, file, _ = make_coco()
    picture = images / "7.png"
    picture.unlink()
    if kind == "unreadable image":
        picture.write_bytes(b"no picture")
    if kind == "other image size":
        Image.new("RGB", (30, 20)).save(picture)
    findings = [f for f in check_detection(images, file) if f.file == picture]
    assert [(f.kind, f.id) for f in findings] == [(kind, 7)]
    with pytest.raises(ValueError, match=f"7.png: {text}"):
        CocoDataset(images, file)
    assert CocoDataset(images, file, on_finding="skip").image_ids == [30]


def test_a_damaged_end_is_found_by_the_check_alone(make_coco) -> None:
    images, file, _ = make_coco()
    (images / "7.png").write_bytes((images / "7.png").read_bytes()[:-40])
    (finding,) = check_detection(images, file)
    assert (finding.kind, finding.file, finding.id) == ("unreadable image", images / "7.png", 7)
    assert len(CocoDataset(images, file)) == 2  # headers alone are read before training


def test_a_category_of_another_name_is_found(make_coco) -> None:
    images, file, _ = make_coco()
    (finding,) = check_detection(images, file, categories=[Category(3, "crate"), Category(90, "tri")])
    assert (finding.kind, finding.file, finding.id) == ("other category name", file, 3)
    assert finding.message == "category 3 is 'box' here, but 'crate' in the list"


def test_doubled_and_incomplete_image_entries(make_coco) -> None:
    images, file, contents = make_coco()
    contents["images"] += [contents["images"][0] | {"file_name": "30.png"}, {"file_name": "x.png"}]
    _rewrite(file, contents)
    findings = check_detection(images, file)
    assert [(f.kind, f.id) for f in findings] == [("duplicate image id", 7), ("incomplete entry", None)]
    assert "second is 30.png" in findings[0].message
    dataset = CocoDataset(images, file, on_finding="skip")
    assert dataset.image_ids == [7, 30]


def test_another_list_of_categories_decides_labels_and_findings(make_coco) -> None:
    images, file, _ = make_coco()
    more = (Category(1, "ball"), Category(3, "box"), Category(90, "tri"))
    assert CocoDataset(images, file, categories=more)[0][1]["labels"].tolist() == [2, 3]
    findings = check_detection(images, file, categories=[Category(90, "tri")])
    assert [(f.kind, f.id) for f in findings] == [("unknown category", i) for i in (1, 4, 12)]
    with pytest.raises(ValueError, match="leaves no image to use"):
        CocoDataset(images, file, categories=[Category(5, "none")], on_finding="skip")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "no list 'images'"),
        ('{"images": [], "annotations": {}}', "no list 'annotations'"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": "a", "name": "b"}]}', "integer id and a name"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "b"}, {"id": 1, "name": "c"}]}',
            "two categories of id 1",
        ),
    ],
)
def test_files_that_are_no_coco(tmp_path, contents, message) -> None:
    (tmp_path / "a.json").write_text(contents)
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        read_coco(tmp_path / "a.json")


def test_missing_files_and_folders(make_coco, tmp_path) -> None:
    images, file, _ = make_coco()
    with pytest.raises(FileNotFoundError, match=r"no annotation file .*nothing\.json"):
        read_coco(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="no image folder .*nowhere"):
        check_detection(tmp_path / "nowhere", file)
    with pytest.raises(ValueError, match="on_finding must be one of"):
        CocoDataset(images, file, on_finding="ignore")


def test_cocos_own_categories() -> None:
    categories = coco_categories()
    assert len(categories) == 80
    assert categories[0] == (1, "person")
    assert categories[-1] == (90, "toothbrush")
    assert [c.id for c in categories] == sorted(c.id for c in categories)


# images, annotated images, annotations, findings by kind; what each pack's README says
PACKS = {
    ("coco_mini", "train", "annotations/instances_train.json"): (436, 432, True, {"degenerate box": 1}),
    ("coco_mini", "val", "annotations/instances_val.json"): (142, 142, True, {}),
    ("nuclei_dsb2018", "images", "annotations/instances_val.json"): (133, 133, True, {}),
    ("bccd", "images", "annotations/instances_train.json"): (205, 205, False, {}),
}


@pytest.mark.parametrize("pack", PACKS, ids=" ".join)
def test_real_data_sets_load(shared, tmp_path, pack) -> None:
    name, folder, file = pack
    images, annotated, masks, kinds = PACKS[pack]
    with zipfile.ZipFile(shared / "data" / name / f"{name}.zip") as archive:
        archive.extractall(tmp_path)
    findings = check_detection(tmp_path / folder, tmp_path / file)
    assert Counter(finding.kind for finding in findings) == kinds
    dataset = CocoDataset(tmp_path / folder, tmp_path / file, on_finding="skip")
    assert (len(dataset.coco.images), len(dataset), dataset.masks) == (images, annotated, masks)
    for index in range(0, len(dataset), 20):
        image, target = dataset[index]
        assert len(target["boxes"]) == len(target["labels"]) > 0
        if masks:
            assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
            assert target["masks"].flatten(1).any(1).all()


def test_items_from_memory_are_those_from_files(make_coco) -> None:
    images, file, _ = make_coco()
    files, memory = (CocoDataset(images, file, keep_empty=True) for _ in range(2))
    memory.load()
    memory.load()  # once is enough
    for i in range(3):
        (one, wanted), (other, target) = files[i], memory[i]
        assert torch.equal(one, other)
        assert wanted.keys() == target.keys()
        assert all(torch.equal(wanted[name], target[name]) for name in wanted)
    for path in images.iterdir():
        path.unlink()
    assert memory[0][0].shape == (3, 48, 64)
    assert "masks" not in memory.without_masks()[0][1]
    assert "masks" in memory[0][1]
