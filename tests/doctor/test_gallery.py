"""Every broken set-up is called by its name, with its remedy; sound ones are left in peace."""

from __future__ import annotations

import pytest
import torch

from vmamba.doctor import Level, loader
from vmamba.doctor.step import examine

from . import gallery

# the set-up, what it is called, its level, what its message names, what its remedy says
GALLERY = [
    (gallery.vector_loss, "loss is not a scalar", "problem", "(16,)", "loss.mean()"),
    (gallery.detached_loss, "loss is detached", "problem", "the loss function cuts it", ".detach()"),
    (gallery.detached_in_a_module, "loss is detached", "problem", "body.part", "torch.no_grad()"),
    (gallery.number_as_loss, "loss is not a tensor", "problem", "float", ".item()"),
    (gallery.logarithm_in_the_loss, "loss is not finite", "problem", "arises in the loss function", "epsilon"),
    (gallery.nan_input, "input is not finite", "problem", "inputs (16, 8) hold 1 NaN in 128", "Find the sample"),
    (
        gallery.inf_target,
        "target is not finite",
        "problem",
        "1 Inf in 64 values, the first at [7, 2]",
        "Find the sample",
    ),
    (gallery.label_out_of_range, "label out of range", "problem", "label is 4, but the output has 4", "from 0"),
    (gallery.negative_label, "label out of range", "problem", "label is -1", "ignored index"),
    (gallery.pixels_to_255, "input is not normalised", "warning", "reach 25", "Divide by 255"),
    (gallery.mixed_devices, "mixed devices", "problem", "fc2.weight", "to_empty"),
    (gallery.mixed_devices_in_forward, "mixed devices", "problem", "in part", "to the device of its weights"),
    (gallery.nan_in_forward, "output is not finite", "problem", "part.1 (Logarithm)", "clamp"),
    (gallery.nan_in_backward, "gradient is not finite", "problem", "part (RootOfZero)", "epsilon inside the root"),
    (gallery.one_sample, "batch too small for BatchNorm", "problem", "in part", "drop_last=True"),
    (gallery.dead_branch, "parameters without gradient", "warning", "unused.weight", "find_unused_parameters"),
    (gallery.function_returns_none, "custom function returns None", "problem", "ForgetsWeight.backward", "gradcheck"),
    (gallery.wrong_gradient, "custom function has a wrong gradient", "problem", "0.5 times as much", "gradcheck"),
    (gallery.exploding_gradient, "exploding gradient", "warning", "fc2", "Clip the gradient at"),
    (gallery.dead_activation, "gradient is always zero", "warning", "fc1.weight", "dead"),
    (gallery.vanishing_gradient, "gradient vanishes", "warning", "fc1.weight", "residual"),
    (gallery.exploding_rate, "learning rate too high", "problem", "learning rate of 50", "Set it to"),
    (gallery.optimizer_of_another_model, "optimiser changes nothing", "problem", "rate of 0.1", "Make the optimiser"),
    (gallery.fp16_overflow, "fp16 overflow", "problem", "part.up (Linear)", "Train in bf16, in which"),
    (gallery.retained_graph, "retained graph", "problem", "part.seen, a list of ", ".detach()"),
    (gallery.kept_losses, "retained graph", "problem", "KeepsLosses.history, a list of ", "loss.item()"),
    (gallery.piled_up_tensors, "tensors pile up", "warning", "part.copies, a list of ", ".cpu()"),
    (gallery.graph_used_twice, "graph is used twice", "problem", "second time", "detach() it between steps"),
    (gallery.quadratic_loop, "quadratic loop", "problem", "The backward pass of scan", "unbind(1)"),
    (gallery.linear_loop, "Python loop over L", "warning", "scan", "vmamba.ops.selective_scan"),
    (
        gallery.aborting_forward,
        "process died",
        "problem",
        "in forward in part, ended its process: it was killed by",
        "SIG",
    ),
    (
        gallery.worker_dies,
        "data loader worker died",
        "problem",
        "a worker process of the data loader (pid",
        "--shm-size",
    ),
    (gallery.worker_is_killed, "data loader worker died", "problem", "Python error of its own", "--shm-size"),
    (gallery.worker_is_found_dead, "data loader worker died", "problem", "exited unexpectedly", "--shm-size"),
    (gallery.broken_sample, "data loader fails", "problem", "image 20 is truncated", "dataset[index]"),
    (gallery.slow_loader, "waiting for data", "warning", "waits for its data", "num_workers is 0"),
]
# these are only found out when time has run out
STALLS = [
    (gallery.blocking_backward, "backward never returns", "part.1 (BlocksBackward)", "gallery.py"),
    (gallery.backward_that_holds_the_lock, "backward never returns", "part.1 (HoldsTheLock", "gallery.py"),
    (gallery.blocking_forward, "forward never returns", "in part", "in forward"),
    (gallery.worker_deadlock, "data loader is stuck", "No batch came", "in at"),
]
SOUND = [
    gallery.sound,
    gallery.sound_on_tiny_images,
    gallery.right_gradient,
    gallery.straight_through,
    gallery.attention,
    gallery.sound_fp16,
    gallery.large_loss_in_fp16,
]


