"""The process in which a subject is examined: where it is, how it ends, how it gets its subject."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vmamba.doctor import Level, examine, session, stacks
from vmamba.doctor.position import Place, Position
from vmamba.doctor.stacks import users_frames

from . import gallery

STACKS = f"""Thread 0x00007f (most recent call first):
  File "{stacks.LIBRARIES[0]}/threading.py", line 355 in wait
  File "/home/me/train.py", line 12 in backward
  File "{stacks.OURS}/watching.py", line 90 in backward
  File "/home/me/main.py", line 3 in <module>

Current thread 0x00007e (most recent call first):
  File "{stacks.LIBRARIES[1]}/torch/utils/data/dataloader.py", line 7 in _next_data
  File "/home/me/data.py", line 40 in __getitem__
"""


def wrong(verdicts):
    return [verdict for verdict in verdicts if verdict.level is not Level.OK]


def test_a_position_is_read_by_another(tmp_path) -> None:
    written, read = Position(tmp_path / "position"), Position(tmp_path / "position")
    assert read.read() == Place()
    written.note("backward", "stages.0|MulBackward0", 3, 17)
    assert read.read() == Place("backward", "stages.0|MulBackward0", 3, 17)
    # longer ones and shorter ones leave nothing of each other
    written.note("forward", "x" * 5000)
    assert read.read().where == "x" * 800
    written.note("data")
    assert read.read() == Place("data")


def test_users_own_frames() -> None:
    assert users_frames(STACKS) == ["/home/me/train.py:12 in backward", "/home/me/data.py:40 in __getitem__"]
    assert users_frames("") == []


def test_a_subject_that_cannot_be_inherited_is_written_to_a_file(monkeypatch) -> None:
    monkeypatch.setattr(session, "_can_fork", lambda: False)
    verdicts = examine(gallery.sound())
    assert wrong(verdicts) == []
    assert "learning rate" in {verdict.name for verdict in verdicts}
    subject = gallery.subject(loss=lambda output, target: nn.functional.cross_entropy(output, target))
    with pytest.raises(ValueError, match="'module:function'"):
        examine(subject)


@pytest.mark.parametrize(
    ("target", "limit", "name", "words"),
    [
        ("tests.doctor.gallery:hanging_set_up", 5, "set-up never returns", "in hanging_set_up"),
        ("tests.doctor.gallery:failing_set_up", 60, "set-up fails", "the licence server is away"),
    ],
)
def test_setting_up_that_hangs_or_fails(target, limit, name, words) -> None:
    found = wrong(examine(target, time_limit=limit))
    assert [verdict.name for verdict in found] == [name]
    assert words in found[0].message


def test_output_of_the_subject_goes_nowhere(capfd, forks) -> None:
    def talking(output, target):
        print("step")
        return nn.functional.cross_entropy(output, target)

    assert wrong(examine(gallery.subject(loss=talking))) == []
    assert capfd.readouterr() == ("", "")


def test_a_forked_child_has_one_thread_and_the_parent_keeps_its_own(forks) -> None:
    threads = []

    def counting(output, target):
        threads.append(torch.get_num_threads())
        assert threads[-1] == 1
        return nn.functional.cross_entropy(output, target)

    torch.set_num_threads(2)
    assert wrong(examine(gallery.subject(loss=counting))) == []
    assert threads == []
    assert torch.get_num_threads() == 2
