"""The paper's ablations as configuration: what each changes, and its published accuracy where there is one.

Source: VMamba (arXiv 2401.10166v4), the tables of ablations; names and fields as in the official code's folder
classification/configs/vssmab (https://github.com/MzeroMiko/VMamba). Their weights were not released.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import timm
from torch import nn

from . import variants as _registers_our_names  # noqa: F401

__all__ = ["ABLATIONS", "Ablation", "create_ablation"]


class Ablation(NamedTuple):
    """One line of an ablation.

    group: the question that it answers. base: the named model that it changes. changes: fields of `VMambaConfig`; none
    for the base itself. top1: ImageNet-1K at 224 px, percent, as published, or None.
    """

    group: str
    base: str
    changes: Mapping[str, Any]
    top1: float | None


def _lines(group: str, base: str, lines: Mapping[str, tuple[float | None, dict[str, Any]]]) -> dict[str, Ablation]:
    return {name: Ablation(group, base, MappingProxyType(changes), top1) for name, (top1, changes) in lines.items()}


_T = "vmamba_tiny_s1l8"

ABLATIONS: Mapping[str, Ablation] = MappingProxyType(
    {
        **_lines(
            "scan pattern",
            _T,
            {
                "cross2d": (82.60, {}),
                "unidi": (82.26, {"routes": "unidi"}),
                "bidi": (82.49, {"routes": "bidi"}),
                "cas2d": (82.42, {"routes": "cascade2d"}),
            },
        ),
        **_lines(
            "scan pattern, no convolution",
            _T,
            {
                "unidi_ndw": (None, {"routes": "unidi", "ssm_conv": 0}),
                "bidi_ndw": (None, {"routes": "bidi", "ssm_conv": 0}),
                "cas2d_ndw": (None, {"routes": "cascade2d", "ssm_conv": 0}),
            },
        ),
        **_lines(
            "initialisation",
            _T,
            {
                "init0": (82.60, {}),
                "init1": (82.58, {"ssm_init": "rand"}),
                "init2": (82.67, {"ssm_init": "zero"}),
            },
        ),
        **_lines(
            "state size",
            "vmamba_tiny_s2l5",
            {
                "ds1": (82.49, {}),
                "ds2": (82.50, {"d_state": 2}),
                "ds4": (82.51, {"d_state": 4}),
                # narrower, so that the cost stays about the same
                "ds8": (82.69, {"d_state": 8, "ssm_ratio": 1.5}),
                "ds16": (82.31, {"d_state": 16, "ssm_ratio": 1.0}),
            },
        ),
        **_lines(
            "output norm",
            _T,
            {
                "onlayernorm": (82.60, {}),
                "onnone": (None, {"ssm_out_norm": "none"}),
                "ondwconv3": (None, {"ssm_out_norm": "dwconv3"}),
                "oncnorm": (None, {"ssm_out_norm": "cnorm"}),
                "onsoftmax": (None, {"ssm_out_norm": "softmax"}),
                "onsigmoid": (None, {"ssm_out_norm": "sigmoid"}),
            },
        ),
        **_lines(
            "activation",
            _T,
            {
                "silu": (82.60, {}),
                "gelu": (None, {"ssm_act": "gelu"}),
                "relu": (None, {"ssm_act": "relu"}),
            },
        ),
        **_lines(
            "convolution",
            _T,
            {
                "dw": (82.60, {}),
                "ndw": (None, {"ssm_conv": 0}),
                "posndw": (None, {"ssm_conv": 0, "pos_embed": True}),
            },
        ),
        **_lines(
            "ratios",
            _T,
            {
                "m4s1": (82.60, {}),
                "m3s1h": (None, {"mlp_ratio": 3.0, "ssm_ratio": 1.5}),
                "m2s2h": (None, {"mlp_ratio": 2.0, "ssm_ratio": 2.5}),
                "sr1l5": (None, {"depths": (2, 2, 5, 2)}),
                "sr1hl5": (None, {"depths": (2, 2, 5, 2), "ssm_ratio": 1.5}),
            },
        ),
    }
)


def create_ablation(name: str, **options: Any) -> nn.Module:
    """The network of one ablation, with random weights; `options` go to `timm.create_model`.

    Raises:
        ValueError: for a name that is none of `ABLATIONS`.
    """
    if name not in ABLATIONS:
        close = difflib.get_close_matches(name, ABLATIONS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(ABLATIONS)}"
        raise ValueError(f"there is no ablation {name!r}; {hint}")
    ablation = ABLATIONS[name]
    return timm.create_model(ablation.base, **ablation.changes, **options)
