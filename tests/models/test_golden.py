"""The network against the official code: outputs, stage features, gradients."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from vmamba import from_official
from vmamba.models.keymap import state_to_official, state_to_ours

TOLERANCE = 1e-4  # relative, in fp32; measured on the CPU: at most 3e-6
STORED_DIGITS = 5e-8  # gradient norms are stored with seven decimals
GOLDEN = Path(__file__).parents[1] / "golden"
SHARED_GOLDEN = Path(__file__).parents[3] / "shared" / "golden"


def _cases(folder: Path) -> list[str]:
    index = folder / "index.json"
    return list(json.loads(index.read_text())) if index.is_file() else ["every case"]


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def _compare(folder: Path, case: str, device: str = "cpu") -> None:
    facts = json.loads((folder / "index.json").read_text())[case]
    tensors = load_file(folder / f"{case}.safetensors", device=device)
    model = from_official(facts["official_arguments"]).eval()
    model.load_state_dict(state_to_ours(load_file(folder / facts["state"])))
    model.to(device)

    image = tensors["input"].requires_grad_()
    last, stages = model.forward_intermediates(image)
    logits = model.forward_head(last)
    logits.square().sum().backward()

    assert torch.equal(model(image), logits)
    errors = {"logits": _relative(logits, tensors["logits"]), "input": _relative(image.grad, tensors["grad_input"])}
    errors |= {f"stage{i}": _relative(features, tensors[f"stage{i}"]) for i, features in enumerate(stages)}
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}

    parameters = state_to_official(dict(model.named_parameters()))
    norms = {name: parameter.grad.norm().item() for name, parameter in parameters.items()}
    assert norms == {
        name: pytest.approx(norm, rel=TOLERANCE, abs=STORED_DIGITS) for name, norm in facts["grad_norms"].items()
    }


@pytest.mark.parametrize("case", _cases(GOLDEN))
def test_the_official_code_gives_the_same(case: str) -> None:
    _compare(GOLDEN, case)


@pytest.mark.golden
@pytest.mark.parametrize("case", _cases(SHARED_GOLDEN))
def test_the_official_code_gives_the_same_in_every_configuration(shared: Path, case: str) -> None:
    _compare(shared / "golden", case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("folder", "case"), [(f, c) for f in (GOLDEN, SHARED_GOLDEN) for c in _cases(f)])
def test_the_official_code_gives_the_same_on_a_gpu(monkeypatch, folder: Path, case: str) -> None:
    if not folder.is_dir():
        pytest.skip("optional data: there is no folder `shared` beside the repository")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    _compare(folder, case, "cuda")


def _official_variants() -> dict:
    return json.loads(gzip.decompress((GOLDEN / "official_variants.json.gz").read_bytes()))


@pytest.mark.parametrize("name", _official_variants())
def test_released_variants_have_the_official_names_shapes_and_parameters(name: str) -> None:
    facts = _official_variants()[name]
    model = timm.create_model(name, device="meta")
    official = state_to_official(model.state_dict())
    assert {key: list(tensor.shape) for key, tensor in official.items()} == facts["state"]
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["params"]
