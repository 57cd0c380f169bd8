"""The command line: what it prints, and how it fails."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import timm

import vmamba
from vmamba.cli import main
from vmamba.models import save_checkpoint

TINY = ["--set", "model.kwargs={dims: 8, depths: [1, 1, 1, 1]}", "--set", "run.threads=1", "--device", "cpu"]


@pytest.fixture
def photos(make_photos, tmp_path, monkeypatch):
    """Six photos of two classes; the working directory is where their folder lies."""
    root = make_photos("my photos", {"cat": 3, "dog": 3})
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture
def trained(photos, capsys):
    options = ["--model", "vmamba_nano", "--image-size", "32", "--epochs", "1", "--batch-size", "2"]
    main(["train", "--data", "my photos", *options, "--set", "data.workers=0", *TINY])
    return capsys.readouterr().out


def fails(arguments, capsys):
    """The line on stderr of a command that must fail with status 2 and without a traceback."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    return error


def test_train_says_what_to_do_next_and_it_works(trained, capsys):
    assert re.search(r"^validation accuracy \d+\.\d\d %", trained, re.MULTILINE)
    for name in ("confusion matrix", "predictions", "checkpoint"):
        assert re.search(rf"^{name} +runs/my photos-vmamba_nano/\S+$", trained, re.MULTILINE)
    command = shlex.split(re.search(r"^try it: +(.*)$", trained, re.MULTILINE)[1])
    assert command[:2] == ["vmamba", "predict"]
    main(command[1:])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(re.search(r"\.png +(cat|dog) \d+\.\d %  (cat|dog) \d+\.\d %$", line) for line in lines[1:])


def test_a_second_run_gets_its_own_directory(trained, capsys, tmp_path):
    main(["train", "--config", "runs/my photos-vmamba_nano/config.yaml"])
    assert (tmp_path / "runs" / "my photos-vmamba_nano-2" / "checkpoints" / "best.ckpt").is_file()
    error = fails(["train", "--data", "my photos", "--out", "runs/my photos-vmamba_nano"], capsys)
    assert "already exists" in error
    error = fails(["train", "--resume", "runs/my photos-vmamba_nano"], capsys)
    assert "is finished" in error
    error = fails(["train", "--resume", "runs/my photos-vmamba_nano", "--epochs", "3"], capsys)
    assert "--resume takes everything from the run directory" in error


