"""The launcher: Triton is asked once for each kind of call, and what it compiled is called with every argument."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch

triton = pytest.importorskip("triton", reason="the launcher is for Triton's kernels, and triton is not installed")

from triton.runtime._async_compile import active_mode  # noqa: E402

from vmamba.ops import triton_backend  # noqa: E402
from vmamba.ops.triton_backend import launch  # noqa: E402
from vmamba.ops.triton_backend.launch import Kernel, compile_ahead  # noqa: E402


class Parameter:
    def __init__(self, name, is_constexpr=False, do_not_specialize=False):
        self.name, self.is_constexpr, self.do_not_specialize = name, is_constexpr, do_not_specialize


class Jit:
    """Stands for a jitted kernel: notes what it is asked to compile and what its kernels are called with."""

    params = (
        Parameter("x"),
        Parameter("y"),
        Parameter("n"),
        Parameter("m", do_not_specialize=True),
        Parameter("eps"),
        Parameter("C", is_constexpr=True),
        Parameter("FLAG", is_constexpr=True),
    )

    def __init__(self):
        self.compilations, self.launches, self.loads = [], [], []
        self.warmups = []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **named):
            self.compilations.append((grid, args, named))
            return Compiled(self)

        return compile_and_launch

    def warmup(self, *args, grid, **named):
        """What Triton does where it compiles side by side: the work is handed to its pool."""
        self.warmups.append(args)
        mode = active_mode.get()
        return mode.submit(str(self.warmups), partial(self.compile, named["C"]), lambda compiled: None)

    def compile(self, C):
        if C == 0:
            raise RuntimeError("does not compile")
        return Compiled(self)


class Compiled:
    def __init__(self, jit):
        self.jit = jit

    def __getitem__(self, grid):
        self.jit.loads.append(grid)
        return lambda *args: self.jit.launches.append((grid, args))


@pytest.fixture
def jit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of the CPU
    return Jit()


def aligned(*shape, dtype=torch.float32):
    tensor = torch.zeros(*shape, dtype=dtype)
    assert tensor.data_ptr() % 16 == 0
    return tensor


def test_the_second_call_of_a_kind_goes_past_triton(jit):
    kernel = Kernel(jit)
    x, y = aligned(8), aligned(4)
    kernel[(3,)](x, y, 32, 7, 1e-5, C=16, FLAG=True, num_warps=2)
    kernel[(5, 2)](y, x, 48, 9, 1e-6, C=16, FLAG=True, num_warps=2)
    assert len(jit.compilations) == 1
    assert jit.launches == [((5, 2, 1), (y, x, 48, 9, 1e-6, 16, True))]


def test_what_is_only_compiled_ahead_was_not_launched_last(jit, monkeypatch):
    monkeypatch.setattr(launch, "last_launched", [None])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    kernel, arguments = Kernel(jit), (aligned(8), aligned(4), 32, 7, 1e-5)
    with compile_ahead():
        kernel[(3,)](*arguments, C=16, FLAG=True)
    assert launch.last_launched == [None]
    kernel[(3,)](*arguments, C=16, FLAG=True)
    assert launch.last_launched == [kernel]


@pytest.mark.parametrize(
    "other",
    [
        {"x": aligned(8, dtype=torch.bfloat16)},
        {"n": 1},
        {"n": 33},
        {"C": 32},
        {"FLAG": False},
        {"num_warps": 4},
    ],
)
def test_what_triton_specialises_on_is_compiled_anew(jit, other):
    kernel = Kernel(jit)
    usual = {"x": aligned(8), "y": aligned(4), "n": 32, "m": 7, "eps": 1e-5, "C": 16, "FLAG": True, "num_warps": 2}
    for call in (usual, usual | other):
        named = {name: call[name] for name in ("C", "FLAG", "num_warps")}
        kernel[(1,)](*(call[name] for name in ("x", "y", "n", "m", "eps")), **named)
    assert len(jit.compilations) == 2
    assert not jit.launches


@pytest.mark.parametrize("unusual", [{"x": torch.zeros(9)[1:]}, {"m": 1 << 31}])
def test_unusual_arguments_are_left_to_triton_every_time(jit, unusual):
    kernel = Kernel(jit)
    usual = {"x": aligned(8), "y": aligned(4), "n": 32, "m": 7, "eps": 1e-5}
    for _ in range(3):
        kernel[(1,)](*(usual | unusual).values(), C=16, FLAG=True)
    assert len(jit.compilations) == 3
    assert not jit.launches


def test_ahead_each_kind_of_call_is_compiled_and_loaded_once_and_none_runs(jit, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    kernel = Kernel(jit)
    x, y = aligned(8), aligned(4)

    def launch(C):
        kernel[(3,)](x, y, 32, 7, 1e-5, C=C, FLAG=True)

    launch(16)
    with compile_ahead():
        for C in (16, 32, 32, 64, 0):
            launch(C)
    # the first was known; the last does not compile, which its launch will say
    assert len(jit.warmups) == 3
    assert jit.loads == [(1, 1, 1)] * 2
    assert not jit.launches
    launch(16)
    launch(32)
    assert len(jit.compilations) == 2
    assert len(jit.launches) == 1


def test_an_error_ahead_leaves_launches_as_they_are(jit, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    kernel = Kernel(jit)
    with pytest.raises(KeyError), compile_ahead():
        raise KeyError
    assert active_mode.get() is None
    kernel[(3,)](aligned(8), aligned(4), 32, 7, 1e-5, C=16, FLAG=True)
    assert len(jit.compilations) == 1


def kernels() -> dict[str, Kernel]:
    found = {}
    for module in pkgutil.iter_modules(triton_backend.__path__):
        for value in vars(importlib.import_module(f"{triton_backend.__name__}.{module.name}")).values():
            if isinstance(value, Kernel):
                found[value.jit.__name__] = value
    return found


@pytest.mark.parametrize("name", kernels())
def test_every_kernel_can_be_launched_this_way(name):
    """Constants come last, and none has a default: what is known of a call is then all of its arguments."""
    parameters = kernels()[name].jit.params
    constants = [p.is_constexpr for p in parameters]
    assert constants == sorted(constants)
    signature = inspect.signature(kernels()[name].jit.fn)
    assert all(p.default is inspect.Parameter.empty for p in signature.parameters.values())
