"""Look at a data set: what is in it and what is wrong with it (check), and how fast batches of it come (bench)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data import Finding
    from ..data.inspection import DataReport, PartReport
    from ..data.speed import LoadingSpeed
    from ..training import Config

NAME = "data"
HELP = "check a data set, or measure how fast it loads"
EXAMPLES = """examples:
  vmamba data check photos/
  vmamba data check imagenette160/ --json check.json
  vmamba data check street/ --task segmentation
  vmamba data check cells/ --task detection
  vmamba data check images/ --task detection --annotations train.json
  vmamba data bench --data photos/ --workers 0,4,8 --needed 4000
  vmamba data bench --recipe small_segmentation --data street/ --workers 16 --needed 300
  vmamba data bench --config runs/photos-vmamba_micro/config.yaml --set data.in_memory=true --needed bench.json

`check` reads every file; its exit status is 1 where something is wrong: an image is unreadable, classes differ
between the parts, masks or objects do not fit their images.
`bench` makes training batches as a config says and takes them at once. --needed is how many images a second the GPU
trains: a number, or what `vmamba bench MODEL --train --json FILE` wrote. docs/data.md explains both."""

NAMED = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="read every file and report what is wrong")
    check.add_argument(
        "source",
        metavar="PATH",
        help="folder, zip or tar file, hfds/NAME, or digits; folder of images and masks; folder of COCO images",
    )
    check.add_argument("--task", choices=tuple(CHECKS), default="classification", help="what the data is for")
    check.add_argument(
        "--annotations",
        metavar="JSON",
        help="for detection: the COCO file of the images in PATH (default: found in PATH)",
    )
    bench = actions.add_parser("bench", help="images a second that training gets, and whether a GPU would wait")
    bench.add_argument("--data", metavar="PATH", help="the data set (default: what the config says)")
    bench.add_argument("--recipe", metavar="NAME", help="the recipe to make batches of")
    bench.add_argument("--config", metavar="YAML", help="config of a run")
    bench.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change one config field")
    bench.add_argument("--workers", metavar="LIST", help="numbers of processes (default 0,1,2,4 ... up to the cores)")
    bench.add_argument(
        "--needed", metavar="N|FILE", help="images a second the GPU trains, or figures of `vmamba bench`"
    )
    bench.add_argument("--seconds", type=float, default=5.0, help="how long each is measured (default 5)")
    for action in (check, bench):
        action.add_argument("--json", metavar="FILE", help="also write everything as JSON")


def run(options: argparse.Namespace) -> None:
    if options.json and not Path(options.json).parent.is_dir():
        raise FileNotFoundError(f"cannot write {options.json}: there is no directory {Path(options.json).parent}")
    report = CHECKS[options.task](options) if options.action == "check" else _bench(options)
    if options.json:
        from .._files import write_text

        write_text(json.dumps(report, indent=2) + "\n", options.json)
        print(f"figures: {options.json}")
    if not report.get("usable", True):
        sys.exit(1)


def _check_classes(options: argparse.Namespace) -> dict:
    if options.annotations:
        raise ValueError("--annotations goes with --task detection")
    from ..data.inspection import inspect

    report = inspect(options.source, lambda message: print(message, file=sys.stderr, flush=True))
    for name, part in report.parts.items():
        _print_part(name or "images", part)
    _print_findings(report)
    return report.as_dict()


def _check_masks(options: argparse.Namespace) -> dict:
    from ..data.segmentation import check_segmentation, find_segmentation

    if options.annotations:
        raise ValueError("--annotations goes with --task detection")
    source = find_segmentation(options.source)
    findings = check_segmentation(source)
    what = f"{source.root}: {len(source.classes)} classes, parts {', '.join(source.parts)}"
    return _told(options, what, findings, {"classes": list(source.classes), "parts": list(source.parts)})


def _check_objects(options: argparse.Namespace) -> dict:
    from ..data import AnnotatedImages, check_detection, open_detection, read_coco

    if options.annotations:
        parts = {"images": AnnotatedImages(Path(options.source), read_coco(options.annotations))}
    else:
        parts = open_detection(options.source)
    categories = next(iter(parts.values())).coco.categories
    findings, figures, lines = [], {}, []
    for name, (images, coco) in parts.items():
        findings += check_detection(images, coco, categories=categories)
        counts = {kind: len(getattr(coco, kind)) for kind in ("images", "annotations", "categories")}
        lines.append(f"{coco.file}: {_counts(counts)}{', with masks' if coco.has_masks else ''}")
        figures[name] = {**counts, "has_masks": coco.has_masks}
    figures = figures["images"] if options.annotations else {"parts": figures}
    return _told(options, "\n".join(lines), findings, figures)


CHECKS = {"classification": _check_classes, "segmentation": _check_masks, "detection": _check_objects}


def _told(options: argparse.Namespace, what: str, findings: list[Finding], figures: dict) -> dict:
    """Print the findings about ``what``; the report for JSON."""
    print(what)
    for finding in findings[:NAMED]:
        print(f"  {finding}")
    if len(findings) > NAMED:
        print(f"  and {len(findings) - NAMED:,} more; --json names all")
    print(f"{len(findings):,} finding(s)" if findings else "nothing is wrong")
    named = [finding.as_dict() for finding in findings]
    return {"usable": not findings, "source": options.source, "task": options.task, **figures, "findings": named}


def _print_part(name: str, part: PartReport) -> None:
    counts = part.images_of_class.values()
    print(f"{name}: {part.images:,} images in {len(counts)} classes, {min(counts):,} to {max(counts):,} in each")
    if part.height and part.width:
        low, middle, high = (
            f"{getattr(part.width, kind):g} x {getattr(part.height, kind):g}" for kind in ("least", "median", "most")
        )
        print(f"  width x height in px: least {low}, median {middle}, most {high}")
        print(f"  formats: {_counts(part.formats)}; colours: {_counts(part.modes)}")
    if part.several_frames:
        print(f"  {part.several_frames:,} with several frames, of which the first is used")
    if part.unreadable:
        print(f"  {len(part.unreadable):,} unreadable:")
        for finding in part.unreadable[:NAMED]:
            print(f"    {finding.message}")
        if len(part.unreadable) > NAMED:
            print(f"    and {len(part.unreadable) - NAMED:,} more; --json names all")


def _print_findings(report: DataReport) -> None:
    if report.class_difference:
        print(f"classes: {report.class_difference}")
    if report.same_file:
        print(f"{len(report.same_file):,} images lie in two parts or two classes, the same file twice:")
        for one, other in report.same_file[:NAMED]:
            print(f"    {one} = {other}")
    unreadable = sum(len(part.unreadable) for part in report.parts.values())
    if report.usable:
        print("every image is readable and the classes agree")
    elif unreadable:
        print("training stops at an unreadable image; data.on_unreadable=skip leaves them out")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _bench(options: argparse.Namespace) -> dict:
    from ..training import config as configs
    from ..training import resolve

    config = resolve(
        configs.read_yaml(options.config) if options.config else {},
        {"data": {"source": options.data}} if options.data else {},
        configs.parse_overrides(options.set),
        recipe=options.recipe,
    )
    if options.seconds <= 0:
        raise ValueError(f"--seconds must be positive, not {options.seconds}")
    needed = _needed(options.needed, config.model.name)
    speeds = _measure(config, _worker_counts(options.workers, config), options.seconds)
    _print_speeds(speeds, needed)
    rows = [
        {
            **vars(speed),
            "keeps_busy": None if needed is None else speed.keeps_busy(needed),
            "share_of_gpu_time_lost": None if needed is None else speed.lost(needed),
        }
        for speed in speeds
    ]
    return {"kind": "loading", "config": configs.as_dict(config), "cores": _cores(), "needed": needed, "rows": rows}


def _measure(config: Config, counts: list[int | None], seconds: float) -> list[LoadingSpeed]:
    from ..analysis.measuring import checked_device
    from ..data.speed import LoadingSpeed, measure_loading
    from ..training.job import Share
    from ..training.jobs import open_job

    on_device = config.data.in_memory and config.task == "classification"
    device = checked_device("cpu" if config.run.device == "mps" else config.run.device) if on_device else None
    share = Share(config.data.batch_size // config.run.accumulate)
    job = open_job(config)
    job.check(share, "cpu", 1)
    where = f"in memory, batches made on {device}" if on_device else f"{_cores()} cores"
    print(
        f"{config.data.source}: {len(job.parts['train']):,} training images, {job.size_in_words}, "
        f"batch {share.batch_size}; {where}"
    )
    speeds = []
    for workers in counts:
        batches = job.training_batches(share, device or "cpu", workers=workers or 0)
        # each process has two batches ready before any is asked for
        rate = measure_loading(batches, seconds=seconds, warm_up=2 * workers if workers else 1)
        speeds.append(LoadingSpeed(workers, device.type if device else "cpu", rate))
    return speeds


def _print_speeds(speeds: list[LoadingSpeed], needed: float | None) -> None:
    from ..data.speed import workers_needed

    print(f"{'workers':>8}  {'images/s':>9}" + ("" if needed is None else "  GPU"))
    for speed in speeds:
        workers = "memory" if speed.workers is None else str(speed.workers)
        print(f"{workers:>8}  {speed.images_per_second:>9,.0f}" + ("" if needed is None else _wait(speed, needed)))
    if needed is None:
        print("--needed N compares this with what the GPU trains")
        return
    if any(speed.keeps_busy(needed) for speed in speeds):
        print(f"the GPU, at {needed:,.0f} images/s, is kept busy")
        return
    print(f"the GPU, at {needed:,.0f} images/s, would starve", end="")
    count = workers_needed(speeds, needed)
    if count is None:
        remedy = "load with processes (data.in_memory=false)"
        print(f": {remedy}" if speeds[0].takes_turns else f": make the batches on it (run.device=cuda), or {remedy}")
    else:
        print(
            f": about {count} processes would do, each on a core of its own ({_cores()} here); or keep the images in "
            "memory and augment on the GPU (data.in_memory=true)"
        )


def _wait(speed: LoadingSpeed, needed: float) -> str:
    share = speed.lost(needed)
    if speed.takes_turns:
        return f"  spends at most {100 * share:.1f} % of its time on them"
    return f"  waits {100 * share:.0f} % of the time" if share else "  never waits"


def _needed(text: str | None, model: str) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = _needed_in_figures(Path(text), model)
    if not value > 0:
        raise ValueError(f"--needed must be positive, not {text}")
    return value


def _needed_in_figures(path: Path, model: str) -> float:
    """The fastest training of ``model``, or of the only model there is, among the figures of ``vmamba bench``."""
    if not path.is_file():
        raise FileNotFoundError(f"--needed takes a number or a file that `vmamba bench --json` wrote; no file {path}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        trained = {(row["model"], row["images_per_second"]) for row in rows if row.get("task") == "training"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no figures of `vmamba bench --json`") from error
    models = {name for name, _ in trained}
    name = model if model in models else next(iter(models)) if len(models) == 1 else None
    rates = [rate for other, rate in trained if other == name and rate]
    if not rates:
        found = ", ".join(sorted(models)) or "no training at all"
        raise ValueError(f"{path} holds no training speed of {model}; it holds {found}")
    return max(rates)


def _worker_counts(text: str | None, config: Config) -> list[int | None]:
    if config.data.in_memory and config.task == "classification":
        if text is not None:
            raise ValueError("--workers is of no use with data.in_memory=true: nothing is loaded then")
        return [None]
    if text is None:
        return [0, *(2**i for i in range(_cores().bit_length()))]
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--workers takes numbers such as 0,4,8, not {text!r}") from None
    if min(counts) < 0:
        raise ValueError(f"--workers must not be negative: {text}")
    return counts


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
