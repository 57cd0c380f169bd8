"""The inspection of a data set: it counts what is there and names what is wrong."""

import json
import zipfile

from PIL import Image

from vmamba.data.inspection import inspect


def test_counts_and_sizes(make_photos):
    root = make_photos("photos", {"train/cat": 3, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    # other bytes than the others, so that no file is in two parts
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        Image.new("RGB", (40 + i, 36), (i, 0, 0)).save(path)
    Image.new("L", (7, 90)).save(root / "train/cat/grey.jpg")
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(root / "train/dog/moving.gif", save_all=True, append_images=frames[1:])
    report = inspect(str(root))
    train = report.parts["train"]
    assert report.usable
    assert (train.images, train.images_of_class) == (7, {"cat": 4, "dog": 3})
    assert (train.width.least, train.width.most, train.height.median) == (7, 44, 36)
    assert train.formats == {"PNG": 5, "GIF": 1, "JPEG": 1}
    assert train.modes["L"] == 1
    assert train.several_frames == 1
    assert report.same_file == []
    assert json.loads(json.dumps(report.as_dict()))["parts"]["val"]["images"] == 2


def test_unreadable_images_are_named(make_photos):
    root = make_photos("photos", {"cat": 3, "dog": 3})
    whole = (root / "cat/1.png").read_bytes()
    (root / "cat/1.png").write_bytes(whole[: len(whole) // 2])
    (root / "dog/0.jpg").write_bytes(b"")
    (root / "dog/1.webp").write_bytes(b"<html>not found</html>")
    report = inspect(str(root))
    assert not report.usable
    troubles = {str(finding.file): finding.message for finding in report.parts[""].unreadable}
    assert {name.rsplit("/", 2)[1] + "/" + name.rsplit("/", 1)[1] for name in troubles} == {
        "cat/1.png",
        "dog/0.jpg",
        "dog/1.webp",
    }
    assert all(name in reason for name, reason in troubles.items())
    assert "truncated" in troubles[f"{root}/cat/1.png"]
    assert "no image file" in troubles[f"{root}/dog/1.webp"]
    assert report.parts[""].width.most == 40


def test_classes_that_differ(make_photos):
    report = inspect(str(make_photos("photos", {"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/emu": 1})))
    assert not report.usable
    assert "only in train: ['dog'], only in val: ['emu']" in report.class_difference


def test_the_same_file_in_two_parts_or_classes(make_photos):
    root = make_photos("photos", {"train/cat": 2, "train/dog": 1, "val/cat": 1, "val/dog": 1})
    data = (root / "train/cat/1.png").read_bytes()
    for name in ("train/cat/copy.png", "train/dog/copy.png", "val/dog/0.png"):
        (root / name).write_bytes(data)
    report = inspect(str(root))
    assert report.usable
    pairs = {(one.removeprefix(f"{root}/"), other.removeprefix(f"{root}/")) for one, other in report.same_file}
    # make_photos draws the same picture 0 for train/cat and, later ones, others
    assert ("train/cat/1.png", "train/dog/copy.png") in pairs
    assert ("train/cat/1.png", "val/dog/0.png") in pairs
    assert ("train/cat/1.png", "train/cat/copy.png") not in pairs


def test_damage_inside_an_archive(make_photos, tmp_path):
    root = make_photos("photos", {"cat": 2, "dog": 2})
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, str(file.relative_to(root)))
    data = bytearray(path.read_bytes())
    data[data.index(b"dog/0.png") + 500] ^= 1  # a single bit
    path.write_bytes(data)
    (finding,) = inspect(str(path)).parts[""].unreadable
    assert str(finding.file) == f"{path}/dog/0.png"
    assert "checksum" in finding.message


def test_digits(capsys):
    lines = []
    report = inspect("digits", lines.append)
    assert report.usable
    assert [part.images for part in report.parts.values()] == [1259, 179, 359]
    assert report.parts["test"].width.most == 8
