"""Shares of processes and resumed epochs: together they are the epoch that one process sees."""

import pytest
import torch

from vmamba.data import Augmentation, Preprocessing, evaluation_loader, open_source, training_loader, training_transform
from vmamba.data.loading import EpochOrder

TRANSFORM = training_transform(Preprocessing((32, 32)), Augmentation())


@pytest.fixture(scope="module")
def samples():
    return open_source("digits", val_fraction=0.1, split_seed=0).val.subset(list(range(23)))


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_a_step_has_the_same_images_however_it_is_shared(samples, world, accumulate):
    whole = training_loader(samples, TRANSFORM, batch_size=8, workers=0, seed=3)
    parts = [
        training_loader(
            samples,
            TRANSFORM,
            batch_size=8 // world // accumulate,
            workers=0,
            seed=3,
            rank=rank,
            world=world,
            accumulate=accumulate,
        )
        for rank in range(world)
    ]
    assert [len(part) for part in parts] == [2 * accumulate] * world
    shared = [torch.cat([images for images, _ in part]) for part in parts]
    for step, (images, _) in enumerate(whole):
        size = 8 // world
        theirs = torch.cat([share[step * size : (step + 1) * size] for share in shared])
        assert sorted(map(hash_of, images)) == sorted(map(hash_of, theirs))


def hash_of(image):
    return image.numpy().tobytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_it_was(samples, workers):
    def loader():
        return training_loader(samples, TRANSFORM, batch_size=4, workers=workers, seed=0)

    first = loader()
    first.sampler.set_epoch(2)
    batches = list(first)
    assert first.state_dict() == {"epoch": 2, "batches": 5}
    iterator = iter(first)
    next(iterator)
    next(iterator)
    second = loader()
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(2)  # as the engine does once more
    rest = list(second)
    assert len(second) == 5
    assert len(rest) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches[2:], rest, strict=True))
    assert second.state_dict() == first.state_dict() | {"batches": 5}
    second.sampler.set_epoch(3)
    assert len(list(second)) == 5


def test_a_finished_epoch_is_followed_by_a_whole_one():
    order = EpochOrder(6, 0)
    order.set_epoch(1)
    order.skip = 6
    assert list(order) == []
    order.set_epoch(2)
    assert len(list(order)) == 6


def test_evaluation_is_shared_without_doubles(samples):
    labels = [
        torch.cat(
            [batch for _, batch in evaluation_loader(samples, TRANSFORM, batch_size=4, workers=0, rank=r, world=3)]
        )
        for r in range(3)
    ]
    assert [len(part) for part in labels] == [8, 8, 7]
    assert torch.stack([labels[0][:7], labels[1][:7], labels[2]], dim=1).flatten().tolist() == list(samples.labels)[:21]
