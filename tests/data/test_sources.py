"""Data sources by name: their splits, and what does not fit together."""

import numpy as np
import pytest

from vmamba.data import open_labelled, open_source


def open_it(source):
    return open_source(str(source), val_fraction=0.25, split_seed=0)


def test_digits_are_split_the_same_way_for_everybody():
    splits = open_source("digits", val_fraction=0.5, split_seed=7)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1259, 179, 359)
    assert splits.classes == tuple("0123456789")
    every = [image.tobytes() for part in (splits.train, splits.val, splits.test) for image in part.images]
    assert len(every) == 1797
    assert splits.test.images.max() == 255
    assert set(splits.test.labels) == set(range(10))
    image, label = splits.test[0]
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert label == splits.test.labels[0]


def test_digit_splits_are_disjoint():
    splits = open_source("digits", val_fraction=0.1, split_seed=0)
    train, val, test = ({image.tobytes() for image in part.images} for part in (splits.train, splits.val, splits.test))
    # scikit-learn's set holds no two equal images, so equal bytes would be a leak
    assert len(train | val | test) == 1797


def test_flat_folder_is_split(make_photos):
    splits = open_it(make_photos("photos", {"cat": 8, "dog": 4}))
    assert (len(splits.train), len(splits.val), splits.test) == (9, 3, None)
    assert not set(splits.train.paths) & set(splits.val.paths)


def test_train_val_and_test_folders(make_photos):
    root = make_photos("photos", {f"{part}/{name}": 2 for part in ("train", "val", "test") for name in ("cat", "dog")})
    splits = open_it(root)
    assert splits.classes == ("cat", "dog")
    assert all("test" in p.parts for p in splits.test.paths)
    assert all("val" in p.parts for p in splits.val.paths)


def test_train_and_val_with_different_classes(make_photos):
    root = make_photos("photos", {"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/emu": 1})
    with pytest.raises(ValueError, match=r"only in train: \['dog'\], only in val: \['emu'\]"):
        open_it(root)


def test_without_val_a_part_of_train_is_held_out(make_photos):
    splits = open_it(make_photos("photos", {"train/cat": 8, "train/dog": 4, "test/cat": 1, "test/dog": 2}))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (9, 3, 3)
    assert all("train" in path.parts for path in splits.val.paths)


def test_parts_without_train(make_photos):
    with pytest.raises(ValueError, match="must have a part train, or no parts at all; found val, test"):
        open_it(make_photos("photos", {"val/cat": 1, "val/dog": 1, "test/cat": 1, "test/dog": 1}))


def test_a_class_may_be_called_val(make_photos):
    assert open_it(make_photos("photos", {"val": 4, "ohm": 4})).classes == ("ohm", "val")


def test_neither_folder_nor_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such data folder: nowhere"):
        open_it("nowhere")
    (tmp_path / "photos.rar").write_bytes(b"Rar!")
    with pytest.raises(ValueError, match=r"photos\.rar is no folder of images and no zip or tar file"):
        open_it(tmp_path / "photos.rar")


def test_single_class(make_photos):
    with pytest.raises(ValueError, match="one class only .cat.: classification needs at least two"):
        open_it(make_photos("photos", {"cat": 3}))


def test_names_to_show(make_photos):
    root = make_photos("photos", {"n01": 2, "n02": 2})
    (root / "classes.txt").write_text("n02\tsea cucumber\n")
    assert open_it(root).display_names == ("n01", "sea cucumber")
    (root / "classes.txt").write_text("n02 sea cucumber\n")
    with pytest.raises(ValueError, match="a TAB and the name"):
        open_it(root)


def test_labels_of_an_evaluation_folder_follow_the_model(make_photos):
    root = make_photos("photos", {"test/dog": 2, "val/cat": 1})
    samples = open_labelled(str(root), ("cat", "cow", "dog"))
    assert samples.labels == (2, 2)
    with pytest.raises(ValueError, match="not trained on: dog; it knows cat, cow"):
        open_labelled(str(root), ("cat", "cow"))


def test_digits_for_a_model_of_something_else():
    with pytest.raises(ValueError, match="holds classes the model was not trained on: 0, 1"):
        open_labelled("digits", ("cat", "dog"))


def test_imagenette_is_read_from_its_zip_files(shared):
    splits = open_it(shared / "data" / "imagenette160")
    assert (len(splits.train), len(splits.val), splits.test) == (9469, 3925, None)
    assert splits.display_names[:2] == ("tench", "English springer")
    image, label = splits.train[9468]
    assert (image.mode, image.size, label) == ("RGB", (160, 160), 9)
    assert open_labelled(str(shared / "data" / "imagenette160"), splits.classes).labels == splits.val.labels


def test_cifar10_is_read_from_its_zip_file(shared):
    splits = open_it(shared / "data" / "cifar10")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (37500, 12500, 10000)
    assert " ".join(splits.display_names) == "airplane automobile bird cat deer dog frog horse ship truck"
    # the known statistics of the training images, within what the packing lost
    mean = np.concatenate([splits.train.images, splits.val.images]).mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(mean, (0.4914, 0.4822, 0.4465), atol=0.002)
