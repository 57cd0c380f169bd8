"""Train a classifier, a segmentation network or a detector. Without options: vmamba_nano on handwritten digits."""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from typing import TYPE_CHECKING

from .devices import add_device_argument

if TYPE_CHECKING:
    from ..doctor.watchdog_callback import WatchdogCallback
    from ..training import Config

NAME = "train"
HELP = "train on the embedded digits, or on images with labels, masks or boxes"
EXAMPLES = """examples:
  vmamba train
  vmamba train --data flowers/ --model vmamba_micro --image-size 96 --epochs 40
  vmamba train --recipe finetune --data flowers/ --weights vssm1_tiny_0230s_ckpt_epoch_264.pth
  torchrun --nproc-per-node 8 -m vmamba train --recipe imagenet --data imagenet/ --out runs/imagenet
  vmamba train --recipe small_segmentation --data street/ --set segmentation.augment.crop=[352,480]
  vmamba train --recipe ade20k --dry-run
  vmamba train --config runs/digits-vmamba_nano/config.yaml --set optim.lr=1e-3 --out runs/slower
  vmamba train --resume runs/slower
  vmamba train --data flowers/ --watchdog 120

A folder of images has one sub-folder per class, or train/ and val/ with one sub-folder per class each; for masks see
docs/segmentation.md, for boxes docs/detection.md.
docs/training.md explains every field that --set can change."""

# option -> the config field it is short for
SHORTHANDS = {
    "data": ("data", "source"),
    "model": ("model", "name"),
    "weights": ("model", "weights"),
    "epochs": ("schedule", "epochs"),
    "batch_size": ("data", "batch_size"),
    "image_size": ("data", "image_size"),
    "lr": ("optim", "lr"),
    "seed": ("run", "seed"),
    "device": ("run", "device"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help="a complete config to start from; docs/training.md lists them")
    parser.add_argument(
        "--data", metavar="PATH", help='image folder, zip or tar files, hfds/NAME, or "digits" (the default)'
    )
    parser.add_argument("--model", metavar="NAME", help="any timm model; `vmamba models` lists ours")
    parser.add_argument("--weights", metavar="FILE", help='checkpoint to start from, or "pretrained" for released ones')
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images a step, over all processes")
    parser.add_argument("--image-size", type=int, metavar="PX", help="height and width of the training images")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same result (default 0)")
    add_device_argument(parser, default=None)
    parser.add_argument("--config", metavar="YAML", help="a config file, for example of an earlier run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change one config field; repeatable"
    )
    parser.add_argument("--out", metavar="DIR", help="run directory (default runs/DATA-MODEL, numbered if taken)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print steps, learning rates, time and memory, and train nothing"
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="for --dry-run: processes to plan for (default 1, of published recipes 8)",
    )
    parser.add_argument(
        "--images-per-second", type=float, metavar="X", help="for --dry-run: measured training speed of a process"
    )
    parser.add_argument(
        "--resume", metavar="RUN_DIR", help="go on with an interrupted run; takes no other option but --watchdog"
    )
    parser.add_argument(
        "--watchdog",
        type=float,
        metavar="SECONDS",
        help="report what hangs when nothing happens for so long, and record memory and utilisation (docs/stuck.md)",
    )
    parser.add_argument(
        "--on-stall",
        choices=("dump", "stop"),
        help="for --watchdog: report and go on (dump, the default), or stop, to be resumed",
    )


def run(options: argparse.Namespace) -> None:
    from ..training import resume, train
    from ..training.distributed import is_first_process
    from ..training.job import PART_NAMES, percent

    if options.on_stall and options.watchdog is None:
        raise ValueError("--on-stall says what --watchdog SECONDS does: give both")
    watch = partial(_watchdog, options) if options.watchdog is not None else tuple
    shorthands = {name: getattr(options, name) for name in SHORTHANDS if getattr(options, name) is not None}
    if options.resume:
        if shorthands or options.config or options.set or options.out or options.recipe or options.dry_run:
            raise ValueError("--resume takes everything from the run directory; leave the other options out")
        outcome = resume(options.resume, callbacks=watch)
    elif options.dry_run:
        _print_plan(options, _config(options, shorthands))
        return
    else:
        outcome = train(_config(options, shorthands), options.out, callbacks=watch)
    if not is_first_process():
        return
    (first, title), *others = outcome.figures.items()
    metrics = outcome.metrics
    more = [f"{shown} {percent(metrics[name])} %" for name, shown in others]
    more += [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    samples = " ".join(shlex.quote(str(path)) for path in outcome.sample_images)
    rows = {**outcome.pictures, "report": outcome.report, "checkpoint": outcome.checkpoint}
    print(
        f"\n{PART_NAMES[outcome.part]} {title} {percent(metrics[first])} % ({', '.join(more)}; "
        f"{outcome.images} images, weights of epoch {outcome.best_epoch}, the best on the validation images)"
    )
    width = max(17, *map(len, rows))
    for name, path in rows.items():
        print(f"{name[0].lower() + name[1:]:<{width}} {path}")
    print(f"{'try it:':<{width}} vmamba {outcome.command} --checkpoint {shlex.quote(str(outcome.run_dir))} {samples}")


def _watchdog(options: argparse.Namespace) -> list[WatchdogCallback]:
    from ..doctor.watchdog_callback import WatchdogCallback

    return [WatchdogCallback(options.watchdog, on_stall=options.on_stall or "dump", resumable=True)]


def _config(options: argparse.Namespace, shorthands: dict[str, object]) -> Config:
    from ..training import config as configs
    from ..training import resolve

    from_options: dict[str, dict] = {}
    for name, value in shorthands.items():
        section, field = SHORTHANDS[name]
        from_options.setdefault(section, {})[field] = value
    return resolve(
        configs.read_yaml(options.config) if options.config else {},
        from_options,
        configs.parse_overrides(options.set),
        recipe=options.recipe,
    )


def _print_plan(options: argparse.Namespace, config: Config) -> None:
    from ..training.plan import describe, plan
    from ..training.recipes import PUBLISHED_PROCESSES

    processes = options.processes or PUBLISHED_PROCESSES.get(options.recipe, 1)
    print(describe(plan(config, processes=processes, rate=options.images_per_second)))
