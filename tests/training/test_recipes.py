"""The recipes against the table of the paper's training, and the schedule against timm's."""

import pytest
import timm
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import SGD

from vmamba.tasks import ADE20K_SINGLE_SCALE, warmup_cosine
from vmamba.training import RECIPES, resolve
from vmamba.training.config import Config, as_dict, from_dict, parse_overrides
from vmamba.training.lightning_module import optimizer_of
from vmamba.training.schedule import Schedule


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


def test_ade20k_is_the_published_recipe():
    config = resolve(recipe="ade20k")
    schedule, optim, chosen = config.schedule, config.optim, config.segmentation
    assert (schedule.iterations, schedule.warmup_iterations, schedule.warmup_from) == (160_000, 1_500, 1e-6)
    assert (schedule.shape, schedule.power, schedule.decay_to) == ("poly", 1.0, 0.0)
    assert (optim.name, config.learning_rate, optim.betas, optim.weight_decay) == ("adamw", 6e-5, (0.9, 0.999), 0.01)
    assert (optim.clip_norm, optim.layer_decay, optim.decay_vectors) == (0.0, None, True)
    assert config.data.batch_size == 16
    augment = chosen.augment
    assert (augment.crop, augment.base_size, augment.ratio) == ((512, 512), (2048, 512), (0.5, 2.0))
    assert (augment.class_share, augment.flip, augment.photometric, augment.antialias) == (0.75, 0.5, True, False)
    assert (chosen.channels, chosen.auxiliary_channels, chosen.dropout, chosen.auxiliary_weight) == (512, 256, 0.1, 0.4)
    assert chosen.inference == ADE20K_SINGLE_SCALE


@pytest.mark.parametrize(("name", "epochs", "drops"), [("coco_1x", 12, (8, 11)), ("coco_3x", 36, (27, 33))])
def test_coco_is_the_published_recipe(name, epochs, drops):
    config = resolve(recipe=name)
    schedule, optim, chosen = config.schedule, config.optim, config.detection
    assert (schedule.epochs, schedule.shape, schedule.drops, schedule.gamma) == (epochs, "steps", drops, 0.1)
    assert (schedule.warmup_iterations, schedule.warmup_from) == (1_000, 1e-3)
    assert (optim.name, config.learning_rate, optim.betas, optim.weight_decay) == ("adamw", 1e-4, (0.9, 0.999), 0.05)
    assert (optim.clip_norm, optim.layer_decay, optim.decay_vectors) == (0.0, None, True)
    assert (config.data.batch_size, config.model.weights) == (16, "pretrained")
    assert (chosen.channels, chosen.max_size, chosen.anchor_scale) == (256, 1333, 8.0)
    assert (chosen.score_threshold, chosen.max_detections) == (0.05, 100)
    many = name == "coco_3x"
    assert chosen.min_size == (tuple(range(480, 801, 32)) if many else (800,))
    assert (chosen.augment.horizontal_flip, chosen.augment.crop) == (0.5, 0.5 if many else 0.0)
    assert (chosen.augment.crop_resize, chosen.augment.crop_sides) == ((400, 500, 600), (384, 600))


@pytest.mark.parametrize(
    ("recipe", "decayed"),
    [("ade20k", {"0.weight", "0.bias"}), ("coco_1x", {"0.weight", "0.bias"}), ("small_segmentation", {"0.weight"})],
)
def test_the_optimiser_decays_what_the_recipe_says(recipe, decayed):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer_of(model, resolve(recipe=recipe)).param_groups
    assert {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]} == decayed


def test_a_config_that_names_its_task_alone_takes_that_tasks_small_recipe():
    config = resolve({"task": "segmentation", "data": {"source": "street"}})
    assert config.segmentation == resolve(recipe="small_segmentation").segmentation
    with pytest.raises(ValueError, match="augment is a section of classification, and this is segmentation"):
        resolve({"task": "segmentation"}, recipe="photos")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": None}, "of schedule.epochs and schedule.iterations one must be a number and the other null"),
        ({"iterations": 10}, "of schedule.epochs and schedule.iterations"),
        ({"warmup_iterations": 10}, "of schedule.warmup_epochs and schedule.warmup_iterations"),
        ({"epochs": None, "iterations": 10}, "warms up over schedule.warmup_iterations"),
        ({"validate_every": 5}, "validate_every counts iterations"),
        ({"shape": "steps"}, "drops and schedule.shape=steps go together"),
        ({"drops": [3]}, "drops and schedule.shape=steps go together"),
        ({"drops": [3, 2], "shape": "steps"}, "must be positive and rise"),
        ({"shape": "linear"}, "schedule.shape must be one of 'cosine', 'poly', 'steps'"),
        ({"power": 0}, "schedule.power must be positive"),
    ],
)
def test_schedules_that_contradict_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve({"schedule": changes}, recipe="photos")


def test_iterations_and_drops_count_steps():
    schedule = {"epochs": None, "iterations": 100, "validate_every": 20, "warmup_epochs": None, "warmup_iterations": 10}
    config = resolve({"schedule": schedule | {"shape": "steps", "drops": [60, 80]}})
    assert (config.schedule.rounds, config.schedule.steps_per_round) == (5, 20)
    planned = Schedule(config, 20)
    assert (planned.steps, planned.warmup, planned.drops) == (100, 10, (60, 80))
    assert [planned.factor(step) for step in (10, 59, 60, 80)] == pytest.approx([1, 1, 0.1, 0.01])
    epochs = {"epochs": 5, "warmup_epochs": None, "warmup_iterations": 10, "shape": "steps", "drops": [3, 4]}
    planned = Schedule(resolve({"schedule": epochs}), 20)
    assert (planned.steps, planned.warmup, planned.drops) == (100, 10, (60, 80))


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
    assert (small.loss.mixup, small.loss.cutmix) == (imagenet.loss.mixup, imagenet.loss.cutmix)
    assert (small.loss.mix_prob, small.optim.name) == (0.5, "nmuon")
    assert small.learning_rate == pytest.approx(3e-3)
    assert (small.run.ema_decay, small.schedule.epochs, small.data.batch_size) == (0.999, 100, 128)
    assert finetune.optim.layer_decay == 0.8
    assert finetune.model.weights == "pretrained"
    assert finetune.learning_rate < imagenet.learning_rate / 5
