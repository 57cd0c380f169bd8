"""The examples in the documentation run, and print what their comments say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("analysis.md", "segmentation.md")
NEEDED = {"segmentation_models_pytorch": "smp", "transformers": "hf"}


def _examples() -> list[pytest.param]:
    return [
        pytest.param(code, id=f"{page}-{number}")
        for page in PAGES
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.S | re.M), 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("code", _examples())
def test_the_example_runs_and_prints_what_it_says(code) -> None:
    for module, extra in NEEDED.items():
        if f"import {module}" in code:
            pytest.importorskip(module, reason=f"needs {module}: pip install 'vmamba[{extra}]'")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"^print\(tuple\(.*\)\)  # (.*)$", code, re.M)
    assert done.stdout.splitlines()[: len(promised)] == promised
