"""The configuration: what it accepts, what it refuses, and that it says so."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vmamba import VMamba, VMambaConfig


def test_one_width_doubles_from_stage_to_stage() -> None:
    assert VMambaConfig(dims=24).dims == (24, 48, 96, 192)
    assert VMambaConfig(dims=[8, 8, 16, 20]).dims == (8, 8, 16, 20)


def test_dictionary_round_trip_through_json() -> None:
    config = VMambaConfig(depths=(1, 2, 3, 4), dims=8, img_size=(64, 96), ssm_gate=True)
    assert VMambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VMambaConfig().d_state = 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depths", ()),
        ("depths", (2, 0, 2, 2)),
        ("depths", "2222"),
        ("dims", (8, 16)),
        ("dims", 0),
        ("dims", 7),
        ("d_state", 0),
        ("d_state", 1.5),
        ("dt_rank", "big"),
        ("dt_rank", 0),
        ("ssm_ratio", 0),
        ("ssm_ratio", "2"),
        ("ssm_conv", 4),
        ("ssm_conv", 1),
        ("ssm_conv", -1),
        ("ssm_conv_bias", 1),
        ("ssm_act", "swish"),
        ("ssm_out_norm", "batchnorm"),
        ("routes", "spiral"),
        ("ssm_init", "v0"),
        ("mlp_ratio", -1.0),
        ("mlp_act", None),
        ("stem", "v3"),
        ("patch_size", 3),
        ("patch_size", True),
        ("downsample", "v4"),
        ("img_size", 16),
        ("img_size", (64, 64, 3)),
        ("drop_path_rate", 1.0),
        ("drop_path_rate", -0.1),
        ("pos_embed", "yes"),
    ],
)
def test_refused_values_are_named(field, value) -> None:
    with pytest.raises(ValueError, match=field):
        VMambaConfig(**{field: value})


def test_position_embedding_needs_whole_patches() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        VMambaConfig(pos_embed=True, img_size=34)
    assert VMambaConfig(pos_embed=True, img_size=34, patch_size=2).img_size == (34, 34)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_the_last_grid_has_a_pixel(patch_size) -> None:
    VMambaConfig(img_size=8 * patch_size, patch_size=patch_size)
    with pytest.raises(ValueError, match=f"img_size.*at least {8 * patch_size} pixels"):
        VMambaConfig(img_size=8 * patch_size - 1, patch_size=patch_size)


def test_unknown_fields_are_listed_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown configuration drop_path.*drop_path_rate"):
        VMamba(drop_path=0.1)


@pytest.mark.parametrize(
    "options", [{"in_chans": 0}, {"num_classes": -1}, {"global_pool": "max"}, {"output_stride": 16}]
)
def test_network_refuses_options(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        VMamba(dims=8, depths=(1, 1, 1, 1), device="meta", **options)
