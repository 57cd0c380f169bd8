"""Which lines of a stack are the user's own."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

__all__ = ["is_users", "users_frames"]

OURS = str(Path(__file__).parent)
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


def is_users(file: str) -> bool:
    """Whether a source file is neither a library's, nor the doctor's, nor no file at all."""
    return not file.startswith((*LIBRARIES, OURS, "<"))


FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>\S+)')


def users_frames(stacks: str) -> list[str]:
    """ "file.py:12 in f" for each thread of faulthandler's ``stacks``: its innermost frame outside libraries.

    Threads that only run libraries are left out; the last processes to write, a loader's workers among them, come last.
    """
    found = []
    for thread in re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.MULTILINE):
        for frame in FRAME.finditer(thread):
            if frame["file"].startswith(OURS):
                break  # below are those who called the doctor
            if is_users(frame["file"]):
                found.append(f"{frame['file']}:{frame['line']} in {frame['function']}")
                break
    return list(dict.fromkeys(found))
