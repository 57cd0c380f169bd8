"""Bisecting: what is planted in one module comes back by that module's name."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vmamba import create_upernet
from vmamba.doctor import Level
from vmamba.doctor.bisect import StandIn, parts_of, search
from vmamba.doctor.step import examine
from vmamba.doctor.subject import Subject
from vmamba.tasks import Segmentation

from . import gallery


class Poison(nn.Module):
    """A module that gives NaN in the place of another."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs) * float("nan")


def culprit_of(verdicts):
    (found,) = (verdict for verdict in verdicts if verdict.name == "culprit")
    assert found.level is Level.PROBLEM
    return found


@pytest.mark.parametrize(
    "name", ["stages.2.blocks.1.mlp.act", "stages.1.blocks.0.ssm.out_proj", "stem.norm1", "head.fc"]
)
def test_a_planted_nan_is_found_by_name(name) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vmamba_nano", dims=8, depths=(1, 1, 2, 1), num_classes=4)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, Poison(model.get_submodule(name)))
    batch = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    verdicts = examine(Subject(model, nn.CrossEntropyLoss(), batch), bisect=True, time_limit=60)
    found = culprit_of(verdicts)
    assert found.figures["modules"] == [name]
    assert f"{name} (Poison)" in found.message


def test_a_model_that_walks_through_its_stages() -> None:
    """What a decoder sits on is never called as a whole, and its sequence of stages neither."""
    torch.manual_seed(0)
    model = create_upernet(
        "vmamba_nano", 3, channels=16, auxiliary_channels=8, dims=8, depths=(1, 1, 1, 1), drop_path_rate=0.0
    )
    name = next(name for name, _ in model.named_modules() if name.endswith("stages.1.blocks.0.mlp.fc1"))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, Poison(model.get_submodule(name)))
    batch = torch.randn(2, 3, 32, 32), torch.randint(3, (2, 32, 32))
    verdicts = examine(Subject(model, training_loss=Segmentation(3).training_loss, batch=batch), bisect=True)
    assert culprit_of(verdicts).figures["modules"] == [name]


def test_two_culprits_are_both_found() -> None:
    model = nn.Sequential(
        gallery.Net(gallery.Logarithm()), nn.Linear(4, 4), nn.Sequential(Poison(nn.ReLU()), nn.ReLU())
    )
    verdicts = examine(Subject(model, nn.CrossEntropyLoss(), gallery.subject().batch), bisect=True)
    assert culprit_of(verdicts).figures["modules"] == ["0.part", "2.0"]


def test_a_backward_that_is_not_finite() -> None:
    assert culprit_of(examine(gallery.given(gallery.nan_in_backward), bisect=True)).figures["modules"] == ["part"]


def test_an_overflow_of_fp16() -> None:
    assert culprit_of(examine(gallery.given(gallery.fp16_overflow), bisect=True)).figures["modules"] == ["part.up"]


@pytest.mark.parametrize(
    ("make", "inside", "trouble"),
    [
        (gallery.detached_in_a_module, "body.part", "loss is detached"),
        (gallery.exploding_gradient, "part.layers.", "exploding gradient"),
    ],
    ids=["detached", "exploding"],
)
def test_trouble_that_raises_nothing(make, inside, trouble) -> None:
    found = culprit_of(examine(gallery.given(make), bisect=True))
    assert all(name.startswith(inside) for name in found.figures["modules"])
    assert f"({trouble})" in found.message


@pytest.mark.slow
def test_a_backward_that_never_returns_in_a_network_whose_parts_change_shapes() -> None:
    found = culprit_of(examine("tests.doctor.gallery:blocking_backward_in_a_network", bisect=True, time_limit=6))
    assert found.figures["modules"] == ["stages.1.blocks.0.mlp.act"]


def test_a_backward_that_never_returns() -> None:
    """Every trial has a process and a limit of its own."""
    found = culprit_of(examine(gallery.given(gallery.blocking_backward), bisect=True, time_limit=4))
    assert found.figures["modules"] == ["part.1"]
    assert "backward that does not come back" in found.message


def test_trouble_outside_the_modules_and_no_trouble() -> None:
    verdicts = examine(gallery.given(gallery.logarithm_in_the_loss), bisect=True)
    assert verdicts[-1].name == "no culprit found"
    assert "loss function" in verdicts[-1].remedy
    assert examine(gallery.given(gallery.sound), bisect=True)[-1].message == "No problem to look for."


@pytest.mark.parametrize("guilty", [{"a.1.x"}, {"a.1.x", "b"}, {"a.0", "a.1.y", "b"}, set()])
def test_search_finds_the_smallest_sets(guilty) -> None:
    tree = {"": ["a", "b", "c"], "a": ["a.0", "a.1"], "a.1": ["a.1.x", "a.1.y"]}

    def troubled(replaced):
        return not guilty or any(not any(g == r or g.startswith(f"{r}.") for r in replaced) for g in guilty)

    assert set(search(troubled, lambda name: tree.get(name, []))) == guilty


def test_parts_of_lists_and_stand_ins() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.ModuleDict({"a": nn.ReLU()})]), nn.Identity(), nn.Tanh())
    assert parts_of(model, "") == ["0.0", "0.1.a", "2"]
    x = torch.randn(2, 6, requires_grad=True)
    assert StandIn()(x) is x
    assert StandIn(torch.empty(2, 6, device="meta"))(x) is x
    same, other = StandIn([torch.empty(2, 6, device="meta"), torch.empty(2, 5, 3, device="meta")])(x)
    assert same is x
    assert other.shape == (2, 5, 3)
    assert other.requires_grad
