"""Which class runs which task."""

from __future__ import annotations

from .classification import ClassificationJob
from .config import Config
from .detection import DetectionJob
from .job import Job
from .segmentation import SegmentationJob

JOBS: dict[str, type[Job]] = {
    "classification": ClassificationJob,
    "segmentation": SegmentationJob,
    "detection": DetectionJob,
}


def open_job(config: Config) -> Job:
    """The task of a config with its data.

    Raises:
        FileNotFoundError, ValueError: data and config do not fit together.
    """
    return JOBS[config.task](config)
