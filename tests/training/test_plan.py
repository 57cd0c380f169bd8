"""The run on paper: the ImageNet recipe's figures, against timm's schedule and against a pass that is computed."""

import contextlib
import io
import os
import re

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from vmamba.cli import main
from vmamba.training import resolve
from vmamba.training.plan import describe, measure, plan


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test here."""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("nothing"), io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out):
            main(["train", "--recipe", "imagenet", "--dry-run"])
    finally:
        os.chdir(before)
    assert list(folder.iterdir()) == []
    return out.getvalue()


def test_imagenet_on_paper(printed):
    assert "vmamba_tiny_s1l8, 30,249,064 parameters, 224 px" in printed
    assert "1,281,167 training and 50,000 validation images, 1,000 classes" in printed
    assert "1024 a step = 8 processes x 1 passes x 128 images" in printed
    assert "1,251 an epoch, 375,300 in 300 epochs; 143 images of every epoch do not fill a step" in printed
    assert "warm-up over 25,020 steps from 1e-06 to 0.001, then a cosine to 1e-05" in printed
    assert "adamw, weight decay 0.05, gradient norm at most 5.0, bf16, moving average 0.9999" in printed


def test_learning_rate_of_every_epoch_is_timms(printed):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1e-3)
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=280 * 1251,
        lr_min=1e-5,
        warmup_t=20 * 1251,
        warmup_lr_init=1e-6,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    found = {int(epoch): float(rate) for epoch, rate in re.findall(r"(?<!\S)(\d+) (\d\.\d{4}e-\d\d)", printed)}
    assert list(found) == list(range(1, 301))
    for epoch, rate in found.items():
        theirs.step_update((epoch - 1) * 1251)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=6e-5), epoch
    assert (found[1], found[21]) == (1e-6, 1e-3)


def test_time_and_memory_say_where_they_come_from(printed):
    assert "571 training images/s a process (published for an A100, batch 128, 224 px)" in printed
    # 300 epochs of 1,281,024 images, and two thirds of a step for each of 50,000 validated twice, by 8 x 571 a second
    seconds = (300 * 1_281_024 + 300 * 50_000 * 2 / 3) / (8 * 571)
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    assert f"time       about {hours}:{minutes:02}" in printed
    assert "counted in a pass without numbers" in printed


def kept_bytes(model, images):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(torch.randn(images, 3, 64, 64))
    own_storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own_storages)


@pytest.mark.parametrize("name", ["vmamba_nano", "resnet18", "vmamba_micro"])
def test_memory_is_what_a_computed_pass_keeps(name):
    model = timm.create_model(name, num_classes=10)
    needs = measure(model, 64, "fp32")
    assert needs.parameters == sum(p.numel() for p in model.parameters())
    assert needs.constant + 3 * needs.kept == pytest.approx(kept_bytes(model, 3), rel=0.02)
    half = measure(model, 64, "bf16")
    assert 0.4 < half.kept / needs.kept < 0.8
    assert half.operations == needs.operations


def test_checkpointing_keeps_less():
    model = timm.create_model("vmamba_nano")
    assert measure(model, 64, "fp32", checkpointing=True).kept < 0.7 * measure(model, 64, "fp32").kept
    # and leaves no hooks behind
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_other_data_processes_and_speeds(make_photos):
    photos = make_photos("photos", {"train/cat": 6, "train/dog": 6, "val/cat": 2, "val/dog": 2})
    config = resolve(
        {
            "model": {"name": "vmamba_nano"},
            "data": {"source": str(photos), "batch_size": 4, "image_size": 32},
            "schedule": {"epochs": 10, "warmup_epochs": 2},
            "run": {"accumulate": 2, "precision": "fp32"},
        }
    )
    planned = plan(config, processes=2, rate=3.0)
    assert (planned.schedule.steps_per_epoch, planned.schedule.steps, planned.images_per_pass) == (3, 30, 1)
    assert planned.seconds == pytest.approx(10 * 12 / 6 + 10 * 4 / 18)
    text = describe(planned)
    assert "3 training images/s a process (as given)" in text
    assert f"{photos}: 12 training and 4 validation images, 2 classes" in text
    guessed = plan(config)
    assert guessed.rate > 3
    assert "guessed" in describe(guessed)
    with pytest.raises(ValueError, match="4 does not divide into 3 processes times run.accumulate 2"):
        plan(config, processes=3)
    with pytest.raises(FileNotFoundError, match="no such data folder: nowhere"):
        plan(resolve({"data": {"source": "nowhere"}}))


def test_fsdp_splits_the_state():
    config = resolve({"run": {"strategy": "fsdp", "ema_decay": 0.9, "precision": "fp32"}})
    one, four = (plan(config, processes=n) for n in (1, 4))
    assert one.state_bytes == 20 * one.needs.parameters
    assert four.state_bytes == one.state_bytes // 4
