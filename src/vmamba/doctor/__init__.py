"""`vmamba doctor`: what is wrong with an installation or a training step, by name, and what to do about it."""

from __future__ import annotations

from .step import examine
from .subject import Subject
from .verdict import Level, Verdict, exit_code
from .watchdog import StalledTraining, Watchdog

__all__ = ["Level", "StalledTraining", "Subject", "Verdict", "Watchdog", "examine", "exit_code"]
