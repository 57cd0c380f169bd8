"""Data sets in memory: what a loader would give, exactly repeatable, within the memory there is."""

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.data import Augmentation, Preprocessing, evaluation_loader, evaluation_transform, memory, open_source
from vmamba.data.loading import EpochOrder
from vmamba.data.memory import check_room, decode, evaluation_batches_in_memory, training_batches_in_memory

PREPROCESSING = Preprocessing((32, 32))
RECIPE = Augmentation(rand_augment="rand-m9-mstd0.5-inc1", random_erase=0.25)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test here."""


@pytest.fixture
def samples(make_photos):
    """22 photos, of two sizes."""
    root = make_photos("photos", {"train/cat": 12, "val/cat": 1, "val/dog": 1})
    make_photos("photos", {"train/dog": 10}, size=(50, 20))
    return open_source(str(root), val_fraction=0.1, split_seed=0).train


def training(samples, **options):
    options = {"batch_size": 4, "seed": 0, "device": "cpu", **options}
    return training_batches_in_memory(samples, PREPROCESSING, RECIPE, **options)


def epoch_of(batches, epoch):
    batches.set_epoch(epoch)
    return list(batches)


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, two in zip(left, right, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_images_are_decoded_whole(samples):
    images = decode(samples)
    assert images.pixels.shape == (22, 3, 36, 50)
    assert (images.classes, images.labels.tolist()) == (("cat", "dog"), list(samples.labels))
    for i in (0, 21):
        image = np.asarray(samples[i][0])
        height, width = images.heights[i], images.widths[i]
        assert image.shape == (height, width, 3)
        assert np.array_equal(images.pixels[i, :, :height, :width].permute(1, 2, 0).numpy(), image)


def test_large_images_are_reduced(samples):
    images = decode(samples, longest=30)
    assert images.pixels.shape == (22, 3, 27, 30)
    assert (images.heights[21], images.widths[21]) == (12, 30)
    wanted = samples[21][0].resize((30, 12), Image.Resampling.BICUBIC)
    assert np.array_equal(images.pixels[21, :, :12].permute(1, 2, 0).numpy(), np.asarray(wanted))


def test_an_epoch_holds_every_image_once(samples):
    batches = training(samples, batch_size=2)
    assert len(batches) == 11
    labels = torch.cat([labels for _, labels in batches])
    assert torch.bincount(labels).tolist() == [12, 10]


@pytest.mark.parametrize(("batch_size", "count"), [(8, 2), (22, 1), (32, 1)])
def test_ragged_batch_is_dropped_unless_it_is_the_only_one(samples, batch_size, count):
    batches = training(samples, batch_size=batch_size)
    assert len(batches) == len(list(batches)) == count


def test_an_epoch_is_the_same_in_every_process(samples):
    first = epoch_of(training(samples), 2)
    torch.manual_seed(7)
    assert same(first, epoch_of(training(samples), 2))
    assert not same(first, epoch_of(training(samples), 1))
    assert not same(first, epoch_of(training(samples, seed=1), 2))


def test_batches_made_together_are_those_made_alone(samples, monkeypatch):
    alone = epoch_of(training(samples), 1)
    monkeypatch.setattr(memory, "made_together", lambda device, values: 2)
    together = epoch_of(training(samples), 1)
    assert len(alone) == len(together) == 5
    for (images, labels), (wanted_images, wanted_labels) in zip(together, alone, strict=True):
        torch.testing.assert_close(images, wanted_images, rtol=0, atol=1e-5)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels, wanted_labels)


def test_a_gpu_makes_small_batches_together():
    cuda = torch.device("cuda")
    assert memory.made_together(torch.device("cpu"), 1) == 1
    assert memory.made_together(cuda, 128 * 3 * 160 * 160) == 8
    assert memory.made_together(cuda, 256 * 3 * 32 * 32) == 16
    assert memory.made_together(cuda, 10**9) == 1


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_goes_on_where_it_stopped(samples, stop, together, monkeypatch):
    monkeypatch.setattr(memory, "made_together", lambda device, values: together)
    whole = training(samples)
    wanted = [epoch_of(whole, epoch) for epoch in range(3)]
    stopped = training(samples)
    stopped.set_epoch(1)
    begun = iter(stopped)
    head = [next(begun) for _ in range(stop)]
    assert same(head, wanted[1][:stop])
    state = stopped.state_dict()
    assert state == {"epoch": 1, "batches": stop}
    resumed = training(samples)
    resumed.load_state_dict(state)
    assert same(epoch_of(resumed, 1), wanted[1][stop:])
    assert same(epoch_of(resumed, 2), wanted[2])


def test_two_processes_share_what_one_has(samples):
    (images, labels), *_ = epoch_of(training(samples, batch_size=10), 1)
    for rank in range(2):
        share = training(samples, batch_size=5, rank=rank, world=2)
        assert len(share) == 2
        (some, their_labels), _ = epoch_of(share, 1)
        assert torch.equal(their_labels, labels[rank::2])
        torch.testing.assert_close(some, images[rank::2], rtol=0, atol=1e-5)
    whole = list(evaluation_batches_in_memory(samples, PREPROCESSING, batch_size=22, device="cpu"))
    second = list(evaluation_batches_in_memory(samples, PREPROCESSING, batch_size=22, device="cpu", rank=1, world=2))
    assert torch.equal(second[0][0], whole[0][0][1::2])


def test_evaluation_equals_the_loaders(samples):
    preprocessing = Preprocessing((24, 32), crop_pct=0.9)
    loader = evaluation_loader(samples, evaluation_transform(preprocessing), batch_size=8, workers=0)
    ours = evaluation_batches_in_memory(samples, preprocessing, batch_size=8, device="cpu")
    assert len(ours) == len(loader) == 3
    for (images, labels), (wanted_images, wanted_labels) in zip(ours, loader, strict=True):
        assert torch.equal(images, wanted_images)
        assert torch.equal(labels, wanted_labels)


def test_too_large_for_the_memory(samples, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 100_000)
    with pytest.raises(ValueError, match=r"22 decoded images of up to 36 x 50 px need 0\.1 MB.*data\.memory_size"):
        decode(samples)
    assert len(decode(samples, longest=20)) == 22
    check_room([samples, samples], Preprocessing((20, 20)), longest=20)
    with pytest.raises(ValueError, match="need 0.1 MB"):
        check_room([samples, samples], Preprocessing((20, 20)), longest=20, processes=3)
    with pytest.raises(ValueError, match="44 decoded images of up to 18 x 20 px"):
        check_room([samples, samples], PREPROCESSING, longest=20)


def test_free_memory_is_within_a_containers_limit(tmp_path, monkeypatch):
    system = memory.free_memory()
    assert 10**7 < system < 10**14
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert memory.free_memory() == 4_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory() > 4_000_000


def test_a_damaged_image_is_named(make_photos):
    root = make_photos("photos", {"train/cat": 3, "train/dog": 3, "val/cat": 1, "val/dog": 1})
    whole = (root / "train/dog/1.png").read_bytes()
    (root / "train/dog/1.png").write_bytes(whole[: len(whole) // 2])
    samples = open_source(str(root), val_fraction=0.1, split_seed=0).train
    with pytest.raises(ValueError, match=r"cannot read the image .*train/dog/1\.png"):
        decode(samples)


def test_digits_from_memory_are_in_their_classes():
    samples = open_source("digits", val_fraction=0.1, split_seed=0).val
    batches = training_batches_in_memory(
        samples, PREPROCESSING, Augmentation(crop="padded"), batch_size=64, seed=0, device="cpu"
    )
    images, labels = next(iter(batches))
    assert images.shape == (64, 3, 32, 32)
    order = [index for _, index in EpochOrder(len(samples), 0)][:64]
    assert labels.tolist() == [samples.labels[i] for i in order]
