"""Images inside zip and tar files: found, named and read like those of a folder."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
from torch.utils.data import DataLoader

from vmamba.data import open_labelled, open_source, training_loader
from vmamba.data.transforms import Preprocessing, evaluation_transform


def open_it(source, **options):
    return open_source(str(source), **{"val_fraction": 0.25, "split_seed": 0, **options})


def packed(root, path, suffix=".zip", prefix="", compression=zipfile.ZIP_STORED):
    """All files under ``root`` in one archive."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", compression) as archive:
            for file in files:
                archive.write(file, prefix + str(file.relative_to(root)))
    else:
        with tarfile.open(path, "w") as archive:
            for file in files:
                archive.add(file, prefix + str(file.relative_to(root)))
    return path


def same(left, right):
    assert left.classes == right.classes
    assert tuple(left.labels) == tuple(right.labels)
    for i in range(len(left)):
        assert np.array_equal(np.asarray(left[i][0]), np.asarray(right[i][0]))


@pytest.mark.parametrize("prefix", ["", "imagenette2/", "a/b/"])
@pytest.mark.parametrize(
    ("suffix", "compression"), [(".zip", zipfile.ZIP_STORED), (".zip", zipfile.ZIP_DEFLATED), (".tar", None)]
)
def test_an_archive_is_what_the_folder_is(make_photos, tmp_path, prefix, suffix, compression):
    root = make_photos("photos", {f"{part}/{name}": 3 for part in ("train", "val", "test") for name in ("cat", "dog")})
    (root / "classes.txt").write_text("cat\tfelis\n")
    archive = open_it(packed(root, tmp_path / f"all{suffix}", suffix, prefix, compression))
    folder = open_it(root)
    for part in ("train", "val", "test"):
        same(getattr(archive, part), getattr(folder, part))
    assert archive.display_names == ("felis", "dog")
    assert archive.train.name(0) == f"{tmp_path}/all{suffix}/{prefix}train/cat/0.png"
    same(open_labelled(str(tmp_path / f"all{suffix}"), ("cat", "dog")), folder.test)


def test_several_archives_are_one_tree(make_photos, tmp_path):
    whole = make_photos("whole", {"train/cat": 4, "train/dog": 4, "val/cat": 2, "val/dog": 2})
    archives = tmp_path / "archives"
    archives.mkdir()
    files = sorted(p for p in whole.rglob("*") if p.is_file())
    for place, part in enumerate((files[::2], files[1::2])):
        with zipfile.ZipFile(archives / f"{place}.zip", "w") as archive:
            for file in part:
                archive.write(file, str(file.relative_to(whole)))
    both = open_it(archives)
    same(both.train, open_it(whole).train)
    same(both.val, open_it(whole).val)


def test_shards_in_the_folders_of_splits(make_photos, tmp_path):
    root = tmp_path / "shards"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        packed(make_photos(split, {"cat": 2, "dog": 2}), root / split / "0.tar", ".tar")
    splits = open_it(root)
    assert (splits.classes, len(splits.train), len(splits.val)) == (("cat", "dog"), 4, 4)


def test_an_archive_beside_class_folders_is_none_of_the_data(make_photos, tmp_path):
    root = make_photos("photos", {"cat": 4, "dog": 4})
    packed(root, tmp_path / "copy.zip")
    (tmp_path / "copy.zip").rename(root / "copy.zip")
    assert open_it(root).train.name(0).endswith("photos/cat/0.png")


def test_an_archive_without_splits_is_split(make_photos, tmp_path):
    splits = open_it(packed(make_photos("photos", {"cat": 8, "dog": 4}), tmp_path / "photos.zip"))
    assert (len(splits.train), len(splits.val), splits.test) == (9, 3, None)


def shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, data in samples:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def pngs(make_photos):
    return [path.read_bytes() for path in sorted(make_photos("photos", {"x": 6}).rglob("*.png"))]


def test_webdataset_shards(pngs, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for split, part in (("train", 0), ("train", 1), ("validation", 0)):
        samples = []
        for i in range(2):
            key = f"{part}{i}"
            samples += [(f"{key}.png", pngs[2 * part + i]), (f"{key}.cls", str(i).encode()), (f"{key}.json", b"{}")]
        shard(folder / f"tiny-{split}-000{part}.tar", samples)
    splits = open_it(folder)
    assert splits.classes == ("0", "1")
    assert (splits.train.labels, splits.val.labels, splits.test) == ((0, 0, 1, 1), (0, 1), None)
    assert splits.train.encoded(1) == pngs[2]
    (folder / "classes.txt").write_text("cat\ndog\n")
    assert open_it(folder).classes == ("cat", "dog")


def test_a_shard_with_an_image_of_no_class(pngs, tmp_path):
    shard(tmp_path / "a.tar", [("1.png", pngs[0]), ("1.cls", b"0"), ("2.png", pngs[1])])
    with pytest.raises(ValueError, match=r"2\.png has no file 2\.cls"):
        open_it(tmp_path / "a.tar")


def test_workers_read_what_the_main_process_reads(make_photos, tmp_path):
    samples = open_it(packed(make_photos("photos", {"cat": 8, "dog": 8}), tmp_path / "photos.tar", ".tar")).train
    transform = evaluation_transform(Preprocessing((32, 32)))
    alone, together = (
        [labels.tolist() for _, labels in training_loader(samples, transform, batch_size=4, workers=workers, seed=0)]
        for workers in (0, 2)
    )
    assert alone == together


def damage(path, name):
    """Overwrite the middle of the member ``name``."""
    data = bytearray(path.read_bytes())
    start = data.index(name.encode()) + 700  # beyond the header of a tar file
    data[start : start + 50] = bytes(50)
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_a_damaged_member_is_named_or_left_out(make_photos, tmp_path, caplog, suffix):
    path = packed(make_photos("photos", {"cat": 4, "dog": 4}), tmp_path / f"photos{suffix}", suffix)
    damage(path, "cat/2.png")
    caplog.clear()
    splits = open_it(path, on_unreadable="skip")
    assert len(splits.train) + len(splits.val) == 7
    assert caplog.text.count("cat/2.png") == 1
    from vmamba.data.sources import list_parts

    samples = list_parts(str(path))[0][""]
    loader = DataLoader(samples, sampler=[2], num_workers=1, collate_fn=lambda batch: batch)
    with pytest.raises(ValueError, match=rf"cannot read .*photos{suffix}/cat/2\.png"):
        next(iter(loader))


@pytest.mark.parametrize("name", ["bad.zip", "bad.tar"])
def test_a_damaged_archive_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"no archive at all" * 100)
    with pytest.raises(ValueError, match=f"{name} is no (zip|tar) file"):
        open_it(tmp_path / name)


def test_a_cut_off_tar_file_is_named(make_photos, tmp_path):
    path = packed(make_photos("photos", {"cat": 4, "dog": 4}), tmp_path / "photos.tar", ".tar")
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"photos\.tar"):
        open_it(path)


def test_images_outside_class_folders(make_photos, tmp_path):
    root = make_photos("photos", {"train/cat": 1, "train": 1})
    with pytest.raises(ValueError, match=r"train/0\.png lies in no class folder"):
        open_it(packed(root, tmp_path / "photos.zip"))


def test_an_archive_without_images(tmp_path):
    with zipfile.ZipFile(tmp_path / "notes.zip", "w") as archive:
        archive.writestr("notes.txt", "nothing")
    with pytest.raises(ValueError, match=r"there are no images in notes\.zip"):
        open_it(tmp_path / "notes.zip")
