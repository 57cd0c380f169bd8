"""``vmamba bench``: tables, files, exit status."""

import json
import re
from functools import partial

import pytest
import torch
from PIL import Image

from vmamba import analysis
from vmamba.analysis import throughput
from vmamba.cli import main
from vmamba.ops.dispatch import BACKENDS

QUICK = ["--device", "cpu", "--size", "32", "--repeats", "2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    """Short rounds, one thread, in a directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    for name in ("ModelSettings", "OperatorSettings"):
        monkeypatch.setattr(analysis, name, partial(getattr(analysis, name), round_seconds=0.001))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wrong_backend(monkeypatch):
    portable = BACKENDS["portable"]

    def ss2d_backward(*arguments):
        gx, *others = portable.ss2d_backward(*arguments)
        return 0.999 * gx, *others

    monkeypatch.setitem(BACKENDS, "portable", portable._replace(ss2d_backward=ss2d_backward))


def fails(arguments, capsys, status=2):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == status
    return capsys.readouterr()


def is_a_picture(path):
    with Image.open(path) as image:
        return min(image.size) > 200 and len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_models_by_default(capsys, tmp_path):
    main(["bench", *QUICK, "--batch", "2", "--json", "bench.json", "--png", "bench.png"])
    captured = capsys.readouterr()
    assert f"torch {torch.__version__}" in captured.out
    assert "tf32 off" in captured.out
    assert "backend 'portable' in float32 right against the fp64 reference" in captured.out
    assert "INVALID" not in captured.out
    for title in ("inference: forward", "latency: forward", "training step: forward, loss, backward"):
        assert re.search(rf"^{title}.*, 32 px, fp32$", captured.out, re.MULTILINE)
    assert len(re.findall(r"^model .* x vmamba_nano$", captured.out, re.MULTILINE)) == 3
    row = r"eager +(as made|channels-last) +[\d,]+\.\d +\d+\.\d{3} +\d+\.\d{3} - \d+\.\d{3} +- +\d+\.\d\d$"
    assert len(re.findall(rf"^vmamba_nano +{row}", captured.out, re.MULTILINE)) == 3
    assert len(re.findall(rf"^convnext_atto +{row}", captured.out, re.MULTILINE)) == 3
    assert "training: round 2 of 2" in captured.err
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["valid"] is True
    assert len(data["rows"]) == 6
    assert is_a_picture(tmp_path / "bench.png")


def test_a_model_that_fails_is_told_in_its_row(capsys, monkeypatch):
    make = throughput.make_model

    def make_all_but_one(name, size):
        if name == "convnext_atto":
            raise MemoryError("no room")
        return make(name, size)

    monkeypatch.setattr(throughput, "make_model", make_all_but_one)
    main(["bench", *QUICK, "--task", "latency", "--png", "bench.png"])
    out = capsys.readouterr().out
    assert re.search(r"^convnext_atto  eager  -  .*failed: MemoryError: no room$", out, re.MULTILINE)
    assert re.search(r"^vmamba_nano .* 1\.00$", out, re.MULTILINE)


def test_wrong_results_are_invalid_and_not_compared(capsys, tmp_path, wrong_backend):
    out = fails([*QUICK, "--train", "--json", "bench.json", "--png", "bench.png"], capsys, status=1).out
    assert re.search(r"^INVALID: the scan is wrong", out, re.MULTILINE)
    assert "WRONG against the fp64 reference" in out
    assert not re.search("^model.* x ", out, re.MULTILINE)
    assert not re.search(r"\d\.\d\d$", out, re.MULTILINE)
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["valid"] is False
    assert {row["relative"] for row in data["rows"]} == {None}
    assert is_a_picture(tmp_path / "bench.png")


def test_the_operator(capsys, tmp_path):
    main(["bench", "--op", *QUICK, "--d-state", "16", "--json", "op.json", "--png", "op.png"])
    out = capsys.readouterr().out
    assert re.search(r"a large copy reads and writes [\d,]+ GB/s", out)
    assert len(re.findall(r"^stage \d: 1 x \d x \d x \d+, N 16, R \d+$", out, re.MULTILINE)) == 4
    assert len(re.findall(r"^portable  scan forward .* \d+\.\d$", out, re.MULTILINE)) == 4
    assert "x portable" not in out  # nothing to compare the only backend with
    data = json.loads((tmp_path / "op.json").read_text())
    assert len(data["rows"]) == 16
    assert is_a_picture(tmp_path / "op.png")


def test_backends_side_by_side(capsys, monkeypatch):
    portable = BACKENDS["portable"]
    monkeypatch.delitem(BACKENDS, "portable")  # to come last again
    monkeypatch.setitem(BACKENDS, "other", portable)
    monkeypatch.setitem(BACKENDS, "portable", portable)
    main(["bench", "--op", *QUICK])
    out = capsys.readouterr().out
    assert len(re.findall(r"^backend .* x portable$", out, re.MULTILINE)) == 4
    assert len(re.findall(r"^other +(scan|ss2d) .* \d+\.\d\d$", out, re.MULTILINE)) == 16


def test_a_wrong_operator_is_not_compared(capsys, wrong_backend):
    out = fails(["--op", *QUICK], capsys, status=1).out
    assert "INVALID" in out
    assert "x portable" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vmamba_nona"], "did you mean vmamba_nano"),
        (["--task", "inferance"], "choose from inference, latency, training"),
        (["--mode", "graphs"], "graphs needs CUDA"),
        (["--dtype", "int8"], "choose from fp32"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--d-state", "16"], "--d-state is of no use without --op"),
        (["--op", "--train"], "--task is of no use with --op"),
        (["--op", "vmamba_nano"], "leave out vmamba_nano, or --op"),
        (["--op", "--d-state", "2"], "d_state must be one of 1, 16"),
        (["--json", "nowhere/bench.json"], "there is no directory nowhere"),
        (["--png", "nowhere/bench.png"], "there is no directory nowhere"),
        (["--device", "tpu"], "choose auto, cpu or cuda"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(capsys, arguments, message):
    captured = fails([*QUICK, *arguments], capsys)
    assert captured.err.startswith("vmamba bench: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_help_has_examples_and_says_what_a_step_is(capsys):
    text = fails(["--help"], capsys, status=0).out
    assert "  vmamba bench --op" in text
    assert "training the forward, cross-entropy and backward of a batch" in text
