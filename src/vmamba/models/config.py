"""What a VMamba is, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from vmamba.layers import ACTIVATIONS, DOWNSAMPLES, SSM_INITS, SSM_OUT_NORMS, STEMS, STRIDES
from vmamba.ops import ROUTES

__all__ = ["VMambaConfig"]

# the last of the four grids is the image at 1/8 of the stem's
MIN_GRID = 8

_CHOICES: dict[str, tuple[str, ...]] = {
    "ssm_act": tuple(ACTIVATIONS),
    "mlp_act": tuple(ACTIVATIONS),
    "ssm_out_norm": tuple(SSM_OUT_NORMS),
    "ssm_init": tuple(SSM_INITS),
    "routes": tuple(dict.fromkeys((*ROUTES, "cascade2d"))),
    "stem": tuple(STEMS),
    "downsample": tuple(DOWNSAMPLES),
}
_FLAGS = ("ssm_conv_bias", "ssm_gate", "ssm_gate_act", "ssm_out_act", "gated_mlp", "post_norm", "pos_embed")


@dataclass(frozen=True)
class VMambaConfig:
    """The architecture; the defaults are VMamba-T[s1l8] (arXiv 2401.10166v4, section 4.3).

    Attributes:
        depths: blocks of each stage.
        dims: C of each stage, or of the first one, doubled from stage to stage.
        d_state: N. dt_rank: R, or "auto" for ceil(C / 16). ssm_ratio: E / C.
        ssm_conv: kernel of the depthwise convolution before the scan, odd, 0 for none. ssm_conv_bias: its bias.
        ssm_act: activation before the scan and of the gate: silu, gelu, relu, sigmoid.
        ssm_gate: multiply the scan's output by a gated branch. ssm_gate_act: activate that branch.
        ssm_out_norm: norm after the scan: layernorm, none, dwconv3, cnorm, softmax, sigmoid.
        ssm_out_act: GELU after that.
        routes: cross2d, unidi, bidi, cascade2d.
        ssm_init: mamba, rand, zero.
        mlp_ratio: hidden channels of the MLP / C, 0 for no MLP. mlp_act: its activation. gated_mlp: a gated one.
        stem: v1 (patches), v2 (two 3x3 convolutions).
        patch_size: the pixels of the image that a pixel of the first stage stands for along each side: 4; 2 or 1 for
            images of some 32 pixels (ours: released models have 4).
        downsample: v1 (patch merging), v2 (2x2 convolution), v3 (3x3 convolution).
        post_norm: norms after the branches of a block instead of before.
        pos_embed: add a learned position embedding after the stem, of the grid of `img_size`.
        img_size: pixels, int or (H, W), at least 8 patches. A recommendation unless there is a position embedding.
        drop_path_rate: of the last block; grows linearly from 0 at the first.

    Raises:
        ValueError or TypeError: for a value that cannot be, naming it and what can.
    """

    depths: tuple[int, ...] = (2, 2, 8, 2)
    dims: tuple[int, ...] | int = 96
    d_state: int = 1
    dt_rank: int | str = "auto"
    ssm_ratio: float = 1.0
    ssm_conv: int = 3
    ssm_conv_bias: bool = False
    ssm_act: str = "silu"
    ssm_gate: bool = False
    ssm_gate_act: bool = True
    ssm_out_norm: str = "layernorm"
    ssm_out_act: bool = False
    routes: str = "cross2d"
    ssm_init: str = "mamba"
    mlp_ratio: float = 4.0
    mlp_act: str = "gelu"
    gated_mlp: bool = False
    stem: str = "v2"
    patch_size: int = 4
    downsample: str = "v3"
    post_norm: bool = False
    pos_embed: bool = False
    img_size: tuple[int, int] | int = 224
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _check(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        for name in _FLAGS:
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        depths = self._positive_integers("depths")
        if _is_integer(self.dims):
            _check(self.dims > 0, "dims", self.dims, "positive")
            dims = tuple(self.dims * 2**i for i in range(len(depths)))
        else:
            dims = self._positive_integers("dims")
            if len(dims) != len(depths):
                raise ValueError(f"dims and depths need one entry a stage each: got dims={dims}, depths={depths}")
        img_size = (self.img_size,) * 2 if _is_integer(self.img_size) else self._positive_integers("img_size")
        patch = self.patch_size
        _check(_is_integer(patch) and patch in STRIDES, "patch_size", patch, f"one of {', '.join(map(str, STRIDES))}")
        fits = len(img_size) == 2 and min(img_size) >= MIN_GRID * patch
        _check(fits, "img_size", self.img_size, f"an integer or (H, W) of at least {MIN_GRID * patch} pixels")
        if self.pos_embed and (img_size[0] % patch or img_size[1] % patch):
            raise ValueError(f"img_size must be a multiple of {patch} for a position embedding, got {self.img_size!r}")
        _check(_is_integer(self.d_state) and self.d_state > 0, "d_state", self.d_state, "a positive integer")
        rank_fits = self.dt_rank == "auto" or (_is_integer(self.dt_rank) and self.dt_rank > 0)
        _check(rank_fits, "dt_rank", self.dt_rank, "'auto' or a positive integer")
        ratio_fits = _is_number(self.ssm_ratio) and int(self.ssm_ratio * min(dims)) >= 1
        _check(ratio_fits, "ssm_ratio", self.ssm_ratio, "a number that leaves at least one channel")
        conv_fits = _is_integer(self.ssm_conv) and (self.ssm_conv == 0 or (self.ssm_conv >= 3 and self.ssm_conv % 2))
        _check(conv_fits, "ssm_conv", self.ssm_conv, "0 for none, or an odd kernel size of at least 3")
        mlp_fits = _is_number(self.mlp_ratio) and (self.mlp_ratio == 0 or int(self.mlp_ratio * min(dims)) >= 1)
        _check(mlp_fits, "mlp_ratio", self.mlp_ratio, "0 for no MLP, or a positive number")
        rate_fits = _is_number(self.drop_path_rate) and 0 <= self.drop_path_rate < 1
        _check(rate_fits, "drop_path_rate", self.drop_path_rate, "in [0, 1)")
        if self.stem == "v2" and dims[0] % 2:
            raise ValueError(f"dims must start with an even number for stem v2, got {dims}")
        object.__setattr__(self, "depths", depths)
        object.__setattr__(self, "dims", dims)
        object.__setattr__(self, "img_size", img_size)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VMambaConfig:
        """The config of these fields.

        Raises:
            ValueError: for a name that is no field, listing the fields.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(f"unknown configuration {', '.join(unknown)}: the fields are {', '.join(fields)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain, JSON-ready values; `from_dict` gives the same config back."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    def _positive_integers(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name)
        fits = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        fits = fits and all(_is_integer(entry) and entry > 0 for entry in value)
        _check(fits, name, value, "a sequence of positive integers")
        return tuple(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check(fits: bool, name: str, value: Any, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
