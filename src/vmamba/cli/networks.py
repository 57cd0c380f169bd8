"""Networks that users name on the command line to have them looked into."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .devices import add_device_argument
from .tables import check_folder

if TYPE_CHECKING:
    from torch import nn

    from ..data import Preprocessing

MODEL_HELP = (
    "run directory or checkpoint of a classifier, NAME=FILE for a file of bare weights, or the name of any timm model, "
    "with fresh weights"
)


class Network(NamedTuple):
    """A network on the CPU, in evaluation mode.

    state: of its weights, "trained", "released" or "untrained". untrained: makes the same network with fresh weights.
    """

    name: str
    state: str
    model: nn.Module
    preprocessing: Preprocessing
    untrained: Callable[[], nn.Module]


def add_network_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pretrained", action="store_true", help="models given by name get their released weights")
    parser.add_argument("--seed", type=int, default=0, help="of fresh weights (default 0)")
    add_device_argument(parser)


def open_network(named: str, options: argparse.Namespace, size: int | None = None) -> Network:
    """The network that `named` stands for, see `MODEL_HELP`; by name, for images of `size` px where that is fixed.

    Raises:
        FileNotFoundError, ValueError: there is no such run, file or model, they do not fit together, or the run is of
            another task than classification.
    """
    import timm
    import torch

    from ..training import load_trained, make_model
    from ..training.checkpoints import expected_preprocessing

    def fresh(name: str, **kwargs) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(options.seed)
            return make_model(name, **kwargs).eval()

    name, _, file = named.rpartition("=")
    if Path(named).exists() or (name and Path(file).exists()):
        given = (named, None) if Path(named).exists() else (file, name)
        model, about = load_trained(*given, task="classification")
        return Network(
            about.model, "trained", model, about.preprocessing, lambda: fresh(about.model, **about.model_kwargs)
        )
    if name or Path(named).suffix or "/" in named:
        raise FileNotFoundError(f"no such run or checkpoint: {file or named}")
    expected = timm.get_pretrained_cfg(named) if timm.is_model(named) else None
    fixed = expected is not None and expected.fixed_input_size and size not in (None, expected.input_size[-1])
    kwargs = {"img_size": size} if fixed else {}
    model = fresh(named, pretrained=options.pretrained, **kwargs)
    state = "released" if options.pretrained else "untrained"
    return Network(named, state, model, expected_preprocessing(model), lambda: fresh(named, **kwargs))


def check_drawing(out: str) -> None:
    """Find out before minutes of computing whether figures can be drawn and where they can be written.

    Raises:
        ModuleNotFoundError: matplotlib is missing. OSError: nothing can be written into `out`.
    """
    from .._extras import require

    require("matplotlib.figure", "train")
    check_folder(out)
