"""Batches made on a GPU: those of the CPU, from images kept on either side."""

import numpy as np
import pytest
import torch

from vmamba.data import Augmentation, Preprocessing, memory, open_source, training_batches
from vmamba.data.batch_augmentation import BatchAugmentation
from vmamba.data.memory import evaluation_batches_in_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RECIPE = Augmentation(rand_augment="rand-m9-mstd0.5-inc1", random_erase=0.25)
PREPROCESSING = Preprocessing((160, 160))


@pytest.fixture(scope="module")
def photos():
    """Soft gradients with a little noise: (64, 3, 180, 200) uint8."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:180, :200] / 200
    waves = generator.uniform(1, 6, (64, 3, 2, 1, 1))
    images = 127 + 100 * np.sin(waves[:, :, 0] * x + waves[:, :, 1] * y)
    return torch.from_numpy((images + generator.normal(0, 4, images.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("options", "share"),
    [
        (Augmentation(color_jitter=0.0), 0.0),
        (Augmentation(color_jitter=0.0, crop="padded"), 0.0),
        (Augmentation(color_jitter=0.4), 0.0),
        # a grey value more or less moves what equalises, solarises or posterises; whole steps in few pixels
        (RECIPE, 0.05),
    ],
)
def test_batches_are_those_of_the_cpu(photos, options, share):
    indices, heights, widths = np.arange(64), np.full(64, 180), np.full(64, 200)
    out = []
    for device in ("cpu", "cuda"):
        augment = BatchAugmentation(PREPROCESSING, options, seed=0, device=torch.device(device))
        draws = augment.draw(0, indices, heights, widths)
        out.append(augment.apply(photos.to(device), draws))
    assert out[1].is_contiguous(memory_format=torch.channels_last)
    difference = (out[0] - out[1].cpu()).abs() * 255 * 0.225
    assert (difference > 2.5).float().mean() <= share


def test_a_gpu_repeats_itself_bit_for_bit_wherever_the_images_are(make_photos, monkeypatch):
    root = make_photos("photos", {"train/cat": 20, "train/dog": 20, "val/cat": 1, "val/dog": 1})
    samples = open_source(str(root), val_fraction=0.1, split_seed=0).train
    epochs = []
    for share in (0.4, 0.4, 0.0):
        monkeypatch.setattr(memory, "DEVICE_SHARE", share)
        batches = training_batches(
            samples, Preprocessing((32, 32)), RECIPE, batch_size=8, seed=0, in_memory=True, device="cuda"
        )
        assert batches._pixels.is_cuda == (share > 0)
        batches.set_epoch(1)
        epochs.append(list(batches))
    for one, two, three in zip(*epochs, strict=True):
        assert one[0].is_cuda
        assert one[1].is_cuda
        for other in (two, three):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])


def test_evaluation_is_that_of_the_cpu(make_photos):
    root = make_photos("photos", {"cat": 5, "dog": 5})
    samples = open_source(str(root), val_fraction=0.5, split_seed=0).train
    on_cpu, on_gpu = (
        list(evaluation_batches_in_memory(samples, Preprocessing((32, 32)), batch_size=3, device=device))
        for device in ("cpu", "cuda")
    )
    for (images, labels), (their_images, their_labels) in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(images, their_images.cpu(), rtol=1e-6, atol=1e-6)
        assert torch.equal(labels, their_labels.cpu())


@pytest.mark.parametrize("options", [RECIPE, Augmentation(color_jitter=0.4)])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_gpu(photos, options):
    augment = BatchAugmentation(PREPROCESSING, options, seed=0, device=torch.device("cuda"))
    images, sizes = photos.cuda(), np.full(64, 180)
    augment.apply(images, augment.draw(0, np.arange(64), sizes, sizes))
    try:
        torch.cuda.set_sync_debug_mode("error")
        for epoch in range(3):
            augment.apply(images, augment.draw(epoch, np.arange(64), sizes, sizes))
    finally:
        torch.cuda.set_sync_debug_mode("default")
