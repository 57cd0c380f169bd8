"""The paper's ablations: what each changes, parameters and FLOPs at 224 px, published accuracy where there is one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .tables import check_writable, print_table, write_csv

if TYPE_CHECKING:
    from ..analysis import Complexity
    from ..models.ablations import Ablation

NAME = "ablations"
HELP = "list the paper's ablations, or print one as a configuration"
EXAMPLES = """examples:
  vmamba ablations
  vmamba ablations --json ablations.json --csv ablations.csv
  vmamba ablations unidi > unidi.yaml
  vmamba train --recipe imagenet --config unidi.yaml --data imagenet/

A name prints the model section of a training configuration; `vmamba.models.create_ablation(NAME)` is the network."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of them: print it as a training configuration")
    parser.add_argument("--json", metavar="FILE", help="also write the list as JSON")
    parser.add_argument("--csv", metavar="FILE", help="also write the list as CSV")


def run(options: argparse.Namespace) -> None:
    import torch

    from ..analysis import measure_complexity
    from ..models import ABLATIONS, create_ablation

    if options.name:
        if options.json or options.csv:
            raise ValueError("--json and --csv write the list: leave out the name")
        with torch.device("meta"):
            create_ablation(options.name)  # an unknown name is an error here
        print(_as_yaml(ABLATIONS[options.name]), end="")
        return
    check_writable(options.json, options.csv)
    records = []
    counted = {}  # every group has the base itself in it
    for group in dict.fromkeys(ablation.group for ablation in ABLATIONS.values()):
        lines = {name: ablation for name, ablation in ABLATIONS.items() if ablation.group == group}
        for name, ablation in lines.items():
            network = (ablation.base, _one_line(ablation.changes))
            if network not in counted:
                counted[network] = measure_complexity(create_ablation(name, device="meta"), (1, 3, 224, 224))
            records.append(_record(name, ablation, counted[network]))
        print(f"{group}, of {ablation.base}")
        rows = [_cells(record) for record in records[-len(lines) :]]
        print_table(["name", "config", "parameters", "GMACs", "top-1 %"], rows, left=2)
        print(flush=True)
    print("top-1: ImageNet-1K at 224 px as published, -: not known; GMACs as in `vmamba count`")
    if options.json:
        from .._files import write_text

        write_text(json.dumps({"kind": "ablations", "rows": records}, indent=2) + "\n", options.json)
        print(f"ablations: {options.json}")
    if options.csv:
        rows = [[*(record | {"changes": _one_line(record["changes"])}).values()] for record in records]
        write_csv(list(records[0]), rows, options.csv)
        print(f"ablations: {options.csv}")


def _record(name: str, ablation: Ablation, figures: Complexity) -> dict[str, Any]:
    return {
        "group": ablation.group,
        "name": name,
        "base": ablation.base,
        "changes": dict(ablation.changes),
        "parameters": figures.parameters,
        "macs": figures.macs,
        "flops": figures.flops,
        "top1": ablation.top1,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    top1 = "-" if row["top1"] is None else f"{row['top1']:.2f}"
    config = _one_line(row["changes"]) or "as it is"
    return [row["name"], config, f"{row['parameters']:,}", f"{row['macs'] / 1e9:.3f}", top1]


def _one_line(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}: {_plain(value)}" for field, value in changes.items())


def _plain(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _as_yaml(ablation: Ablation) -> str:
    import yaml

    kwargs = {name: list(v) if isinstance(v, tuple) else v for name, v in ablation.changes.items()}
    return yaml.safe_dump({"model": {"name": ablation.base, "kwargs": kwargs}}, sort_keys=False)
