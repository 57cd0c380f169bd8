"""The device of a command: what "auto" is, what is refused, and that all commands offer the same."""

from __future__ import annotations

import argparse

import pytest
import torch

from vmamba import cli
from vmamba._devices import choose_device
from vmamba.analysis.measuring import checked_device
from vmamba.training.machine import choose_machine

# doctor's "auto" is all devices there are: it examines the machine
OTHERS = ("doctor",)


def _have(monkeypatch: pytest.MonkeyPatch, *devices: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in devices)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in devices)


@pytest.mark.parametrize(
    ("there", "chosen", "measured"),
    [((), "cpu", "cpu"), (("mps",), "mps", "cpu"), (("cuda",), "cuda", "cuda"), (("cuda", "mps"), "cuda", "cuda")],
)
def test_auto_is_the_fastest_there_is(there, chosen, measured, monkeypatch) -> None:
    _have(monkeypatch, *there)
    assert choose_device("auto") == choose_machine("auto", "fp32").device == chosen
    assert checked_device("auto").type == measured  # nothing is measured on MPS


def test_a_device_that_is_named_is_taken(monkeypatch) -> None:
    _have(monkeypatch, "cuda", "mps")
    assert choose_device("cpu") == "cpu"


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="this machine cannot compute on device 'cuda:77'"):
        choose_device("cuda:77")


def _device_options() -> dict[str, argparse.Action]:
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    found = {name: parser._option_string_actions.get("--device") for name, parser in commands.choices.items()}
    return {name: action for name, action in found.items() if action is not None and name not in OTHERS}


def test_every_command_has_auto_as_its_default() -> None:
    options = _device_options()
    assert {"train", "eval", "predict", "detect", "segment", "bench", "scaling", "ladder", "erf", "attention"} <= set(
        options
    )
    for name, action in options.items():
        assert action.help.startswith("auto (the default: CUDA where there is one"), name
        assert action.default == (None if name == "train" else "auto"), name  # train's is the config's


@pytest.mark.parametrize("command", ["predict", "segment", "eval"])
def test_commands_take_the_device_that_is_chosen(command, monkeypatch, tmp_path) -> None:
    """Told by what they hand on, since there may be no such device here."""
    import vmamba.training
    import vmamba.training.segmented_files

    seen = []

    def note(*args, device, **others):
        seen.append(device)
        raise ValueError("far enough")

    monkeypatch.setattr("vmamba._devices.choose_device", lambda device: f"chosen for {device}")
    monkeypatch.setattr(vmamba.training, "predict_files", note)
    monkeypatch.setattr(vmamba.training, "evaluate_checkpoint", note)
    monkeypatch.setattr(vmamba.training.segmented_files, "segment_files", note)
    (tmp_path / "c.pth").write_bytes(b"")
    arguments = {
        "predict": ["--checkpoint", "c.pth", "a.png"],
        "segment": ["--checkpoint", "c.pth", "--short-side", "64", "a.png"],
        "eval": ["c.pth", "--task", "classification"],
    }[command]
    for given in ([], ["--device", "cpu"]):
        with pytest.raises(SystemExit):
            cli.main([command, *arguments, *given])
    assert seen == ["chosen for auto", "chosen for cpu"]
