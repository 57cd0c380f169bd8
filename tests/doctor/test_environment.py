"""Every verdict on an environment, on machines that are pretended, and the probes as they really run."""

import re
import time
from dataclasses import replace

import pytest
import torch

from vmamba.doctor import Level, environment
from vmamba.doctor.child import Finished, run_with_limit
from vmamba.doctor.environment import (
    Facts,
    Gpu,
    examine_environment,
    gather,
    judge_backend,
    judge_facts,
    judge_speed,
    numbers,
    self_test,
    speed_verdicts,
)
from vmamba.doctor.speed import Speed, slope
from vmamba.ops.dispatch import BACKENDS, BackendStatus

H100 = Gpu("NVIDIA H100", (9, 0), 80 * 2**30, 70 * 2**30)
ON_CPU = {
    "triton": BackendStatus(False, False, "its kernels run on CUDA devices, not on cpu"),
    "portable": BackendStatus(True, True, ""),
}
ON_CUDA = {"triton": BackendStatus(True, True, ""), "portable": BackendStatus(True, False, "")}
WITHOUT_TRITON = {
    "triton": BackendStatus(False, False, "the package triton is not installed"),
    "portable": BackendStatus(True, True, ""),
}
GPU_MACHINE = Facts(
    python=(3, 12, 1),
    system="Linux x86_64",
    torch="2.11.0+cu130",
    torch_cuda="13.0",
    hip=None,
    cuda_error="",
    driver="580.65",
    driver_cuda=(13, 0),
    seen_gpus=("NVIDIA H100",),
    gpus=(H100,),
    architectures=("sm_80", "sm_90", "compute_120"),
    triton="3.6.0",
    triton_wanted="3.6.0",
    memory=64 * 2**30,
    free_memory=50 * 2**30,
    cores=8,
    threads=8,
    packages={name: "1.0" for names in environment.EXTRAS.values() for name in names},
    variables={},
    backends={"cpu": ON_CPU, "cuda": ON_CUDA},
)
CPU_MACHINE = replace(
    GPU_MACHINE,
    torch="2.11.0+cpu",
    torch_cuda=None,
    driver=None,
    driver_cuda=None,
    seen_gpus=(),
    gpus=(),
    architectures=(),
    triton=None,
    triton_wanted=None,
    backends={"cpu": ON_CPU},
)
NO_CUDA = {"gpus": (), "architectures": (), "backends": {"cpu": ON_CPU}}


@pytest.mark.parametrize("facts", [GPU_MACHINE, CPU_MACHINE], ids=["gpu", "cpu"])
def test_a_machine_in_order(facts):
    assert {verdict.level for verdict in judge_facts(facts)} == {Level.OK}


def test_a_machine_in_order_is_told_line_by_line():
    told = {verdict.name: verdict.message for verdict in judge_facts(GPU_MACHINE)}
    assert told["torch"] == "torch 2.11.0+cu130 (for CUDA 13.0)."
    assert told["GPU"] == "NVIDIA H100; driver 580.65, which goes up to CUDA 13.0."
    assert told["Triton"] == "Triton 3.6.0, as torch 2.11.0+cu130 wants it."
    assert told["backend"] == "On cuda runs 'triton'."
    assert told["memory"] == "GPU 0 (NVIDIA H100): 70.0 of 80.0 GiB free."


