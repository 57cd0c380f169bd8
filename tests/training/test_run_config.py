"""Configs: from YAML and overrides, every mistake named."""

import pytest

from vmamba.training.config import (
    Config,
    as_dict,
    from_dict,
    parse_overrides,
    read_yaml,
    to_yaml,
)
from vmamba.training.recipes import digits, resolve


def test_presets_follow_the_data():
    assert resolve() == digits()
    photos = resolve({"data": {"source": "flowers"}})
    assert (photos.model.name, photos.data.source, photos.data.image_size) == ("vmamba_micro", "flowers", 224)


def test_later_layers_win():
    config = resolve({"optim": {"lr": 1.0, "name": "sgd"}}, {"optim": {"lr": 2.0}})
    assert (config.optim.lr, config.optim.name) == (2.0, "sgd")
    assert config.data == digits().data


def test_yaml_gives_the_config_back(tmp_path):
    config = resolve(parse_overrides(["optim.betas=[0.9, 0.95]", "model.kwargs={dims: 8}", "model.drop_path=0.1"]))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert from_dict(read_yaml(path)) == config
    assert from_dict(as_dict(Config())) == Config()


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("optim.lr=1e-3", "optim", "lr", 1e-3),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("augment.scale=[0.5, 1]", "augment", "scale", (0.5, 1.0)),
        ("augment.rand_augment=rand-m9-mstd0.5-inc1", "augment", "rand_augment", "rand-m9-mstd0.5-inc1"),
        ("augment.rand_augment=null", "augment", "rand_augment", None),
        ("data.source=2024", "data", "source", "2024"),
        ("model.kwargs.img_size=32", "model", "kwargs", {"img_size": 32}),
    ],
)
def test_overrides(override, section, field, value):
    found = getattr(getattr(resolve(parse_overrides([override])), section), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("optim.lrr=1", ValueError, "unknown config field 'optim.lrr'; did you mean 'optim.lr'"),
        ("optimm.lr=1", ValueError, "unknown config field 'optimm'; did you mean 'optim'"),
        ("data.zzz=1", ValueError, "'data.zzz'; there are: source, image_size"),
        ("optim.lr=fast", TypeError, "optim.lr must be float, not 'fast'"),
        ("schedule.epochs=2.5", TypeError, "schedule.epochs must be int, not 2.5"),
        ("schedule.epochs=true", TypeError, "schedule.epochs must be int, not True"),
        ("augment.scale=[1]", TypeError, "augment.scale must be a list of 2"),
        ("model.kwargs=3", TypeError, "model.kwargs must be a mapping"),
        ("run.device=tpu", ValueError, "run.device must be one of 'auto', 'cpu'"),
        ("data.batch_size=0", ValueError, "data.batch_size must be at least 1, not 0"),
        ("data.image_size=16", ValueError, "data.image_size must be at least 32, not 16"),
        ("optim.lr=0", ValueError, "optim.lr must be positive"),
        ("run.ema_decay=1", ValueError, "run.ema_decay must be in"),
        ("run.threads=0", ValueError, "run.threads must be at least 1"),
        ("schedule.epochs=0", ValueError, "schedule.epochs must be at least 1"),
        ("optim", ValueError, "SECTION.FIELD=VALUE"),
        ("lr=1", ValueError, "SECTION.FIELD=VALUE"),
        ("optim.lr=[", ValueError, "not valid YAML"),
    ],
)
def test_mistakes_are_named(override, error, message):
    with pytest.raises(error, match=message):
        resolve(parse_overrides([override]))


def test_config_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such config file: nowhere\.yaml"):
        read_yaml("nowhere.yaml")
    path = tmp_path / "config.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_yaml(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml(path)
    path.write_text("")
    assert read_yaml(path) == {}
