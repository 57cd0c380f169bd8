"""Rewrite a checkpoint: official .pth to our names (safetensors), or back. Exact both ways."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "convert"
HELP = "convert checkpoints, official <-> ours"
EXAMPLES = """examples:
  vmamba convert vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba_tiny_s1l8.safetensors
  vmamba convert vmamba_tiny_s1l8.safetensors for_the_official_code.pth --to official
  vmamba convert runs/digits-vmamba_nano/checkpoints/best.ckpt digits.safetensors

The ending of OUT chooses the format: .safetensors, or a file of torch.save."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="checkpoint with official names or ours")
    parser.add_argument("target", metavar="OUT", help="file to write")
    parser.add_argument("--to", choices=("ours", "official"), default="ours", help="names to write (default ours)")
    parser.add_argument("--key", help='entry of IN that holds the weights, such as "model_ema"')
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(options: argparse.Namespace) -> None:
    from ..models import convert

    target = Path(options.target)
    if target.exists() and not options.overwrite:
        raise FileExistsError(f"{target} exists already: choose another name or add --overwrite")
    convert(options.source, target, official=options.to == "official", key=options.key)
    print(f"wrote {target} ({'our' if options.to == 'ours' else 'official'} names)")
