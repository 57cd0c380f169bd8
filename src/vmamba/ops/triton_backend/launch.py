"""Launching a kernel again at little cost for the host, and compiling many side by side.

Triton finds the compiled kernel of a call by binding the arguments, describing each, and printing the description: 30
to 50 us for kernels of 20 to 30 arguments. A network calls a hundred kernels with the same kinds of arguments again
and again, and without CUDA graphs this is what bounds it. `Kernel` looks compiled kernels up by what Triton specialises
on, read off the arguments directly, and hands every call that it has not seen to Triton.

Compiling takes 0.1 to 2 s of CPU a kernel, nearly all of it in passes that let other threads run. `compile_ahead`
compiles the kernels of a whole step in threads that end with it; what is compiled is what a launch would compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["Kernel", "compile_ahead", "kernel"]

_INT32 = 1 << 31

# what Triton compiles anew for
_VALUE, _DIVISIBILITY, _NOTHING = range(3)

# of the kernel that was launched last, for whoever wants to know what a GPU is stuck in: one item, 10 ns a launch
last_launched: list[Kernel | None] = [None]

# inside `compile_ahead`, in its thread: what is launched there, (kernel, key) -> (its device, what Triton makes of it)
_met: ContextVar[dict[tuple, tuple[torch.device, Any]] | None] = ContextVar("met", default=None)


class Kernel:
    """A jitted kernel: `kernel[grid](*runtime_arguments, **constants_and_options)`, as of `triton.JITFunction`.

    Tensors and numbers that are not constants are given by position, a tensor first, and every constant is given. The
    kernel runs on that tensor's device, which need not be the current one.
    """

    def __init__(self, jit: Any):
        self.jit = jit
        self._names = [parameter.name for parameter in jit.params]
        self._kinds = [
            _VALUE if p.is_constexpr else _NOTHING if p.do_not_specialize else _DIVISIBILITY for p in jit.params
        ]
        self._compiled: dict[tuple, tuple[Any, tuple]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        device = args[0].device
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(grid, *args, **named)
            return
        key = self._key(args, named)
        known = self._compiled.get(key)
        if (met := _met.get()) is not None:
            if known is None and (self, key) not in met:
                met[self, key] = device, self.jit.warmup(*args, grid=grid, **named)
            return
        last_launched[0] = self
        if known is not None:
            compiled, constants = known
            compiled[(*grid, 1, 1)[:3]](*args, *constants)
            return
        compiled = self.jit[grid](*args, **named)
        if key is not None:
            self._compiled[key] = compiled, tuple(named[name] for name in self._names[len(args) :])

    def _key(self, args: tuple, named: dict[str, Any]) -> tuple | None:
        """What decides which compiled kernel serves a call; None for what is left to Triton: unaligned tensors, as
        some views are, and numbers beyond 32 bits.
        """
        key: list[Any] = [args[0].get_device()]
        addresses = 0
        for arg, kind in zip(args, self._kinds, strict=False):
            if isinstance(arg, Tensor):
                addresses |= arg.data_ptr()
                key.append(arg.dtype)
            elif kind == _VALUE:
                key.append(arg)
            elif type(arg) is int:
                if not -_INT32 <= arg < _INT32:
                    return None
                key.append(0 if kind == _NOTHING else 1 if arg == 1 else 16 if arg % 16 == 0 else 0)
            else:
                key.append(type(arg))
        if addresses % 16:
            return None
        return (*key, *named, *named.values())


def kernel(function: Callable | None = None, **options: Any) -> Any:
    """`triton.jit` for a kernel that is launched, with the same options; Triton's interpreter stays as it is."""
    if function is None:
        return lambda function: kernel(function, **options)
    jit = triton.jit(**options)(function) if options else triton.jit(function)
    return Kernel(jit) if isinstance(jit, triton.JITFunction) else jit


@contextmanager
def compile_ahead() -> Iterator[None]:
    """What this thread launches inside is not run, but compiled and loaded side by side; all is ready at the end.

    Errors of a compilation are left to the launch that will meet them again.
    """
    met: dict[tuple, tuple[torch.device, Any]] = {}
    with ThreadPoolExecutor() as pool:
        token = _met.set(met)
        try:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                yield
        finally:
            _met.reset(token)
        # Triton 3.6 makes a launcher for each signature with the C compiler, 0.2 s each
        list(pool.map(_load, met.values()))


def _load(met: tuple[torch.device, Any]) -> None:
    device, compiled = met
    if isinstance(compiled, triton.FutureKernel):
        compiled = compiled.result(ignore_errors=True)
    if compiled is not None:
        with torch.cuda.device(device):
            compiled[(1, 1, 1)]  # loads, and launches nothing until it is called
