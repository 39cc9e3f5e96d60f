"""Random inputs of an engine, and how far its outputs are from what is expected."""

import numpy as np


def off(values, expected):
    """By which share of the expected root mean square values are off."""
    return np.linalg.norm(values - expected) / np.linalg.norm(expected)


def random_ids(checkpoint, count, seed=0):
    return np.random.default_rng(seed).integers(0, checkpoint.config.text.vocab_size, count)


def random_tiles(checkpoint, count, seed=0):
    size = checkpoint.config.vision.image_size
    return np.random.default_rng(seed).standard_normal((count, 3, size, size), np.float32)
