"""What kernels read and write in Triton's interpreter, checked against the tensors that they were given.

On a GPU an access beside a tensor mostly goes unseen: the memory next to it belongs to the same allocator. The
interpreter runs on addresses of the CPU's memory, so every single one can be looked up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor


class Bounds:
    """From `install` on, an access outside of the arguments of the kernel that makes it is an AssertionError."""

    def __init__(self) -> None:
        self.checked = 0  # accesses looked up so far
        self._kernel = ""
        self._first, self._end = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        arguments = GridExecutor._init_args_hst
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def copied(executor: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
            found = arguments(executor, args, kwargs)
            self._enter(executor.fn.__name__, [*found[0], *found[1].values()])
            return found

        def checked_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._look_up("load", ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def checked_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._look_up("store", ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(GridExecutor, "_init_args_hst", copied)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)

    def _enter(self, kernel: str, arguments: list[Any]) -> None:
        self._kernel = kernel
        spans = sorted(_span(t) for t in arguments if isinstance(t, Tensor) and t.numel())
        self._first = np.array([first for first, _ in spans], np.uint64)
        self._end = np.array([end for _, end in spans], np.uint64)

    def _look_up(self, access: str, ptrs: Any, mask: Any) -> None:
        addresses = np.asarray(ptrs.data, np.uint64)[np.asarray(mask.data, bool)]
        self.checked += addresses.size
        size = np.uint64(max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
        # tensors may overlap, as a view and its base do: most addresses lie in the last span that begins before them
        span = np.searchsorted(self._first, addresses, side="right") - 1
        doubtful = addresses[(span < 0) | (addresses + size > self._end[np.maximum(span, 0)])][:, None]
        inside = (doubtful >= self._first) & (doubtful + size <= self._end)
        outside = doubtful[~inside.any(1)]
        assert not outside.size, f"{self._kernel}: {access} of {outside.size} elements outside of its tensors"


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and behind its last."""
    elements = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + elements * t.element_size()
