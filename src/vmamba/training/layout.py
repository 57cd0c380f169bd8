"""What timm's models look like from outside."""

from __future__ import annotations

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model that keeps them in lists called ``blocks``, as ours and most of timm's do.

    Empty for a model with another layout.
    """
    found = []
    for name, module in model.named_modules():
        parent, _, index = name.rpartition(".")
        if parent.rpartition(".")[2] == "blocks" and index.isdigit():
            found.append(module)
    return found
