"""What runs a task: configuration, the engine (Lightning, imported when training starts), checkpoints, reports."""

from .checkpoints import About, load_trained, make_model, read_checkpoint
from .config import Config
from .evaluation import evaluate, predict
from .inference import evaluate_checkpoint, newest_run, predict_files
from .recipes import RECIPES, resolve
from .run import Outcome, resume, train

__all__ = [
    "RECIPES",
    "About",
    "Config",
    "Outcome",
    "evaluate",
    "evaluate_checkpoint",
    "load_trained",
    "make_model",
    "newest_run",
    "predict",
    "predict_files",
    "read_checkpoint",
    "resolve",
    "resume",
    "train",
]
