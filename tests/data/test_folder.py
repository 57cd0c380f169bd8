"""Image folders: what is found, how it is split, and what is refused before work starts."""

import pytest

from vmamba.data import image_folder, read_image, stratified_split


def test_finds_classes_and_images_in_order(make_photos):
    root = make_photos("photos", {"dog": 2, "cat": 1, "cat/nested": 1, ".hidden": 1})
    (root / "cat" / "notes.txt").write_text("no image")
    files = image_folder(root)
    assert files.classes == ("cat", "dog")
    assert [str(p.relative_to(root)) for p in files.paths] == [
        "cat/0.png",
        "cat/nested/0.png",
        "dog/0.png",
        "dog/1.png",
    ]
    assert files.labels == (0, 0, 1, 1)
    image, label = files[3]
    assert (image.mode, image.size, label) == ("RGB", (40, 36), 1)


def test_missing_folder():
    with pytest.raises(FileNotFoundError, match="no such data folder: nowhere"):
        image_folder("nowhere")


def test_folder_without_class_folders(tmp_path):
    with pytest.raises(ValueError, match="no class folders"):
        image_folder(tmp_path)


def test_empty_class_folder_is_named(make_photos):
    root = make_photos("photos", {"cat": 1, "dog": 0, "emu": 0})
    with pytest.raises(ValueError, match="dog, emu"):
        image_folder(root)


@pytest.mark.parametrize("content", [b"", b"this is no image"])
def test_file_that_is_no_image(make_photos, content):
    root = make_photos("photos", {"cat": 2, "dog": 2})
    (root / "dog" / "bad.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"1 unreadable image.*bad\.jpg.*on_unreadable=skip"):
        image_folder(root)
    files = image_folder(root, on_unreadable="skip")
    assert len(files) == 4
    assert not any(p.name == "bad.jpg" for p in files.paths)


def test_truncated_image_is_skipped_or_named_when_read(make_photos):
    root = make_photos("photos", {"cat": 2, "dog": 2})
    whole = (root / "dog" / "0.png").read_bytes()
    (root / "dog" / "0.png").write_bytes(whole[: len(whole) // 2])
    assert len(image_folder(root, on_unreadable="skip")) == 3
    files = image_folder(root)
    with pytest.raises(ValueError, match=r"cannot read the image .*dog/0\.png"):
        files[2]


def test_class_with_only_unreadable_images(make_photos):
    root = make_photos("photos", {"cat": 1, "dog": 0})
    (root / "dog" / "bad.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="no readable images: dog"):
        image_folder(root, on_unreadable="skip")


def test_unknown_policy(make_photos):
    with pytest.raises(ValueError, match="on_unreadable must be one of.*'ignore'"):
        image_folder(make_photos("photos", {"cat": 1}), on_unreadable="ignore")


def test_missing_image():
    with pytest.raises(FileNotFoundError, match=r"no such image: nothing\.png"):
        read_image("nothing.png")


def test_split_is_stratified_disjoint_and_repeatable():
    labels = [0] * 10 + [1] * 20 + [2] * 2
    rest, held_out = stratified_split(labels, 0.3, seed=5)
    assert sorted(rest + held_out) == list(range(32))
    assert [sum(labels[i] == label for i in held_out) for label in range(3)] == [3, 6, 1]
    assert stratified_split(labels, 0.3, seed=5) == (rest, held_out)
    assert stratified_split(labels, 0.3, seed=6) != (rest, held_out)


def test_split_needs_two_images_of_a_class():
    with pytest.raises(ValueError, match="class 1 has a single image"):
        stratified_split([0, 0, 1], 0.5, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_split_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        stratified_split([0, 0], fraction, seed=0)