def test_eval_prints_a_table(trained, capsys):
    main(["eval", "runs/my photos-vmamba_nano"])
    title, names, values = capsys.readouterr().out.splitlines()
    assert title.endswith("best.ckpt on my photos (validation images), fp32 on cpu")
    assert names.split() == ["model", "images", "top-1", "%", "top-5", "%", "loss"]
    assert values.split()[:2] == ["vmamba_nano", "2"]
    accuracy = re.search(r"validation accuracy (\S+)", trained)[1]
    assert float(values.split()[2]) == pytest.approx(float(accuracy), abs=0.01)


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A file as the official training script writes it, of a released variant, and its state under our names."""
    import torch

    from vmamba.models.keymap import state_to_official

    torch.manual_seed(0)
    state = timm.create_model("vmamba_tiny_s1l8").state_dict()
    contents = {"model": state_to_official(state), "epoch": 264, "max_accuracy": 82.6, "optimizer": {"state": {}}}
    torch.save(contents, tmp_path / "vssm1_tiny.pth")
    monkeypatch.chdir(tmp_path)
    return state


@pytest.mark.slow
def test_fine_tuning_from_a_released_file_in_one_command(photos, released, capsys, one_thread):
    from vmamba.training import load_trained

    command = "train --recipe finetune --weights vssm1_tiny.pth --image-size 64 --epochs 2 --batch-size 2"
    main([*command.split(), "--data", "my photos", "--set", "data.workers=0"])
    assert "vmamba_tiny_s1l8 (29.48 M parameters) on my photos, 2 classes" in capsys.readouterr().out
    model, about = load_trained("runs/my photos-vmamba_tiny_s1l8")
    assert about.preprocessing.image_size == (64, 64)
    assert about.config["optim"]["layer_decay"] == 0.8
    tuned = model.state_dict()
    assert tuned["head.fc.weight"].shape[0] == 2
    moved = {name: float((tuned[name] - released[name]).abs().mean()) for name in tuned if "head.fc" not in name}
    # an Adam step is about the learning rate: all layers moved, near the head more than near the stem
    assert all(0 < distance < 1e-3 for name, distance in moved.items() if name.endswith("in_proj.weight"))
    last, first = "stages.3.blocks.1.ssm.in_proj.weight", "stages.0.blocks.0.ssm.in_proj.weight"
    assert 0.8**15 < moved[first] / moved[last] < 0.8**9
    main(["predict", "my photos/cat/0.png"])


def test_eval_shows_what_is_published_beside_what_it_measures(released, make_photos, capsys, one_thread):
    make_photos("imagenet", {"val/n01440764": 1, "val/n01443537": 2})
    command = "eval vssm1_tiny.pth --model vmamba_tiny_s1l8 --data imagenet --precision bf16"
    main(command.split())
    title, *rows = capsys.readouterr().out.splitlines()
    assert title == "vssm1_tiny.pth on imagenet, bf16 on cpu"
    names, measured, published = (re.split(r"  +", row.strip()) for row in rows)
    assert names == ["model", "images", "top-1 %", "top-5 %", "loss"]
    assert measured[:2] == ["vmamba_tiny_s1l8", "3"]
    assert re.fullmatch(r"\d+\.\d{3}", measured[2])
    assert re.fullmatch(r"\d+\.\d{4}", measured[4])
    assert published == ["published", "50000", "82.600", "-", "-"]


def test_predict_takes_the_newest_run_and_prints_json(trained, capsys):
    main(["predict", "my photos/cat", "--json", "--top-k", "1", "--sheet", "sheet.png"])
    found = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in found] == [f"my photos/cat/{i}.png" for i in range(3)]
    assert all(len(entry["predictions"]) == 1 for entry in found)
    assert 0.5 <= found[0]["predictions"][0]["probability"] <= 1


def test_models_lists_every_variant(capsys):
    main(["models", "--url"])
    text = capsys.readouterr().out
    for name in vmamba.list_models():
        assert re.search(rf"^{name} ", text, re.MULTILINE)
    assert re.search(r"^vmamba_tiny_s1l8 +30,249,064  2,2,8,2 +96,192,384,768 +82\.6$", text, re.MULTILINE)
    assert text.count("https://github.com/MzeroMiko/VMamba/releases/") == 9


def test_convert_there_and_back(photos, capsys, tmp_path):
    save_checkpoint(timm.create_model("vmamba_nano"), tmp_path / "official.pth", official=True)
    main(["convert", "official.pth", "ours.safetensors"])
    main(["convert", "ours.safetensors", "again.pth", "--to", "official"])
    assert "wrote again.pth (official names)" in capsys.readouterr().out
    import torch

    first, again = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("official.pth", "again.pth"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert "exists already" in fails(["convert", "official.pth", "ours.safetensors"], capsys)
    assert "nothing.pth" in fails(["convert", "nothing.pth", "x.safetensors"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere"], "no such data folder: nowhere"),
        (["train", "--model", "vmamba_nona"], "did you mean vmamba_nano"),
        (["train", "--set", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["train", "--config", "nowhere.yaml"], "no such config file"),
        (["train", "--resume", "nowhere"], "no run to resume"),
        (["eval", "nowhere"], "no such run or checkpoint"),
        (["predict", "no.png"], "no trained run under runs/"),
        (["predict", "no.png", "--top-k", "0"], "--top-k must be at least 1"),
    ],
)
def test_mistakes_are_one_line(photos, capsys, arguments, message):
    error = fails(arguments, capsys)
    assert error.startswith(f"vmamba {arguments[0]}: ")
    assert message in error
    assert "\n" not in error


def test_a_damaged_photo_found_by_a_loading_process_is_one_line(photos, capsys):
    damaged = photos / "cat" / "0.png"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    options = ["--model", "vmamba_nano", "--image-size", "32", "--set", "data.workers=1", "--set", "data.batch_size=2"]
    error = fails(["train", "--data", "my photos", *options, *TINY], capsys)
    assert re.fullmatch(r"vmamba train: cannot read the image my photos/cat/0\.png: .*", error)


def test_unknown_options_and_commands(capsys):
    assert "unrecognized arguments: --epoks" in fails(["train", "--epoks", "3"], capsys)
    assert "invalid choice: 'trian'" in fails(["trian"], capsys)


def test_traceback_on_request():
    with pytest.raises(FileNotFoundError):
        main(["eval", "nowhere", "--traceback"])


@pytest.mark.parametrize("command", ["train", "eval", "predict", "models", "convert"])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"  vmamba {command}" in capsys.readouterr().out


def test_module_runs_and_tells_its_version():
    done = subprocess.run([sys.executable, "-m", "vmamba", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"vmamba {vmamba.__version__}\n"


def test_importing_the_command_line_imports_nothing_heavy():
    code = (
        # timm itself imports triton where there is one
        "import sys, timm; before = set(sys.modules); import vmamba.cli, vmamba.training; "
        "new = set(sys.modules) - before; "
        "heavy = {'lightning', 'matplotlib', 'sklearn', 'tensorboard', 'torchmetrics', 'triton'} & new; "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
