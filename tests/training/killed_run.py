"""A program for the tests of resuming: trains as CONFIG says and kills itself (SIGKILL) at a named moment.

python killed_run.py CONFIG RUN_DIR MOMENT, where MOMENT is one of
  step:N      in the forward pass of step N (from 1, over all epochs of this process)
  validation  in the middle of the first validation
  write:N     when half of the N-th checkpoint file (from 1) is on the disk
  after:N     when the N-th checkpoint file is complete and nothing after it has happened
"""

import os
import signal
import sys
from pathlib import Path

import torch

from vmamba import _files
from vmamba.tasks import Classification, ClassificationScores
from vmamba.training import recorder as recorders
from vmamba.training import train
from vmamba.training.config import from_dict, read_yaml
from vmamba.training.lightning_engine import AtomicCheckpointIO


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(number, function):
    calls = []

    def wrapper(*arguments, **named):
        calls.append(1)
        if len(calls) == number:
            die()
        return function(*arguments, **named)

    return wrapper


def half_a_file(contents, path):
    real_save(contents, path)
    size = Path(path).stat().st_size
    saved.append(path)
    if len(saved) == count:
        with open(path, "rb+") as file:
            file.truncate(size // 2)
            file.flush()
            os.fsync(file.fileno())
        die()


def die_after(save):
    def wrapper(*arguments, **named):
        save(*arguments, **named)
        saved.append(1)
        if len(saved) == count:
            die()

    return wrapper


config, run_dir, moment = sys.argv[1:]
what, _, number = moment.partition(":")
count, saved, real_save = int(number or 1), [], torch.save
if what == "step":
    Classification.training_loss = die_at_call(count, Classification.training_loss)
elif what == "validation":
    ClassificationScores.update = die_at_call(2, ClassificationScores.update)
elif what == "write":
    torch.save = half_a_file
elif what == "after":
    recorders.save_tensors = die_after(_files.save_tensors)
    AtomicCheckpointIO.save_checkpoint = die_after(AtomicCheckpointIO.save_checkpoint)
else:
    sys.exit(f"no such moment: {moment}")
torch.set_num_threads(1)
train(from_dict(read_yaml(config)), run_dir)
