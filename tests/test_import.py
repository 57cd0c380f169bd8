"""Importing does nothing: no extras, no device, no network, and next to no time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, socket, sys, time
import torch, timm, timm.data, timm.models, timm.optim, timm.scheduler

def refuse(*args, **kwargs):
    raise OSError("importing must not open a connection")

socket.socket.connect = refuse
before = set(sys.modules)
start = time.process_time()
import vmamba
seconds = time.process_time() - start
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"seconds": seconds, "roots": sorted(roots), "cuda": torch.cuda.is_initialized()}))
"""


@pytest.fixture(scope="module")
def report():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_is_quick(report):
    assert report["seconds"] <= 0.3


def test_import_touches_no_device(report):
    assert not report["cuda"]


def test_import_brings_in_no_extra_and_no_kernel_compiler(report):
    extras = {"triton", "lightning", "torchmetrics", "tensorboard", "sklearn", "matplotlib", "rich", "transformers"}
    assert not extras & set(report["roots"])
