"""What runs a task: configuration, the engine (Lightning, imported when training starts), checkpoints, reports."""

from .checkpoints import About, load_trained, make_model, read_checkpoint
from .config import Config, resolve
from .evaluation import evaluate, predict
from .run import Outcome, resume, train

__all__ = [
    "About",
    "Config",
    "Outcome",
    "evaluate",
    "load_trained",
    "make_model",
    "predict",
    "read_checkpoint",
    "resolve",
    "resume",
    "train",
]