def wrong(verdicts):
    return [verdict for verdict in verdicts if verdict.level is not Level.OK]


@pytest.mark.parametrize(
    ("make", "name", "level", "message", "remedy"), GALLERY, ids=[row[0].__name__ for row in GALLERY]
)
def test_each_is_called_by_its_name(make, name, level, message, remedy) -> None:
    found = wrong(examine(gallery.given(make), time_limit=60))
    assert [verdict.name for verdict in found] == [name], found
    assert found[0].level == level
    assert message in found[0].message
    assert remedy in found[0].remedy


@pytest.mark.parametrize(("make", "name", "module", "frame"), STALLS, ids=[row[0].__name__ for row in STALLS])
def test_what_never_returns_is_ended_and_located(make, name, module, frame) -> None:
    found = wrong(examine(gallery.given(make), time_limit=4))
    assert [verdict.name for verdict in found] == [name], found
    assert module in found[0].message
    assert frame in found[0].message


@pytest.mark.slow
def test_what_is_slow_is_not_called_stuck_and_its_loop_is_found() -> None:
    found = wrong(examine(gallery.given(gallery.slow_quadratic_loop), time_limit=8))
    assert found[0].name in ("backward is slow", "forward is slow"), found
    assert "quadratic loop" in [verdict.name for verdict in found]


@pytest.mark.parametrize("make", SOUND, ids=lambda v: v.__name__)
def test_sound_steps_are_left_in_peace(make) -> None:
    verdicts = examine(gallery.given(make), time_limit=60)
    assert wrong(verdicts) == []
    assert {"batch", "loss", "gradients", "learning rate", "memory", "time"} <= {verdict.name for verdict in verdicts}


@pytest.mark.slow
def test_a_collective_that_only_one_process_calls() -> None:
    found = wrong(examine(gallery.given(gallery.missing_collective), time_limit=24))
    assert [verdict.name for verdict in found] == ["collective never completes"], found
    assert "process 0 is in forward" in found[0].message
    assert "only_first_waits" in found[0].message
    assert "if rank == 0" in found[0].remedy


def test_what_ddp_does_about_a_dead_branch_is_as_the_remedy_says() -> None:
    found = wrong(examine(gallery.given(gallery.dead_branch_in_two_processes), time_limit=60))
    assert [verdict.name for verdict in found] == ["parameters without gradient", "DDP misses gradients"], found
    assert "Expected to have finished reduction" in found[0].remedy
    assert "Expected to have finished reduction" in found[1].message


def test_the_loss_scale_comes_down_to_where_gradients_are_finite() -> None:
    (verdict,) = (v for v in examine(gallery.given(gallery.large_loss_in_fp16)) if v.name == "precision")
    assert 1 <= verdict.figures["scale"] < 2**16
    assert verdict.figures["scale"] * 2 ** verdict.figures["skipped"] == 2**16


def test_what_was_there_before_is_not_taken_for_what_piles_up(forks) -> None:
    # a child that is forked has this, too
    model = torch.nn.Linear(512, 512)
    assert model.weight.nbytes > 100 * gallery.piled_up_tensors().batch[0].nbytes
    found = wrong(examine(gallery.piled_up_tensors(), time_limit=60))
    assert [verdict.name for verdict in found] == ["tensors pile up"]
    assert "part.copies, a list of " in found[0].message


def test_workers_that_start_slowly(monkeypatch, forks) -> None:
    # a child that is forked takes this with it
    monkeypatch.setattr(loader, "SLOW_START", 1.0)
    found = wrong(examine(gallery.slow_workers(), time_limit=60))
    assert [verdict.name for verdict in found] == ["workers start slowly"], found
    assert "2 workers" in found[0].message
    assert "persistent_workers=True" in found[0].remedy
