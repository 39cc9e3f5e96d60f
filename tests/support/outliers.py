"""Channels far larger than the others, as trained vision encoders have them."""

import numpy as np

from edgevl.engine.smoothing import producer


def with_outliers(checkpoint, size=50.0, values=True):
    """Return changes that make some channels `size` times larger, and leave the function as it is.

    After every norm of the encoder and the projector's and, unless `values` is false, of the values
    of attention.
    """
    rng, changes = np.random.default_rng(7), {}
    for name in checkpoint.names():
        before = producer(name)
        if before is None or (before.endswith("qkv") and not values):
            continue
        weight = changes.get(name, checkpoint.tensor(name)).copy()
        channels = rng.choice(weight.shape[1], 3, replace=False)
        weight[:, channels] /= size
        changes[name] = weight
        for part in (".weight", ".bias"):
            if before + part in checkpoint.names():
                produced = changes.get(before + part, checkpoint.tensor(before + part)).copy()
                produced[channels - len(weight[0])] *= size  # of qkv, rows of the last third
                changes[before + part] = produced
    return changes
