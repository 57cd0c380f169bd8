"""Loading: order and augmentation are a pure function of seed and epoch."""

import random

import numpy as np
import pytest
import torch

from vmamba.data import Augmentation, Preprocessing, evaluation_loader, open_source, training_loader, training_transform
from vmamba.data.loading import EpochOrder, derive_seed

PREPROCESSING = Preprocessing((32, 32))
TRANSFORM = training_transform(PREPROCESSING, Augmentation(rand_augment="rand-m9-mstd0.5-inc1", random_erase=0.5))


@pytest.fixture(scope="module")
def samples():
    return open_source("digits", val_fraction=0.1, split_seed=0).val.subset(list(range(20)))


def one_epoch(samples, epoch, *, seed=0, workers=0):
    loader = training_loader(samples, TRANSFORM, batch_size=8, workers=workers, seed=seed)
    loader.sampler.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_an_epoch_is_a_function_of_seed_and_epoch(samples):
    first = one_epoch(samples, 3)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    again = one_epoch(samples, 3)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], one_epoch(samples, 4)[0])
    assert not torch.equal(first[0], one_epoch(samples, 3, seed=1)[0])


def test_workers_change_nothing(samples):
    assert torch.equal(one_epoch(samples, 1)[0], one_epoch(samples, 1, workers=2)[0])


def test_loading_leaves_the_global_generators_alone(samples):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    wanted = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    loader = training_loader(samples, TRANSFORM, batch_size=8, workers=0, seed=0)
    loader.dataset[0, 3]
    assert (random.random(), np.random.rand(), torch.rand(1)) == wanted  # noqa: NPY002


def test_every_epoch_is_a_permutation():
    order = EpochOrder(11, seed=0)
    seen = []
    for epoch in range(3):
        order.set_epoch(epoch)
        pairs = list(order)
        assert {e for e, _ in pairs} == {epoch}
        assert sorted(i for _, i in pairs) == list(range(11))
        seen.append([i for _, i in pairs])
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize(("batch_size", "batches"), [(8, 2), (20, 1), (32, 1)])
def test_ragged_batch_is_dropped_unless_it_is_the_only_one(samples, batch_size, batches):
    assert len(training_loader(samples, TRANSFORM, batch_size=batch_size, workers=0, seed=0)) == batches


def test_evaluation_takes_everything_in_order(samples):
    loader = evaluation_loader(samples, TRANSFORM, batch_size=8, workers=0)
    assert torch.cat([labels for _, labels in loader]).tolist() == list(samples.labels)


def test_derived_seeds_differ():
    seeds = {derive_seed(seed, stream, step) for seed in range(3) for stream in range(3) for step in range(50)}
    assert len(seeds) == 450
    assert all(0 <= seed < 2**63 for seed in seeds)
