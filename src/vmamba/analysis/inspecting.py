"""Looking into a network from outside: layers by name, evaluation mode for a while, the output of one layer."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["evaluating", "feature_layer", "find_layer", "output_of"]

NEAR_NAMES = 5  # listed when a layer is not found


class _Reached(Exception):
    """Stops a forward pass at the layer that was asked for."""


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, as in `model.named_modules()`.

    Raises:
        ValueError: there is none; lists the nearest names.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        raise ValueError(f"the model has no layer {name!r}; {near_names(name, [n for n in modules if n])}")
    return modules[name]


def near_names(name: str, names: list[str]) -> str:
    """What to say of a name that is none of `names`."""
    near = difflib.get_close_matches(name, names, n=NEAR_NAMES, cutoff=0.4)
    return f"near names: {', '.join(near)}" if near else f"its layers are {', '.join(names[: 2 * NEAR_NAMES])} ..."


def feature_layer(model: nn.Module, index: int = -1) -> str:
    """The name of the module that gives feature `index` of a timm model, such as its last stage.

    Raises:
        ValueError: the model does not say what its features are, or has no such feature.
    """
    features = getattr(model, "feature_info", None) or []
    names = [feature["module"] for feature in features]
    if not names:
        raise ValueError(
            f"{type(model).__name__} does not say which layers give its features: name one, as in model.named_modules()"
        )
    if not -len(names) <= index < len(names):
        raise ValueError(f"the model has features 0 to {len(names) - 1}, not {index}: {', '.join(names)}")
    return names[index]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module is put back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def output_of(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What layer `name` gives for these images. What comes after the layer is not run; the hook is removed.

    Raises:
        ValueError: there is no such layer, the images do not pass through it, it gives no single tensor, or the model
            does not take images of that size.
    """
    found: list[object] = []

    def keep(module, inputs, output):
        found.append(output)
        raise _Reached

    handle = find_layer(model, name).register_forward_hook(keep)
    try:
        model(images)
    except _Reached:
        pass
    except AssertionError as error:  # timm's way to refuse a size
        height, width = images.shape[2:]
        raise ValueError(f"the model does not take images of {height} x {width} px: {error}") from error
    finally:
        handle.remove()
    if not found:
        raise ValueError(f"no image passes through the layer {name!r}: take one that the forward pass calls")
    if not isinstance(found[0], Tensor):
        raise ValueError(f"the layer {name!r} gives a {type(found[0]).__name__}, not a tensor: take a layer inside it")
    return found[0]
