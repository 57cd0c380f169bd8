"""Arrays of different shapes in one block of memory."""

import pickle

import numpy as np
import pytest
import torch

from vmamba.data import decoded
from vmamba.data.decoded import DecodedImages


def test_items_are_what_was_decoded():
    arrays = [np.full((3, i + 1, 2), i, dtype=np.uint8) for i in range(5)]
    images = DecodedImages([a.shape for a in arrays], lambda i: arrays[i])
    assert len(images) == 5
    for i, array in enumerate(arrays):
        assert torch.equal(images[i], torch.from_numpy(array))
    assert images[1].untyped_storage().data_ptr() == images[4].untyped_storage().data_ptr()
    assert torch.equal(pickle.loads(pickle.dumps(images))[3], images[3])


def test_another_shape_than_the_header_says_is_refused():
    with pytest.raises(ValueError, match=r"image 1 is \(3, 2, 2\), and its header says \(3, 4, 4\)"):
        DecodedImages([(3, 2, 2), (3, 4, 4)], lambda i: np.zeros((3, 2, 2), np.uint8))


def test_too_much_is_refused_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(decoded, "free_memory", lambda: 1_000_000_000)
    with pytest.raises(ValueError, match=r"2 decoded images need 1\.2 GB.*1\.0 GB.*data.in_memory=false"):
        DecodedImages([(3, 20_000, 20_000), (3, 1, 1)], lambda i: pytest.fail("decoded"))
