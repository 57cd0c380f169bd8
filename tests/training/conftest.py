"""A run small enough to repeat: three classes of eight tiny photos, a VMamba of a few thousand parameters."""

import pytest

from vmamba.training import resolve


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test here."""


@pytest.fixture
def photos(make_photos):
    return make_photos("photos", {f"{part}/{name}": 4 for part in ("train", "val") for name in ("cat", "dog", "emu")})


@pytest.fixture
def tiny_config(photos):
    """A function: keyword arguments are config sections laid over the tiny run's."""

    def make(**sections):
        return resolve(
            {
                "model": {"name": "vmamba_nano", "kwargs": {"dims": 8, "depths": [1, 1, 1, 1]}},
                "data": {"source": str(photos), "image_size": 32, "batch_size": 4, "workers": 0},
                "schedule": {"epochs": 2, "warmup_epochs": 1},
                "run": {"device": "cpu"},
            },
            sections,
        )

    return make
