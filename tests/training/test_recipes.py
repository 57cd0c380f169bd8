"""The recipes against the table of the paper's training, and the schedule against timm's."""

import pytest
import timm
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import SGD

from vmamba.tasks import warmup_cosine
from vmamba.training import RECIPES, resolve
from vmamba.training.config import Config, as_dict, from_dict, parse_overrides


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_complete_config(name):
    config = resolve(recipe=name)
    assert isinstance(config, Config)
    assert config == RECIPES[name]()
    assert from_dict(as_dict(config)) == config
    assert resolve(as_dict(config)) == config
    changed = resolve(parse_overrides(["optim.weight_decay=0.07"]), recipe=name)
    assert changed.optim.weight_decay == 0.07
    assert changed.data == config.data
    with pytest.raises(ValueError, match="unknown config field 'data.bach_size'; did you mean 'data.batch_size'"):
        resolve(parse_overrides(["data.bach_size=3"]), recipe=name)


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match="there is no recipe 'imagenette'; there are: digits, photos, small"):
        resolve(recipe="imagenette")


def test_imagenet_is_the_papers_recipe():
    config = resolve(recipe="imagenet")
    schedule, optim, loss, augment = config.schedule, config.optim, config.loss, config.augment
    assert (schedule.epochs, schedule.warmup_epochs) == (300, 20)
    assert (optim.name, optim.betas, optim.eps, optim.weight_decay) == ("adamw", (0.9, 0.999), 1e-8, 0.05)
    assert optim.clip_norm == 5.0
    assert not optim.decay_ssm
    assert config.data.batch_size == 1024
    for batch, peak in ((1024, 1e-3), (512, 5e-4), (2048, 2e-3)):
        scaled = resolve({"data": {"batch_size": batch}}, recipe="imagenet")
        assert scaled.learning_rate == pytest.approx(peak)
        assert scaled.learning_rate * schedule.warmup_from == pytest.approx(5e-7 * batch / 512)
        assert scaled.learning_rate * schedule.decay_to == pytest.approx(5e-6 * batch / 512)
    assert (loss.label_smoothing, loss.mixup, loss.cutmix, loss.mix_prob, loss.mix_switch) == (0.1, 0.8, 1.0, 1.0, 0.5)
    assert (augment.rand_augment, augment.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.4)
    assert (augment.random_erase, augment.scale, augment.horizontal_flip) == (0.25, (0.08, 1.0), 0.5)
    assert (config.data.image_size, config.data.crop_pct, config.data.interpolation) == (224, 0.875, "bicubic")
    assert config.run.ema_decay == 0.9999
    assert config.model.drop_path is None


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("vanilla_vmamba_tiny", 0.2),
        ("vanilla_vmamba_small", 0.3),
        ("vanilla_vmamba_base", 0.6),
        ("vmamba_tiny_s2l5", 0.2),
        ("vmamba_small_s2l15", 0.3),
        ("vmamba_base_s2l15", 0.6),
        ("vmamba_tiny_s1l8", 0.2),
        ("vmamba_small_s1l20", 0.3),
        ("vmamba_base_s1l20", 0.5),
    ],
)
def test_drop_path_is_the_variants_own(name, rate):
    assert timm.create_model(name, device="meta").config.drop_path_rate == rate


def test_an_absolute_learning_rate_is_not_scaled():
    config = resolve({"optim": {"lr": 3e-4}, "data": {"batch_size": 4096}}, recipe="imagenet")
    assert config.learning_rate == 3e-4


def test_schedule_equals_timms():
    epochs, warmup_epochs, steps_per_epoch, peak = 6, 2, 50, 1e-3
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=peak)
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=(epochs - warmup_epochs) * steps_per_epoch,
        lr_min=1e-5,
        warmup_t=warmup_epochs * steps_per_epoch,
        warmup_lr_init=1e-6,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step in range(epochs * steps_per_epoch):
        theirs.step_update(step)
        ours = peak * warmup_cosine(step, steps=300, warmup=100, start=1e-3, end=1e-2)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step


def test_finetune_and_small_differ_from_imagenet_where_they_say():
    imagenet, small, finetune = (resolve(recipe=name) for name in ("imagenet", "small", "finetune"))
    assert small.loss == imagenet.loss
    assert (small.run.ema_decay, small.schedule.epochs, small.data.batch_size) == (0.999, 100, 128)
    assert finetune.optim.layer_decay == 0.8
    assert finetune.model.weights == "pretrained"
    assert finetune.learning_rate < imagenet.learning_rate / 5
