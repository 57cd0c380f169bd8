"""Effective receptive fields: how much every pixel of the picture moves the centre of a layer's output.

Several models side by side, averaged over images, and with --before also as they are before training."""

from __future__ import annotations

import argparse
import dataclasses
import re

from .networks import MODEL_HELP, add_network_options, check_drawing, open_network

NAME = "erf"
HELP = "draw and measure effective receptive fields of any models, side by side"
EXAMPLES = """examples:
  vmamba erf vmamba_tiny_s1l8 swin_tiny_patch4_window7_224 convnext_tiny --images photos/
  vmamba erf runs/flowers-vmamba_tiny_s1l8 runs/flowers-convnext_tiny --before --images flowers/val/*/ --count 50
  vmamba erf vmamba_tiny_s1l8=vssm1_tiny_0230s_ckpt_epoch_264.pth --layer stages.2.blocks.7 --images photo.jpg

A folder stands for the images directly in it. Writes erf.png, erf.svg, erf.csv, erf.json and erf.npz into --out;
docs/analysis.md says what the figures mean."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--images", nargs="+", required=True, metavar="IMAGE", help="image files or folders of them")
    parser.add_argument(
        "--count", type=int, default=50, metavar="N", help="average over at most N of them (default 50)"
    )
    parser.add_argument(
        "--layer",
        default="-1",
        help="name of a layer, or number of one of the model's features (default -1: the last stage)",
    )
    parser.add_argument("--before", action="store_true", help="also draw the models as they are before training")
    parser.add_argument(
        "--rectified",
        action="store_true",
        help="leave out negative features and gradients, as the figures of RepLKNet and VMamba do",
    )
    parser.add_argument("--image-size", type=int, metavar="PX", help="of all models (default: the first one's)")
    parser.add_argument(
        "--layout", choices=("NCHW", "NHWC", "NLC"), help="of the layer's output, where its shape does not tell"
    )
    parser.add_argument("--out", default="erf", metavar="DIR", help="where to write (default erf/)")
    add_network_options(parser)


def run(options: argparse.Namespace) -> None:
    import torch

    from .._devices import choose_device
    from ..analysis import effective_receptive_field
    from ..analysis.explanation_files import Field, save_receptive_fields
    from ..analysis.inspecting import feature_layer, find_layer
    from ..data import evaluation_transform, list_images, read_image

    if options.count < 1:
        raise ValueError(f"--count must be at least 1, not {options.count}")
    device = choose_device(options.device)
    check_drawing(options.out)
    files = list_images(options.images)
    # evenly spread, so that folders of one class each are all seen
    files = [files[i * len(files) // min(options.count, len(files))] for i in range(min(options.count, len(files)))]
    if twice := [named for named in options.models if options.models.count(named) > 1]:
        raise ValueError(f"{twice[0]} is named twice: its fields would be the same")
    networks = [open_network(named, options, options.image_size) for named in options.models]
    called = [(network.name, network.state) for network in networks]
    # two runs of one model go by what the user calls them
    networks = [
        network._replace(name=named) if called.count((network.name, network.state)) > 1 else network
        for named, network in zip(options.models, networks, strict=True)
    ]
    first = networks[0].preprocessing.at(options.image_size)
    pictures = [read_image(file) for file in files]
    layer = int(options.layer) if re.fullmatch(r"-?\d+", options.layer) else options.layer
    for network in networks:  # a misspelt layer is told before anything is computed
        find_layer(network.model, feature_layer(network.model, layer) if isinstance(layer, int) else layer)

    def field(name: str, state: str, model, normalisation) -> Field:
        # the same crop for all models, normalised for each
        transform = evaluation_transform(dataclasses.replace(first, mean=normalisation.mean, std=normalisation.std))
        batches = (
            torch.stack([transform(picture) for picture in pictures[start : start + 8]])
            for start in range(0, len(pictures), 8)
        )
        found = effective_receptive_field(
            model.to(device), batches, layer, layout=options.layout, rectified=options.rectified
        )
        sides = "  ".join(f"{100 * a.share:.0f} %: {a.side:g} px ({100 * a.square:.3g} %)" for a in found.areas())
        print(f"{name}, {state}, {found.layer}: {sides}", flush=True)
        return Field(name, state, found)

    print(
        f"side of the square that holds a share of the contribution (its share of the picture), {len(files)} images, "
        f"on {device}"
    )
    rows = [[field(n.name, n.state, n.model, n.preprocessing) for n in networks]]
    if options.before:
        before = [
            None if n.state == "untrained" else field(n.name, "before training", n.untrained(), n.preprocessing)
            for n in networks
        ]
        rows.insert(0, before)
    for path in save_receptive_fields(rows, options.out):
        print(f"  {path}")
