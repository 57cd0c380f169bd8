import pytest

from vmamba import VMamba
from vmamba.ops.dispatch import BACKENDS


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test here."""


@pytest.fixture
def tiny():
    """A VMamba of a few thousand parameters."""
    return VMamba(dims=8, depths=(1, 1, 1, 1), num_classes=3)


@pytest.fixture
def wrong_backend(monkeypatch):
    """The portable backend with an output that is off by a thousandth."""
    portable = BACKENDS["portable"]

    def ss2d_forward(*arguments):
        y, states = portable.ss2d_forward(*arguments)
        return 1.001 * y, states

    monkeypatch.setitem(BACKENDS, "portable", portable._replace(ss2d_forward=ss2d_forward))
