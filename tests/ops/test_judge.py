"""The judge: it passes every backend there is, and fails one that is wrong, blind or broken."""

from __future__ import annotations

import pytest

from vmamba.ops import convolution
from vmamba.ops.dispatch import BACKENDS
from vmamba.ops.judge import TOLERANCE, judge


def scaled(backend, forward=1.0, backward=1.0):
    """The backend with its output and its first gradient multiplied."""

    def ss2d_forward(*arguments):
        y, states = backend.ss2d_forward(*arguments)
        return y * forward, states

    def ss2d_backward(*arguments):
        gx, *others = backend.ss2d_backward(*arguments)
        return gx * backward, *others

    return backend._replace(ss2d_forward=ss2d_forward, ss2d_backward=ss2d_backward)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_portable_backend_is_right(dtype):
    verdict = judge("portable", dtype=dtype)
    assert verdict.right, str(verdict)
    assert 0 < verdict.error <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("changes", "where"),
    [({"forward": 1.001}, "y"), ({"backward": 0.999}, "gradient of x"), ({"forward": float("nan")}, "y")],
    ids=["output", "gradient", "nan"],
)
def test_a_wrong_backend_is_found(monkeypatch, changes, where):
    monkeypatch.setitem(BACKENDS, "off", scaled(BACKENDS["portable"], **changes))
    verdict = judge("off")
    assert not verdict.right
    assert verdict.where.startswith(where + " of the scan")
    assert "WRONG" in str(verdict)


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_a_convolution_of_its_own_is_judged_too(monkeypatch, factor):
    def conv_forward(*arguments):
        return factor * convolution.conv(*arguments)

    monkeypatch.setitem(BACKENDS, "own", BACKENDS["portable"]._replace(conv_forward=conv_forward))
    verdict = judge("own")
    assert verdict.right == (factor == 1)
    assert verdict.right or verdict.where == "y of the convolution"


def test_a_backend_that_raises_is_a_verdict(monkeypatch):
    def ss2d_forward(*arguments):
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(BACKENDS, "broken", BACKENDS["portable"]._replace(ss2d_forward=ss2d_forward))
    verdict = judge("broken")
    assert not verdict.right
    assert "no such instruction" in str(verdict)
