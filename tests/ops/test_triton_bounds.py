"""That the interpreter's tests see an access beside a tensor: with TRITON_INTERPRET=1 (see test_triton_backend.py)."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU nothing sees it"),
]


@triton.jit
def copy_kernel(x, y, shift, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o + shift, mask=o < n, other=0.0), mask=o < n)


def test_what_lies_inside_passes(bounds):
    x, y = torch.arange(16.0), torch.empty(10)
    copy_kernel[(1,)](x, y, 6, 10, BLOCK=16)
    assert torch.equal(y, x[6:])
    assert bounds.checked == 20


@pytest.mark.parametrize(("shift", "n", "found"), [(7, 10, "load of 1"), (-1, 10, "load of 1"), (0, 12, "store of 2")])
def test_what_lies_outside_is_found(shift, n, found):
    memory = torch.arange(32.0)
    x, y = memory[8:24], torch.empty(16)[:10]
    with pytest.raises(Exception, match=f"copy_kernel: {found} elements outside of its tensors"):
        copy_kernel[(1,)](x, y, shift, n, BLOCK=16)
