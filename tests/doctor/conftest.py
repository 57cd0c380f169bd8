import pytest

from vmamba.doctor import session


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test here."""


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """A child that is a new interpreter finds none, so that what is on the CPU is not told to move."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def forks():
    """For what a test changes in this process and its child must inherit."""
    if not session._can_fork():
        pytest.skip("the child must be forked, which this machine's GPU or system forbids")
