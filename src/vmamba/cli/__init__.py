"""The command ``vmamba``: parses, calls the levels below, prints. Nothing imports this package."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import (
    ablations,
    attention,
    bench,
    convert,
    count,
    data,
    detect,
    doctor,
    erf,
    evaluate,
    ladder,
    models,
    predict,
    routes,
    scaling,
    segment,
    train,
)

# in the order in which the help lists them: using networks, data and trouble, measuring, looking inside
COMMANDS = (
    *(train, evaluate, predict, detect, segment, models, convert),
    *(data, doctor),
    *(bench, count, scaling, ladder, ablations),
    *(erf, attention, routes),
)

# what a user can put right: told in one line, without a traceback
MISTAKES = (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 after a user's mistake, 130 if interrupted.

    And with 1 where `bench`, `scaling` or `ladder` found wrong results, `data check` bad data, or `doctor` a problem.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read our output has gone (`vmamba models | head`); keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except MISTAKES as error:
        if options.traceback:
            raise
        print(f"vmamba {options.command}: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vmamba",
        description="VMamba, the Visual State Space Model: train, evaluate and use image classifiers, use detectors "
        "and segmentation networks, look at data sets and into networks.",
        epilog="Start with `vmamba train`: it trains on handwritten digits, offline, in minutes on a CPU.",
    )
    parser.add_argument("--version", action="version", version=f"vmamba {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        command = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
        command.set_defaults(run=module.run)
    return parser


def _one_line(error: BaseException) -> str:
    """The message on one line. A data loader's worker sends its whole traceback; the last line is the message."""
    text = str(error).strip() or type(error).__name__
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())
