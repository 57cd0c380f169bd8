"""Weights in and out of files: official `.pth`, ours, safetensors. All or nothing, and never half a file."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .._files import write_aside
from . import detector_keymap, keymap, upernet_keymap
from .vmamba import FeatureGetter, resize_pos_embed

__all__ = ["checkpoint_filter_fn", "convert", "load_checkpoint", "read_checkpoint", "save_checkpoint"]

# Where training scripts nest the weights. Released official files keep theirs under "model", EMA weights included.
_NESTING = ("model", "state_dict")
_LISTED = 8  # names shown of a long list
_KEYMAPS = (detector_keymap, upernet_keymap, keymap)  # the first that knows the names translates them
_CLASSIFIERS = (
    "head.",
    "decode_head.classifier.",
    "auxiliary_head.classifier.",
    "roi_heads.box_predictor.",
    "roi_heads.mask_predictor.mask_fcn_logits.",
)
_BACKBONES = (
    "",
    "backbone.",
    "backbone.body.",
)  # where a network's own names start: alone, in a UPerNet, in a detector
_OUT_NORMS = tuple(f"{backbone}out_norms." for backbone in _BACKBONES)
_INPUT_CONVS = tuple(f"{backbone}stem.{conv}.weight" for backbone in _BACKBONES for conv in ("conv", "conv1"))


class _Ignored:
    """Stands for an object beside the weights that nobody reads: takes what it is made of, keeps and runs nothing."""

    def __init__(self, *contents: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What training scripts pickle beside the weights, and the harmless class to read it as: the settings of the official
# classification code are a dict; mmengine's logged numbers (segmentation and detection) are objects around NumPy
# arrays, with methods that they look up by getattr.
_BYSTANDERS: list[tuple[Any, str]] = [
    (OrderedDict, "yacs.config.CfgNode"),
    *(
        (_Ignored, name)
        for name in (
            "mmengine.logging.history_buffer.HistoryBuffer",
            "builtins.getattr",
            "numpy.ndarray",
            "numpy.dtype",
            *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        )
    ),
]


def read_checkpoint(path: str | os.PathLike, *, key: str | None = None) -> dict[str, Tensor]:
    """The weights of a file under our names, on the CPU.

    Args:
        path: `.safetensors`, or anything else for a file of `torch.save`; official or our names; flat or nested.
        key: the entry that holds the weights; by default "model", then "state_dict", then the file itself.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, truncated, no checkpoint, of another network, refused because reading it could run
            code, or holds NaN or Inf. Names the file and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: fetch or save it again")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = _unwrap(content, path, key)
    try:
        state = _to_our_names(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{path} holds NaN or Inf in {_listed(bad)}: take an earlier checkpoint of that run")
    return state


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    key: str | None = None,
    new_head: bool = False,
    adapt_input: bool = False,
    new_out_norms: bool = False,
) -> None:
    """Load a file's weights into a VMamba, a backbone, a UPerNet or a detector: all of them, or none and an error.

    A position embedding for another image size is resized (bicubic).

    Args:
        model: a `VMamba`, `FeatureGetter`, `UPerNet` or `MaskRCNN`.
        path, key: as in `read_checkpoint`.
        new_head: where the classifier differs from the file's (another number of classes, none here, none there), keep
            the model's own.
        adapt_input: where the number of image channels differs from the file's 3, spread its first convolution over
            the model's channels, as timm does.
        new_out_norms: keep a backbone's own output norms where the file has none.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`.
        ValueError: if the file does not fit the model, listing names and shapes. The model is unchanged then.
    """
    loaded = read_checkpoint(path, key=key)
    load_state(model, loaded, path, new_head=new_head, adapt_input=adapt_input, new_out_norms=new_out_norms)


def load_state(
    model: nn.Module,
    loaded: dict[str, Tensor],
    path: str | os.PathLike,
    *,
    new_head: bool = False,
    adapt_input: bool = False,
    new_out_norms: bool = False,
) -> None:
    """`load_checkpoint` for what `read_checkpoint` has read of `path`."""
    own = file_state(model)
    loaded = _fit_pos_embed(loaded, own)
    if new_head:
        loaded = _keep_own(loaded, own, _CLASSIFIERS)
    if new_out_norms:
        loaded = _keep_own(loaded, own, _OUT_NORMS)
    if adapt_input:
        loaded = _fit_input(loaded, own, path)
    if problems := _mismatches(loaded, own):
        raise ValueError(f"{path} does not fit the model:\n  " + "\n  ".join(problems))
    model.load_state_dict({name: loaded[in_file] for name, in_file in zip(model.state_dict(), own, strict=True)})


def save_checkpoint(
    model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike, *, official: bool = False
) -> None:
    """Write a model's weights (or a state dict in our names): `.safetensors`, else a file of `torch.save`.

    The file appears under its name whole or not at all: what was there before stays until the new one is written.

    Args:
        official: write the official names, nested under "model" in a file of `torch.save`, as the official code reads.

    Raises:
        ValueError: for a name that has no official counterpart.
        OSError: if it cannot be written, naming the file.
    """
    if isinstance(model, nn.Module):
        state = file_state(model)
    else:
        state = dict(model)
    if official:
        state = next((names for names in _KEYMAPS if names.is_ours(state)), keymap).state_to_official(state)
    # contiguous and apart: safetensors refuses views of one storage
    state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    if Path(path).suffix == ".safetensors":
        _write(path, lambda file: safetensors.torch.save_file(state, file, metadata={"format": "pt"}))
    else:
        _write(path, lambda file: torch.save({"model": state} if official else state, file))


