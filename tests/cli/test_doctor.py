"""``vmamba doctor``: what it prints, its exit status, what it hands on."""

import json

import pytest

from vmamba.cli import main
from vmamba.doctor import Level, Verdict, environment, step

FINE = Verdict(Level.OK, "loss", "A finite scalar, 2.3.", figures={"loss": 2.3})
SLOW = Verdict(Level.WARNING, "slow portable backend", "On the GPU the scans run on 'portable'.", "Install Triton.")
BROKEN = Verdict(Level.PROBLEM, "loss is not a scalar", "The loss has shape (8,).", "Average it: loss.mean().")


@pytest.fixture
def asked(monkeypatch):
    """What the two examinations were asked; both answer `answer`."""
    calls = []
    answer = [FINE, SLOW]
    monkeypatch.setattr(step, "examine", lambda target, **named: calls.append((target, named)) or answer)
    monkeypatch.setattr(
        environment, "examine_environment", lambda device, **named: calls.append((device, named)) or answer
    )
    calls.append(answer)
    return calls


def test_lines_and_counts(asked, capsys):
    main(["doctor"])
    output = capsys.readouterr().out
    assert output == (
        "ok       loss: A finite scalar, 2.3.\n"
        "WARNING  slow portable backend: On the GPU the scans run on 'portable'.\n"
        "         -> Install Triton.\n"
        "\n0 problems, 1 warning\n"
    )
    assert asked[1][0] == "auto"
    assert asked[1][1]["seconds"] == 120


def test_a_problem_is_the_exit_status(asked, capsys):
    asked[0].append(BROKEN)
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--device", "cpu", "--time-limit", "7"])
    assert stop.value.code == 1
    assert asked[1][0] == "cpu"
    assert asked[1][1]["seconds"] == 7
    assert "PROBLEM  loss is not a scalar" in capsys.readouterr().out


def test_json(asked, capsys):
    asked[0].append(BROKEN)
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--json"])
    assert stop.value.code == 1
    assert json.loads(capsys.readouterr().out) == [FINE.as_dict(), SLOW.as_dict(), BROKEN.as_dict()]


def test_json_in_a_file(asked, tmp_path, capsys):
    main(["doctor", "--json", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text()) == [FINE.as_dict(), SLOW.as_dict()]
    assert f"verdicts: {tmp_path / 'found.json'}" in capsys.readouterr().out
    # before anything is examined
    asked.clear()
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--json", str(tmp_path / "nowhere" / "found.json")])
    assert stop.value.code == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_step_is_handed_on(asked):
    main(["doctor", "--config", "run.yaml", "--set", "data.workers=0", "--set", "run.seed=1", "--bisect"])
    assert asked[1] == (
        "run.yaml",
        {"overrides": ["data.workers=0", "run.seed=1"], "device": "auto", "bisect": True, "time_limit": 120.0},
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bisect"], "--bisect is about a training step: name it with --config"),
        (["--set", "run.seed=1"], "--set is about a training step: name it with --config"),
        (["--time-limit", "0"], "--time-limit must be positive, not 0"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("vmamba doctor: ")
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_environment_really(capsys):
    main(["doctor", "--device", "cpu", "--json"])
    verdicts = {verdict["name"]: verdict for verdict in json.loads(capsys.readouterr().out)}
    assert verdicts["self-test"]["figures"]["backend"] == "portable"
    assert verdicts["backward is linear in L"]["figures"]["lengths"] == [784, 1600, 3136, 6400]


@pytest.mark.slow
def test_a_step_really(make_photos, tmp_path, capsys):
    photos = make_photos("photos", {f"{part}/{name}": 4 for part in ("train", "val") for name in ("cat", "dog")})
    (tmp_path / "run.yaml").write_text(
        f"model: {{name: vmamba_nano, kwargs: {{dims: 8, depths: [1, 1, 1, 1]}}}}\n"
        f"data: {{source: {photos}, image_size: 32, batch_size: 4, workers: 0}}\nrun: {{device: cpu}}\n"
    )
    main(["doctor", "--config", str(tmp_path / "run.yaml"), "--set", "run.precision=fp32"])
    output = capsys.readouterr().out
    assert "ok       loss: A finite scalar" in output
    assert "0 problems" in output
