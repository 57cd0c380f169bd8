"""Tasks: loss, metrics and optimiser as plain functions of a model and a batch; no framework."""

from .classification import Classification, ClassificationScores, confusion_matrix, top_k_hits
from .optimisation import make_optimizer, warmup_cosine
from .task import Scores, Task

__all__ = [
    "Classification",
    "ClassificationScores",
    "Scores",
    "Task",
    "confusion_matrix",
    "make_optimizer",
    "top_k_hits",
    "warmup_cosine",
]
