"""Optional dependencies: imported where they are used, with a remedy when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which the optional extra ``extra`` of this package installs.

    Raises:
        ModuleNotFoundError: ``module`` (or something it needs) is missing; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this needs {error.name!r}, which is not installed: pip install 'vmamba[{extra}]'", name=error.name
        ) from error
