from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from vmamba.ops import ss2d
from vmamba.ops.dispatch import BACKENDS

from .test_functional import ss2d_arguments


def test_on_the_cpu_it_is_a_clear_error():
    with pytest.raises(RuntimeError, match=r"'triton' cannot run on cpu: .*CUDA.*Available there: .*portable"):
        ss2d(*ss2d_arguments(dtype=torch.float32), backend="triton")


def test_importing_the_package_imports_no_kernels():
    """torch may import triton itself; ours must not."""
    code = (
        "import sys, vmamba.ops; vmamba.ops.backends('cpu'); sys.exit('vmamba.ops.triton_backend.ss2d' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_states_are_kept_where_there_are_few():
    x = torch.empty(2, 7, 5, 6)
    states = BACKENDS["triton"].ss2d_states
    assert states(x, torch.empty(24, 1), "cross2d") == (2, 4, 3, 1, 6)
    assert states(x, torch.empty(24, 16), "cross2d") == (0,)
    assert states(x.double(), torch.empty(24, 1), "cross2d") == (0,)


def test_states_of_the_1d_scan_are_kept_where_there_is_more_than_one_tile():
    u, A, B = torch.empty(2, 6, 129), torch.empty(6, 3), torch.empty(2, 1, 3, 129)
    states = BACKENDS["triton"].scan_states
    assert states(u, A, B) == (2, 6, 2, 3)
    assert states(u[..., :128], A, B[..., :128]) == (0,)
    assert states(u.double(), A, B) == (0,)


def interpreter_unusable() -> str | None:
    """Why Triton's interpreter cannot run the kernels here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton <= (3, 6) and numpy >= (2, 4):
        return "the interpreter of Triton 3.6 fails on loops with numpy 2.4: it makes an int of an array of one number"
    return None


# the longest first
KERNELS = ["ss2d", "ss2d_states", "dwconv", "scan1d", "ss2d_few", "dense", "stem", "bounds"]
# these have tests that only a GPU can run
SOME_SKIPPED = {"ss2d", "ss2d_states", "scan1d", "stem"}


def interpret(kernels: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).with_name(f"test_triton_{kernels}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    # the interpreter runs one program after another; more threads only wait for each other
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def interpreted(request):
    """The tests of the kernels that were asked for, one process a processor, all started together."""
    chosen = {item.name for item in request.session.items}
    wanted = [kernels for kernels in KERNELS if f"test_the_kernels_through_tritons_interpreter[{kernels}]" in chosen]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {kernels: pool.submit(interpret, kernels) for kernels in wanted}


@pytest.mark.skipif(interpreter_unusable() is not None, reason=str(interpreter_unusable()))
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_kernels_through_tritons_interpreter(kernels, interpreted):
    """In a process of its own: Triton asks whether to interpret when it is imported."""
    process = interpreted[kernels].result()
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-1000:]
    # where the interpreter is not taken, all are skipped
    assert " passed" in process.stdout
    assert kernels in SOME_SKIPPED or "skipped" not in process.stdout
