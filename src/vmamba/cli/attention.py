"""What one pixel of a VMamba's scan reads: how much every other pixel contributes, through each route and all.

Computed exactly from the scan's own numbers; every layer's maps are held to the output of its scan."""

from __future__ import annotations

import argparse

from .networks import MODEL_HELP, add_network_options, check_drawing, open_network

NAME = "attention"
HELP = "draw what a pixel of SS2D reads, through every scan route"
EXAMPLES = """examples:
  vmamba attention runs/flowers-vmamba_tiny_s1l8 daisy.jpg --pixel 410 220
  vmamba attention vmamba_tiny_s1l8=vssm1_tiny_0230s_ckpt_epoch_264.pth fox.jpg --short-side 448
  vmamba attention vmamba_tiny_s1l8 fox.jpg --layer stages.2.blocks.0 --layer stages.2.blocks.7

For fox.jpg writes into --out: fox.activation, fox.attention, fox.similarity and fox.decay, maps over the picture, and
fox.decay_by_steps, each as PNG and SVG; numbers as CSV and JSON, maps as NPZ. docs/analysis.md says what they mean."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"a VMamba: {MODEL_HELP}")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders of them")
    parser.add_argument(
        "--pixel",
        nargs=2,
        type=int,
        metavar=("X", "Y"),
        help="of the picture, from its upper left (default: its middle)",
    )
    parser.add_argument(
        "--layer", action="append", help="SS2D layer or block, may be repeated (default: the last of every stage)"
    )
    parser.add_argument(
        "--short-side",
        type=int,
        metavar="PX",
        help="resize the whole picture to this short side (default: the model's)",
    )
    parser.add_argument("--out", default="attention", metavar="DIR", help="where to write (default attention/)")
    add_network_options(parser)


def run(options: argparse.Namespace) -> None:
    from .._devices import choose_device
    from ..analysis import ss2d_layers
    from ..analysis.attention import ss2d_layer
    from ..analysis.explanation_files import layer_attention, save_attention
    from ..data import evaluation_transform, list_images, read_image

    device = choose_device(options.device)
    check_drawing(options.out)
    files = list_images(options.images)
    if twice := {file.stem for file in files if [f.stem for f in files].count(file.stem) > 1}:
        raise ValueError(
            f"two images are called {sorted(twice)[0]} and would write the same files: name them one by one"
        )
    network = open_network(options.model, options)
    short_side = min(network.preprocessing.image_size) if options.short_side is None else options.short_side
    if short_side < 32:
        raise ValueError(f"--short-side must be at least 32 px, not {short_side}")
    names = ss2d_layers(network.model)
    layers = [ss2d_layer(network.model, layer) for layer in options.layer or _last_of_every_stage(names)]
    model = network.model.to(device)
    pictures = [read_image(file) for file in files]
    pixels = [options.pixel or (picture.width // 2, picture.height // 2) for picture in pictures]
    for file, picture, (x, y) in zip(files, pictures, pixels, strict=True):
        if not (0 <= x < picture.width and 0 <= y < picture.height):
            raise ValueError(
                f"the pixel {x} {y} lies outside {file}, which is {picture.width} px wide and {picture.height} px high"
            )
    for file, picture, (x, y) in zip(files, pictures, pixels, strict=True):
        size = tuple(round(short_side * side / min(picture.size)) for side in (picture.height, picture.width))
        whole = network.preprocessing.at(size, crop_pct=1.0)
        image = evaluation_transform(_squashed(whole))(picture)[None]
        place = ((y + 0.5) / picture.height, (x + 0.5) / picture.width)
        found = [layer_attention(model, image, layer, place) for layer in layers]
        print(f"{file}, pixel {x} {y}, seen at {size[1]} x {size[0]} px, on {device}")
        for layer in found:
            shares = "  ".join(
                f"{row['route']} {100 * row['share']:.0f} %" for row in layer.table() if row["share"] is not None
            )
            print(f"  {layer.layer}: {shares}  (error {layer.error:.1e})")
        about = {
            "model": network.name,
            "weights": network.state,
            "image": str(file),
            "pixel": [x, y],
            "seen_at": [size[1], size[0]],
        }
        for path in save_attention(picture, file.stem, found, options.out, about):
            print(f"    {path}")


def _last_of_every_stage(names: list[str]) -> list[str]:
    """ "stages.2.blocks.7.ssm" is the last of those that share the first two parts of its name."""
    return list({".".join(name.split(".")[:2]): name for name in names}.values())


def _squashed(preprocessing):
    """Resized to its size with nothing cut off; the size has the picture's aspect already."""
    import dataclasses

    return dataclasses.replace(preprocessing, crop_mode="squash")