@pytest.mark.parametrize(
    ("changes", "level", "name", "says", "remedy"),
    [
        ({"python": (3, 9, 2)}, "problem", "Python is too old", "3.9.2", "newer Python"),
        ({"torch": "2.9.1"}, "problem", "torch is too old", "2.9.1", "pip install --upgrade torch"),
        ({"torch_cuda": None, **NO_CUDA}, "problem", "torch without CUDA", "NVIDIA H100", "CUDA build"),
        (
            {"driver_cuda": (12, 4), "cuda_error": "driver too old", **NO_CUDA},
            "problem",
            "driver is too old",
            "goes up to CUDA 12.4: driver too old",
            "built for CUDA 12",
        ),
        ({"cuda_error": "error 999", **NO_CUDA}, "problem", "CUDA does not start", "error 999", "--gpus all"),
        (
            {"gpus": (replace(H100, capability=(7, 0)),)},
            "problem",
            "torch build does not fit the GPU",
            "7.0",
            "an older CUDA",
        ),
        (
            {"architectures": ("sm_80", "sm_86")},
            "problem",
            "torch build does not fit the GPU",
            "sm_80, sm_86",
            "a newer one",
        ),
        ({"triton": None}, "warning", "no Triton", "not installed", "pip install triton==3.6.0"),
        ({"triton": "3.5.1"}, "warning", "Triton does not fit torch", "3.5.1", "pip install triton==3.6.0"),
        (
            {"backends": {"cpu": ON_CPU, "cuda": WITHOUT_TRITON}},
            "warning",
            "slow portable backend",
            "triton is not installed",
            "Install Triton",
        ),
        ({"gpus": (replace(H100, free=2**30),)}, "warning", "little memory", "GPU 0 (NVIDIA H100): 1.0", "nvidia-smi"),
        ({"free_memory": 2**30}, "warning", "little memory", "host: 1.0 of 64.0", "top"),
        (
            {"variables": {"TRITON_INTERPRET": "1"}},
            "warning",
            "slow by environment variable",
            "TRITON_INTERPRET='1'",
            "unset TRITON_INTERPRET",
        ),
        (
            {"variables": {"CUDA_LAUNCH_BLOCKING": "1"}},
            "warning",
            "slow by environment variable",
            "waited for",
            "unset CUDA_LAUNCH_BLOCKING",
        ),
        (
            {"variables": {"CUDA_VISIBLE_DEVICES": ""}, **NO_CUDA},
            "warning",
            "slow by environment variable",
            "hidden",
            "unset CUDA_VISIBLE_DEVICES",
        ),
        ({"threads": 16}, "warning", "more threads than processors", "16 of 8", "OMP_NUM_THREADS=8"),
    ],
)
def test_one_thing_wrong_is_one_finding(changes, level, name, says, remedy):
    found = [verdict for verdict in judge_facts(replace(GPU_MACHINE, **changes)) if verdict.level is not Level.OK]
    assert [(verdict.level.value, verdict.name) for verdict in found] == [(level, name)]
    assert says in found[0].message
    assert remedy in found[0].remedy


def test_idle_processors_matter_without_a_gpu_only():
    names = [verdict.name for verdict in judge_facts(replace(CPU_MACHINE, threads=1))]
    assert "processors are idle" in names
    assert "processors are idle" not in [verdict.name for verdict in judge_facts(replace(GPU_MACHINE, threads=1))]


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ((8, 6), ("sm_80",), True),  # binary code serves newer GPUs of its generation
        ((9, 0), ("sm_80",), False),
        ((12, 0), ("sm_80", "compute_90"), True),  # PTX all newer ones
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_90a",), True),
    ],
)
def test_which_code_runs_on_which_gpu(capability, architectures, fits):
    facts = replace(GPU_MACHINE, gpus=(replace(H100, capability=capability),), architectures=architectures)
    names = [verdict.name for verdict in judge_facts(facts)]
    assert ("torch build does not fit the GPU" not in names) is fits


