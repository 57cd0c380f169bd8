"""Writing aside: whole files or none, and the earlier one survives."""

import errno

import pytest
import torch

from vmamba._extras import require
from vmamba._files import save_tensors, write_aside, write_text


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "good.txt"
    write_text("good", path)

    def full_disk(aside):
        aside.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*good\.txt.*No space left.*the earlier file is untouched"):
        write_aside(path, full_disk)
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_torchs_own_complaint_about_a_full_disk_is_an_oserror(tmp_path, monkeypatch):
    def torch_on_a_full_disk(contents, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")

    monkeypatch.setattr(torch, "save", torch_on_a_full_disk)
    with pytest.raises(OSError, match=r"cannot write .*x\.ckpt"):
        save_tensors({}, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*nowhere"):
        write_text("x", tmp_path / "nowhere" / "file.txt")


def test_missing_dependency_says_what_to_install():
    with pytest.raises(ModuleNotFoundError, match=r"'surely_not_there'.*pip install 'vmamba\[train\]'"):
        require("surely_not_there", "train")