def convert(
    source: str | os.PathLike, target: str | os.PathLike, *, official: bool = False, key: str | None = None
) -> None:
    """Rewrite a checkpoint: official `.pth` to our safetensors, say, or back with `official=True`. Exact both ways.

    Args:
        source, key: as in `read_checkpoint`. target, official: as in `save_checkpoint`.
    """
    save_checkpoint(read_checkpoint(source, key=key), target, official=official)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """For timm's own loading: unwraps, maps official names, resizes the position embedding. Strictness is timm's."""
    state = _to_our_names(_unwrap(state_dict, "the checkpoint", None))
    return _fit_pos_embed(state, file_state(model))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): fetch or save it again") from error


def _read_torch(path: Path) -> Any:
    try:
        # reading the bystanders as harmless classes needs neither their packages nor their code
        with torch.serialization.safe_globals(_BYSTANDERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes raise nearly anything
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} pickles {refused[1]}, and reading that could run code. If you trust the file, read it under "
                f"`torch.serialization.safe_globals([...])` with that class, or save its weights alone where the class "
                f"exists: torch.save(torch.load(path, weights_only=False)['model'], new_path)"
            ) from error
        raise ValueError(
            f"{path} is truncated or no checkpoint of torch.save ({type(error).__name__}): fetch or save it again"
        ) from error


def _unwrap(content: Any, where: str | Path, key: str | None) -> dict[str, Tensor]:
    """The flat state dict inside what a file held."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} holds a {type(content).__name__}, not a state dict: save model.state_dict()")
    if key is not None:
        if not isinstance(content.get(key), Mapping):
            raise ValueError(f"{where} has no state dict under {key!r}: its entries are {_listed(map(str, content))}")
        content = content[key]
    else:
        content = next((content[nest] for nest in _NESTING if isinstance(content.get(nest), Mapping)), content)
    names = list(content)
    if not names or not all(isinstance(name, str) and isinstance(content[name], Tensor) for name in names):
        raise ValueError(f"{where} holds no state dict of tensors: its entries are {_listed(map(str, names))}")
    if all(name.startswith("module.") for name in names):  # saved from DistributedDataParallel
        return {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return dict(content)


def _to_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for names in _KEYMAPS:
        if names.is_official(state):
            return names.state_to_ours(state)
        if names.is_ours(state):
            return state
    raise ValueError(f"these are no weights of a VMamba, a UPerNet or a detector: {_listed(state)}")


def file_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's state, in its order, under the names that files have: without the wrapper around a backbone.

    ``state`` is one under the model's own names, in the place of its present one.
    """
    state = model.state_dict() if state is None else dict(state)
    for name, module in model.named_modules():
        if isinstance(module, FeatureGetter):
            path = f"{name}." if name else ""
            wrapped = f"{path}model."
            state = {path + n.removeprefix(wrapped) if n.startswith(wrapped) else n: t for n, t in state.items()}
    return state


def _fit_pos_embed(loaded: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name in (f"{backbone}pos_embed" for backbone in _BACKBONES):
        theirs, ours = loaded.get(name), own.get(name)
        if theirs is not None and ours is not None and theirs.ndim == 4 and theirs.shape[:2] == ours.shape[:2]:
            return loaded | {name: resize_pos_embed(theirs, ours.shape[2:])}
    return loaded


def _fit_input(loaded: dict[str, Tensor], own: Mapping[str, Tensor], path: str | os.PathLike) -> dict[str, Tensor]:
    for name in _INPUT_CONVS:
        if name in loaded and name in own and loaded[name].shape[1] != own[name].shape[1]:
            if loaded[name].shape[1] != 3:
                raise ValueError(f"{path} is for {loaded[name].shape[1]} image channels: only 3 can be adapted")
            return loaded | {name: adapt_input_conv(own[name].shape[1], loaded[name])}
    return loaded


def _keep_own(loaded: dict[str, Tensor], own: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The loaded state with the model's own tensors under `prefixes` wherever the loaded ones do not fit."""
    kept = {name: t for name, t in loaded.items() if not name.startswith(prefixes) or name in own}
    for name, tensor in own.items():
        if name.startswith(prefixes) and (name not in kept or kept[name].shape != tensor.shape):
            kept[name] = tensor
    return kept


def _mismatches(loaded: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    missing = sorted(set(own) - set(loaded))
    unexpected = sorted(set(loaded) - set(own))
    reshaped = sorted(n for n in set(own) & set(loaded) if own[n].shape != loaded[n].shape)
    problems = []
    if missing:
        problems.append(f"missing in the file: {_listed(missing)}")
    if unexpected:
        problems.append(f"unknown to the model: {_listed(unexpected)}")
    if reshaped:
        shapes = [f"{n} {tuple(loaded[n].shape)} in the file, {tuple(own[n].shape)} in the model" for n in reshaped]
        problems.append(f"other shapes: {_listed(shapes)}")
    concerned = [*missing, *unexpected, *reshaped]
    if any(name.startswith(_CLASSIFIERS) for name in concerned):
        problems.append("to keep the model's own classifier, pass new_head=True")
    if any(name.startswith(_OUT_NORMS) for name in missing):
        problems.append("to keep the backbone's own output norms, pass new_out_norms=True")
    if any(name in _INPUT_CONVS for name in reshaped):
        problems.append("for another number of image channels, pass adapt_input=True")
    return problems


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _write(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """`write_aside` for writers that report a full disk as safetensors does, in an error of its own."""

    def write_or_oserror(aside: Path) -> None:
        try:
            write(aside)
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error

    write_aside(path, write_or_oserror)
