"""The streams of random numbers that a run draws from, each a function of a seed and an epoch or step."""

import enum

import numpy as np


class Stream(enum.IntEnum):
    """What is drawn; the value is added to the epoch or step, so that no two streams share numbers."""

    GEOMETRY = 0  # by epoch: flips, crops and scales
    ORDER = 1 << 32  # by epoch: which images share a batch
    AUGMENTATION = 1 << 33  # by step: of pre-training
    MIXING = 1 << 34  # by step: of pre-training


def generator(stream: Stream, seed: int, at: int) -> np.random.Generator:
    """The random numbers of a stream; at: the epoch or step."""
    return np.random.Generator(np.random.Philox(key=[seed, at + stream]))
