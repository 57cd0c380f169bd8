"""How figures are taken: in turn, with failures told, and nothing left changed."""

import pytest
import torch

from vmamba.analysis.measuring import (
    WARM_UP_CALLS,
    Measurement,
    Stopwatch,
    checked_device,
    environment,
    in_turn,
    numeric_flags,
    own_random_numbers,
    reason,
)

CPU = torch.device("cpu")


def test_cases_are_measured_in_turn():
    order, samples = [], {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, 5.0, 6.0])}

    def case(name):
        def one_round():
            order.append(name)
            return next(samples[name])

        return lambda: one_round

    results = in_turn({("a",): case("a"), ("b",): case("b")}, 3, lambda message: None)
    assert order == ["a", "b"] * 3
    assert results == {("a",): Measurement(2.0, 1.0, 3.0), ("b",): Measurement(5.0, 5.0, 6.0)}


def test_a_failing_case_does_not_end_the_others():
    def refuse():
        raise MemoryError("no room")

    calls = []

    def later():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("worn out\nwith details")
        return 1.0

    results = in_turn({("at once",): refuse, ("good",): lambda: lambda: 1.0, ("later",): lambda: later}, 3, print)
    assert results[("at once",)] == "MemoryError: no room"
    assert results[("later",)] == "RuntimeError: worn out with details"
    assert results[("good",)].median == 1.0
    assert len(calls) == 2


def test_a_reason_is_one_short_line():
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("long " * 100))) == 200


@pytest.mark.parametrize("latency", [False, True])
def test_rounds_are_warmed_up_and_as_long_as_asked(latency):
    calls = []

    def step():
        calls.append(1)
        torch.ones(20_000).exp_().sum()

    one_round = Stopwatch(CPU).rounds(step, 0.01, latency=latency)
    assert len(calls) == WARM_UP_CALLS + 1
    seconds = one_round()
    assert 0 < seconds < 0.01
    assert len(calls) > WARM_UP_CALLS + 2


def test_flags_and_random_numbers_are_put_back():
    def flags():
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, torch.get_rng_state().tolist()

    torch.manual_seed(3)
    before = flags()

    def inside(tf32):
        with numeric_flags(tf32), own_random_numbers(CPU):
            torch.rand(1)
            assert flags()[:3] == ("high" if tf32 else "highest", tf32, True)
            raise KeyError

    for tf32 in (True, False):
        with pytest.raises(KeyError):
            inside(tf32)
        assert flags() == before


def test_generators_of_other_devices_are_not_touched(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with own_random_numbers(CPU):
        first = torch.rand(1)
    assert not seeded
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(1))


def test_environment_names_what_bears_on_speed(monkeypatch):
    facts = environment(CPU)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["scan_backend"] == "portable"
    assert facts["device"].startswith("cpu")
    # without git there is no commit to tell
    monkeypatch.setenv("PATH", "")
    assert environment(CPU)["commit"] is None


@pytest.mark.parametrize("name", ["tpu", "mps", "meta"])
def test_devices_that_cannot_be_measured_are_refused(name):
    with pytest.raises(ValueError, match=name):
        checked_device(name)


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checked_device("auto") == CPU
    with pytest.raises(ValueError, match="sees no CUDA here"):
        checked_device("cuda")
