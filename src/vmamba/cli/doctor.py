"""Find out what is wrong: with the installation, or, with --config, with a training step.

Every line is ok, a warning (it works, slower or riskier than need be) or a problem, with what to do about it. The exit
status is 1 where there is a problem. Nothing hangs: every probe has a time limit."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .tables import check_writable

if TYPE_CHECKING:
    from ..doctor import Verdict

NAME = "doctor"
HELP = "find out why training is stuck, slow or NaN"
EXAMPLES = """examples:
  vmamba doctor
  vmamba doctor --config runs/photos-vmamba_micro
  vmamba doctor --config my.yaml --set data.workers=0 --set run.precision=fp16
  vmamba doctor --config my_project.train:step --bisect

--config takes a config file, a run directory, or module:function, a function without arguments that returns any
nn.Module, its loss and a batch. docs/stuck.md lists every symptom with its cause and the remedy."""

TIME_LIMIT = 120.0
# --json without a file
PRINTED = "-"
MARKS = {"ok": "ok     ", "warning": "WARNING", "problem": "PROBLEM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="TARGET", help="examine one training step of RUN.yaml, a run directory or module:function"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="for --config: change one config field; repeatable, as of vmamba train",
    )
    parser.add_argument(
        "--bisect", action="store_true", help="for --config: replace parts of the model until the trouble disappears"
    )
    parser.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT, metavar="S", help=f"of every probe (default {TIME_LIMIT:g} s)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="auto (the default: all that there are; of a model, where it is trained), cpu, cuda",
    )
    parser.add_argument(
        "--json", nargs="?", const=PRINTED, metavar="FILE", help="the verdicts as JSON, printed or in a file"
    )


def run(options: argparse.Namespace) -> None:
    from ..doctor import exit_code

    if not options.time_limit > 0:
        raise ValueError(f"--time-limit must be positive, not {options.time_limit:g}")
    if options.json is not None and options.json != PRINTED:
        check_writable(options.json)
    verdicts = _examine(options)
    text = json.dumps([verdict.as_dict() for verdict in verdicts], indent=2)
    if options.json == PRINTED:
        print(text)
    else:
        _print(verdicts)
        if options.json is not None:
            from .._files import write_text

            write_text(f"{text}\n", options.json)
            print(f"verdicts: {options.json}")
    if code := exit_code(verdicts):
        sys.exit(code)


def _examine(options: argparse.Namespace) -> list[Verdict]:
    if options.config is None:
        if options.set or options.bisect:
            what = "--set" if options.set else "--bisect"
            raise ValueError(f"{what} is about a training step: name it with --config")
        from ..doctor.environment import examine_environment

        return examine_environment(options.device, seconds=options.time_limit, progress=_progress)
    from ..doctor import step

    return step.examine(
        options.config,
        overrides=options.set,
        device=options.device,
        bisect=options.bisect,
        time_limit=options.time_limit,
    )


def _progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"{message} ...", file=sys.stderr, flush=True)


def _print(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        print(_wrapped(f"{MARKS[verdict.level.value]}  {verdict.name}: {verdict.message}"))
        if verdict.remedy:
            print(_wrapped(f"         -> {verdict.remedy}"))
    counts = {level: sum(verdict.level.value == level for verdict in verdicts) for level in MARKS}
    warnings, problems = (f"{n} {name}{'' if n == 1 else 's'}" for name, n in list(counts.items())[1:])
    print(f"\n{problems}, {warnings}")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False)
