"""Random numbers that are a function of their place: of a seed, a stream, and the number of the sample and draw.

A generator that walks would have to be walked again to find what one sample drew. SplitMix64's output function (Steele,
Lea and Flood 2014) of a counter needs no state, so any sample of any epoch can be drawn alone, in any order, in a batch
of any make-up, and gets the same numbers on every machine.
"""

from __future__ import annotations

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seed: int, samples: np.ndarray, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1) for each of the ``samples`` (n,), non-negative integers: (n, count) float64.

    The first ``count`` numbers of a sample are the same for every greater ``count``.
    """
    start = _mix(np.uint64(seed) ^ _mix(samples.astype(np.uint64) + np.uint64(1)))
    place = np.arange(1, count + 1, dtype=np.uint64) * _STEP
    # the upper 53 bits fill a float64's
    return (_mix(start[:, None] + place) >> np.uint64(11)) * 2.0**-53


def normals(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Standard normal numbers from two arrays of uniform ones (Box and Muller)."""
    return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)


def _mix(word: np.ndarray) -> np.ndarray:
    # arrays of unsigned integers wrap around silently, which is what is meant here
    word = np.atleast_1d(word)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