def test_harmless_values_of_variables():
    facts = replace(GPU_MACHINE, variables={"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "0,1"})
    assert {verdict.level for verdict in judge_facts(facts)} == {Level.OK}


def test_extras_installed_in_part():
    packages = dict(GPU_MACHINE.packages, torchvision=None, onnx=None, onnxscript=None)
    text = next(v.message for v in judge_facts(replace(GPU_MACHINE, packages=packages)) if v.name == "extras")
    assert "det in part (faster-coco-eval 1.0; without torchvision)" in text
    assert "no export" in text
    assert "train (lightning 1.0" in text


def test_versions():
    assert numbers("2.11.0+cu130") == (2, 11, 0)
    assert numbers("2.15.0.dev20260101") == (2, 15, 0)


def test_the_facts_of_this_machine():
    facts = gather()
    assert facts.torch == torch.__version__
    assert facts.cores >= 1
    assert facts.backends["cpu"]["portable"].chosen
    assert facts.packages["lightning"]


# -- probes


def wrong(backend, device, dtypes):
    portable = BACKENDS["portable"]

    def ss2d_backward(*arguments):
        gx, *others = portable.ss2d_backward(*arguments)
        return 0.999 * gx, *others

    BACKENDS["portable"] = portable._replace(ss2d_backward=ss2d_backward)
    return self_test(backend, device, dtypes)


def fails(*_):
    raise RuntimeError("no kernel image is available")


def hangs(*_):
    time.sleep(1000)


def test_the_self_test_of_a_right_backend():
    verdict = judge_backend("portable", "cpu")
    assert (verdict.level, verdict.name) == (Level.OK, "self-test")
    assert "backend 'portable' in float32 right against the fp64 reference" in verdict.message


@pytest.mark.parametrize(
    ("broken", "seconds", "name", "says"),
    [
        (wrong, 120, "backend is wrong", r"WRONG against the fp64 reference: error 1.0e-03 > 2e-06, at gradient of x"),
        (fails, 120, "backend fails", r"RuntimeError: no kernel image is available"),
        (hangs, 1, "backend hangs", r"not done after 1 s; it was in File .*test_environment.py\", line \d+ in hangs"),
    ],
)
def test_the_self_test_of_a_broken_one(monkeypatch, broken, seconds, name, says):
    monkeypatch.setattr(environment, "self_test", broken)
    verdict = judge_backend("portable", "cpu", seconds)
    assert (verdict.level, verdict.name) == (Level.PROBLEM, name)
    assert re.search(says, verdict.message)
    assert "portable" in verdict.remedy


SPEED = Speed(
    device="cpu",
    backend="portable",
    shape="1 x 56 x 56 x 96, fp32",
    bandwidth=1e10,
    forward=0.01,
    forward_floor=2e-4,
    backward=0.02,
    backward_floor=3e-4,
    expected=(55.0, 90.0),
    lengths=(784, 1600, 3136, 6400),
    times=(0.005, 0.01, 0.02, 0.04),
)


def test_usual_speed():
    verdicts = speed_verdicts(SPEED)
    assert {verdict.level for verdict in verdicts} == {Level.OK}
    assert [verdict.name for verdict in verdicts] == [
        "speed of forward",
        "speed of backward",
        "backward is linear in L",
    ]
    assert "50 times what its bytes take at 10 GB/s; usual is 55" in verdicts[0].message


@pytest.mark.parametrize(("change", "name"), [({"forward": 0.2}, "slow forward"), ({"backward": 0.3}, "slow backward")])
def test_slow(change, name):
    found = [verdict for verdict in speed_verdicts(replace(SPEED, **change)) if verdict.level is not Level.OK]
    assert [(verdict.level, verdict.name) for verdict in found] == [(Level.WARNING, name)]


def test_a_quadratic_backward_is_a_problem():
    times = tuple(1e-9 * length**2 for length in SPEED.lengths)
    found = [verdict for verdict in speed_verdicts(replace(SPEED, times=times)) if verdict.level is not Level.OK]
    assert [(verdict.level, verdict.name) for verdict in found] == [
        (Level.PROBLEM, "backward grows faster than linearly")
    ]
    assert "L^2.00" in found[0].message


def test_the_slope():
    lengths = (100, 200, 400, 800)
    assert slope(lengths, tuple(3 * length**1.3 for length in lengths)) == pytest.approx(1.3)


def quadratic_backward(device, threads):
    """The measurement, with a backward that makes as many passes as there are rows of pixels, squared."""
    from vmamba.doctor import speed

    portable = BACKENDS["portable"]

    def ss2d_backward(gy, x, *rest):
        L = gy.shape[1] * gy.shape[2]
        for _ in range(L // 64):
            gy = gy + 0.0
        return portable.ss2d_backward(gy, x, *rest)

    BACKENDS["portable"] = portable._replace(ss2d_backward=ss2d_backward)
    return speed.measure(device, threads)


@pytest.mark.slow
def test_a_quadratic_backward_is_measured():
    result = run_with_limit(quadratic_backward, "cpu", 1, seconds=200)
    assert isinstance(result, Finished)
    usual = run_with_limit(environment.measure, "cpu", 1, seconds=200).value
    assert usual.exponent < Speed.SUPERLINEAR
    assert result.value.exponent > usual.exponent


def test_a_measurement_that_hangs_is_told(monkeypatch):
    monkeypatch.setattr(environment, "measure", hangs)
    (verdict,) = judge_speed("cpu", seconds=1)
    assert (verdict.level, verdict.name) == (Level.WARNING, "speed is unknown")
    assert "line" in verdict.message


@pytest.mark.parametrize(("instead", "words"), [("hangs", "was not done after 1 s; it was in"), ("fails", "failed: ")])
def test_a_driver_that_hangs_is_a_verdict(monkeypatch, instead, words):
    monkeypatch.setattr(environment, "gather", globals()[instead])
    (verdict,) = examine_environment("cpu", seconds=1)
    assert (verdict.level, verdict.name) == (Level.PROBLEM, "machine does not answer")
    assert words in verdict.message


def test_the_whole_examination_of_this_machine():
    said = []
    verdicts = examine_environment("cpu", progress=said.append)
    # versions and drivers are this machine's, and so may be wrong; its scan may not
    names = [verdict.name for verdict in verdicts]
    for name in ("Python", "torch", "backend", "self-test", "backward is linear in L"):
        assert name in names
    assert any("self-test of portable on cpu" in line for line in said)
    assert all(verdict.message for verdict in verdicts)


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="'tpu': this machine has cpu"):
        examine_environment("tpu")
