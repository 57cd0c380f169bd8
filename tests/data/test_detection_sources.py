"""Detection data sets found by the layout of their folders."""

import json
import shutil

import pytest

from vmamba.cli import main
from vmamba.data import open_detection


@pytest.fixture
def place(make_coco, tmp_path):
    """A function that puts the data set of two photos with objects under other names: (images, file) of each part."""

    def put(**parts):
        root = tmp_path / "root"
        for name, (images, file) in parts.items():
            folder, annotations, _ = make_coco(name)
            shutil.copytree(folder, root / images, dirs_exist_ok=True)
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(annotations, root / file)
        return root

    return put


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (("train2017", "annotations/instances_train2017.json"), ("val2017", "annotations/instances_val2017.json")),
        (("train", "annotations/instances_train.json"), ("val", "annotations/instances_val.json")),
        (("images/train", "annotations/train.json"), ("images/val", "annotations/val.json")),
        (("images", "train.json"), ("images", "val.json")),
        (("train", "train/_annotations.coco.json"), ("valid", "valid/_annotations.coco.json")),
        ((".", "instances_training.json"), (".", "instances_validation.json")),
    ],
)
def test_layouts(place, train, val) -> None:
    root = place(train=train, val=val)
    found = open_detection(root)
    assert list(found) == ["train", "val"]
    for name, (images, file) in (("train", train), ("val", val)):
        assert found[name].images.resolve() == (root / images).resolve()
        assert found[name].coco.file == root / file


def test_file_names_may_hold_the_parts_folder(place) -> None:
    root = place(
        train=("images/train", "train.json"), val=("images/val", "val.json"), test=("images/test", "test.json")
    )
    for name in ("train", "val", "test"):
        contents = json.loads((root / f"{name}.json").read_text())
        for image in contents["images"]:
            image["file_name"] = f"{name}/{image['file_name']}"
        (root / f"{name}.json").write_text(json.dumps(contents))
    found = open_detection(root)
    assert list(found) == ["train", "val", "test"]
    assert {part.images for part in found.values()} == {root / "images"}


def test_without_parts_images_are_held_out(place) -> None:
    root = place(whole=("images", "annotations.json"))
    found = open_detection(root, val_fraction=0.34)
    ids = {name: {entry["id"] for entry in part.coco.images} for name, part in found.items()}
    assert len(ids["val"]) == 1
    assert ids["train"] | ids["val"] == {7, 30, 31}
    for name, part in found.items():
        assert {entry["image_id"] for entry in part.coco.annotations} <= ids[name]
        assert part.coco.categories == found["train"].coco.categories
    assert sum(len(part.coco.annotations) for part in found.values()) == 5
    assert ids != {
        name: {e["id"] for e in part.coco.images}
        for name, part in open_detection(root, val_fraction=0.34, split_seed=1).items()
    }


def test_what_is_missing_is_named(place, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such data folder: nowhere"):
        open_detection("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is no detection data set"):
        open_detection(tmp_path / "empty")
    root = place(train=("images", "train.json"))
    with pytest.raises(ValueError, match=r"no annotations of the part 'val': it has train\.json"):
        open_detection(root)
    shutil.copy(root / "train.json", root / "val.json")
    shutil.rmtree(root / "images")
    with pytest.raises(FileNotFoundError, match=r"7\.png of .*train\.json is in none of .*root/images"):
        open_detection(root)
    for year in (2014, 2017):
        shutil.copy(root / "train.json", root / f"instances_train{year}.json")
    with pytest.raises(ValueError, match="two files of the part 'train'"):
        open_detection(root)


def test_the_check_looks_at_all_parts(place, capsys) -> None:
    root = place(train=("images/train", "train.json"), val=("images/val", "val.json"))
    main(["data", "check", str(root), "--task", "detection"])
    printed = capsys.readouterr().out
    assert printed.count("images 3, annotations 5, categories 2, with masks") == 2
    assert "nothing is wrong" in printed
    (root / "images" / "val" / "30.png").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(root), "--task", "detection"])
    assert stop.value.code == 1
    assert "30.png: image 30 is not there" in capsys.readouterr().out
