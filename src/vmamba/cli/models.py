"""The variants of this package: size, depths and widths, and published ImageNet-1K accuracy."""

from __future__ import annotations

import argparse

NAME = "models"
HELP = "list the model variants"
EXAMPLES = """examples:
  vmamba models
  vmamba models --url

Every command takes any other timm model as well, to compare with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", action="store_true", help="also print where the released weights are")


def run(options: argparse.Namespace) -> None:
    import timm

    from ..models import list_models

    print(f"{'model':<22} {'parameters':>11}  {'depths':<10} {'dims':<18} {'top-1 %':>8}")
    for name in list_models():
        model = timm.create_model(name, device="meta")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        depths = ",".join(map(str, model.config.depths))
        dims = ",".join(str(stage["num_chs"]) for stage in model.feature_info)
        print(f"{name:<22} {parameters:>11,}  {depths:<10} {dims:<18} {_published_top1(model.pretrained_cfg):>8}")
        if options.url and model.pretrained_cfg.get("url"):
            print(f"    {model.pretrained_cfg['url']}")
    print("\ntop-1: ImageNet-1K, 224 px, as published for the released weights; -: none released")


def _published_top1(pretrained_cfg: dict) -> str:
    prefix = "imagenet1k top1 "
    notes = pretrained_cfg.get("notes") or ()
    return next((note.removeprefix(prefix) for note in notes if note.startswith(prefix)), "-")
