"""The building blocks of VMamba as modules, channels-last (B, H, W, C) from the stem to the head."""

from .act import ACTIVATIONS
from .block import VSSBlock, make_mlp
from .downsample import DOWNSAMPLES
from .head import ClassifierHead
from .init import SSM_INITS, init_ssm_
from .norm import SSM_OUT_NORMS
from .ss2d import SS2D
from .stem import STEMS, STRIDES

__all__ = [
    "ACTIVATIONS",
    "DOWNSAMPLES",
    "SS2D",
    "SSM_INITS",
    "SSM_OUT_NORMS",
    "STEMS",
    "STRIDES",
    "ClassifierHead",
    "VSSBlock",
    "init_ssm_",
    "make_mlp",
]
