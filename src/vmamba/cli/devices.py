"""The option --device, which means the same in all commands."""

from __future__ import annotations

import argparse


def add_device_argument(parser: argparse._ActionsContainer, *, mps: bool = True, default: str | None = "auto") -> None:
    """`--device`. Without `mps` the command measures, which it cannot there; `default` None leaves it to a config."""
    kinds = ("cpu", "cuda", "mps") if mps else ("cpu", "cuda")
    best = "CUDA where there is one, else MPS, else the CPU" if mps else "CUDA where there is one, else the CPU"
    parser.add_argument("--device", default=default, help=f"auto (the default: {best}), {', '.join(kinds)}")
