"""Numbers by their place: repeatable, uniform, unlike their neighbours."""

import numpy as np

from vmamba.data.random_numbers import normals, uniforms


def test_a_sample_draws_the_same_in_any_company():
    alone = uniforms(3, np.array([7]), 5)
    together = uniforms(3, np.arange(10), 9)
    assert np.array_equal(alone[0], together[7, :5])


def test_numbers_are_those_of_splitmix64():
    # the published generator, walked: state += step; output = mix(state)
    mask = 2**64 - 1

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    state = mix(12345 ^ mix(8))
    walked = []
    for _ in range(4):
        state = (state + 0x9E3779B97F4A7C15) & mask
        walked.append((mix(state) >> 11) / 2**53)
    assert uniforms(12345, np.array([7]), 4)[0].tolist() == walked


def test_numbers_are_uniform_and_independent():
    numbers = uniforms(0, np.arange(20000), 8)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # 160,000 numbers in 64 bins: each holds 2500 +- 50; five deviations
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    assert abs(counts - 2500).max() < 250
    correlations = np.corrcoef(np.concatenate([numbers, np.roll(numbers, 1, axis=0)], axis=1).T)
    assert abs(correlations - np.eye(16)).max() < 0.04
    assert not np.isin(uniforms(1, np.arange(100), 8), numbers).any()


def test_normal_numbers():
    first, second = uniforms(0, np.arange(50000), 2).T
    drawn = normals(first, second)
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.02
    assert abs((np.abs(drawn) < 1).mean() - 0.6827) < 0.01
