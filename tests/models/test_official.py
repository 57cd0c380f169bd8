"""Official constructor arguments and YAML configurations, translated."""

from __future__ import annotations

import pytest
import timm
import yaml

from vmamba import from_official
from vmamba.models.keymap import state_to_official

SMALL = {"depths": [1, 1, 1, 1], "dims": 16, "norm_layer": "ln2d", "forward_type": "v05_noz"}


def _config(**arguments):
    return from_official(SMALL | arguments).config


@pytest.mark.parametrize(
    ("forward_type", "fields"),
    [
        ("v05", {"ssm_gate": True, "ssm_gate_act": True, "ssm_out_norm": "layernorm", "routes": "cross2d"}),
        ("v01", {"ssm_gate": True}),
        ("v02_no32", {"ssm_gate": True}),
        ("v03_noz", {"ssm_gate": False}),
        ("v04_nozact", {"ssm_gate": True, "ssm_gate_act": False}),
        ("v05_onnone_noz", {"ssm_out_norm": "none", "ssm_gate": False}),
        ("v05_ondwconv3_noz", {"ssm_out_norm": "dwconv3"}),
        ("v05_oncnorm", {"ssm_out_norm": "cnorm"}),
        ("v05_onsoftmax_noz", {"ssm_out_norm": "softmax"}),
        ("v05_onsigmoid_noz_oact", {"ssm_out_norm": "sigmoid", "ssm_out_act": True, "ssm_gate": False}),
        ("v05_oact", {"ssm_out_act": True, "ssm_gate": True}),
        ("v051d_noz", {"routes": "unidi"}),
        ("v052d_noz", {"routes": "bidi"}),
        ("v052dc_noz", {"routes": "cascade2d"}),
        ("v3", {"routes": "cross2d"}),
    ],
)
def test_forward_types_become_fields(forward_type, fields) -> None:
    config = _config(forward_type=forward_type)
    assert {name: getattr(config, name) for name in fields} == fields


def test_v0_is_gated_with_convolution_whatever_its_arguments_say() -> None:
    arguments = {"norm_layer": "ln", "ssm_conv": -1, "ssm_conv_bias": False, "ssm_init": "v2", "ssm_act_layer": "gelu"}
    for forward_type in ("v0", "v0seq"):
        config = _config(forward_type=forward_type, **arguments)
        assert config.ssm_gate
        assert config.ssm_conv == 3
        assert config.ssm_conv_bias
        assert config.ssm_init == "mamba"
        assert config.ssm_act == "silu"


def test_other_arguments() -> None:
    arguments = {
        "ssm_conv": -1,
        "ssm_init": "v1",
        "mlp_ratio": -1.0,
        "gmlp": True,
        "posembed": True,
        "imgsize": 64,
        "downsample_version": "v1",
        "ssm_dt_rank": 3,
        "drop_path_rate": 0.25,
    }
    config = _config(**arguments)
    assert config.ssm_conv == 0
    assert config.ssm_init == "rand"
    assert config.mlp_ratio == 0
    assert config.gated_mlp
    assert config.pos_embed
    assert config.img_size == (64, 64)
    assert config.downsample == "v1"
    assert config.dt_rank == 3
    assert config.drop_path_rate == 0.25
    assert from_official(SMALL | {"use_checkpoint": True, "in_chans": 1}).stages[0].grad_checkpointing


def test_what_is_left_out_takes_the_official_default() -> None:
    config = from_official({"dims": 16}).config
    assert config.depths == (2, 2, 9, 2)
    assert config.d_state == 16
    assert config.ssm_ratio == 2.0
    assert config.ssm_gate
    assert (config.stem, config.downsample) == ("v1", "v2")
    assert config.drop_path_rate == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward_type": "m0_noz"}, "m0_noz"),
        ({"forward_type": "xv1a"}, "xv1a"),
        ({"forward_type": "v05_noz_onnone"}, "v05_noz_onnone"),
        ({"forward_type": "v0_noz"}, "v0_noz"),
        ({"forward_type": "v06"}, "v06"),
        ({"forward_type": "v0"}, "ln2d"),
        ({"norm_layer": "bn"}, "bn"),
        ({"patch_size": 2}, "patch_size=2"),
        ({"patch_norm": False}, "patch_norm=False"),
        ({"ssm_drop_rate": 0.1}, r"ssm_drop_rate=0\.1"),
        ({"mlp_drop_rate": 0.1}, r"mlp_drop_rate=0\.1"),
        ({"ssm_init": "v3"}, "ssm_init"),
        ({"ssm_act_layer": "mish"}, "mish"),
        ({"downsample_version": "v4"}, "v4"),
        ({"ssm_rank": 3, "window": 7}, "no official argument ssm_rank, window"),
    ],
)
def test_what_cannot_be_represented_is_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**arguments)


YAML = """
MODEL:
  TYPE: vssm
  NAME: vssm1_tiny_0230s
  DROP_PATH_RATE: 0.2
  VSSM:
    EMBED_DIM: 96
    DEPTHS: [ 2, 2, 8, 2 ]
    SSM_D_STATE: 1
    SSM_DT_RANK: "auto"
    SSM_RATIO: 1.0
    SSM_CONV: 3
    SSM_CONV_BIAS: false
    SSM_FORWARDTYPE: "v05_noz"
    MLP_RATIO: 4.0
    DOWNSAMPLE: "v3"
    PATCHEMBED: "v2"
    NORM_LAYER: "ln2d"
"""


def test_yaml_of_a_released_model(tmp_path) -> None:
    (tmp_path / "tiny.yaml").write_text(YAML)
    model = from_official(tmp_path / "tiny.yaml")
    released = timm.create_model("vmamba_tiny_s1l8", device="meta")
    assert model.config == released.config
    assert state_to_official(model.state_dict()).keys() == state_to_official(released.state_dict()).keys()


def test_yaml_sections_around_the_model() -> None:
    content = yaml.safe_load(YAML)
    content["MODEL"]["VSSM"] |= {"DEPTHS": [1, 1, 1, 1], "EMBED_DIM": 8, "POSEMBED": True, "SSM_RANK_RATIO": 2.0}
    content["MODEL"]["NUM_CLASSES"] = 7
    content |= {"DATA": {"IMG_SIZE": 64}, "TRAIN": {"USE_CHECKPOINT": True}, "BASE": [""]}
    model = from_official(content)
    assert model.num_classes == 7
    assert model.pos_embed.shape[2:] == (16, 16)
    assert model.stages[0].grad_checkpointing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {TYPE: swin}", "swin"),
        ("MODEL: {VSSM: {EMBED: 96}}", "EMBED"),
        ("BASE: [other.yaml]\nMODEL: {TYPE: vssm}", "other.yaml"),
        ("TRAIN: {}", "no MODEL section"),
        ("[1, 2", "no YAML"),
        ("", "no MODEL section"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_official(tmp_path / "bad.yaml")


def test_missing_yaml(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        from_official(str(tmp_path / "none.yaml"))
