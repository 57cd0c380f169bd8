"""Loading speed: what is measured, and what is said about it."""

import time

import pytest
import torch
from torch.utils.data import DataLoader

from vmamba.data.loading import EpochOrder
from vmamba.data.speed import LoadingSpeed, measure_loading, workers_needed


class Slow:
    """Ten images, each after a hundredth of a second; the first is ten times as slow."""

    fetched = 0

    def __len__(self):
        return 10

    def __getitem__(self, key):
        Slow.fetched += 1
        time.sleep(0.1 if Slow.fetched == 1 else 0.01)
        return torch.zeros(3, 2, 2), 0


def test_rate_leaves_the_start_out_and_runs_over_epochs():
    Slow.fetched = 0
    loader = DataLoader(Slow(), batch_size=2, sampler=EpochOrder(10, 0))
    rate = measure_loading(loader, seconds=0.4, warm_up=1)
    # a busy machine sleeps longer than asked, never shorter
    assert 20 < rate < 100
    assert Slow.fetched > 10


def test_a_gpu_that_waits_for_processes():
    slow, fast = LoadingSpeed(2, "cpu", 1000.0), LoadingSpeed(8, "cpu", 4400.0)
    assert not slow.keeps_busy(4000)
    assert slow.lost(4000) == pytest.approx(0.75)
    assert fast.keeps_busy(4000)
    assert fast.lost(4000) == 0
    assert fast.keeps_busy(5000)
    assert not fast.keeps_busy(5300)
    assert workers_needed([LoadingSpeed(0, "cpu", 700.0), slow, fast], 10_000) == 19
    assert workers_needed([LoadingSpeed(None, "cuda", 700.0)], 10_000) is None


def test_a_gpu_that_makes_its_own_batches():
    made = LoadingSpeed(None, "cuda", 96_000.0)
    assert made.lost(4000) == pytest.approx(0.04)
    assert made.keeps_busy(16_000)
    assert not made.keeps_busy(18_000)
