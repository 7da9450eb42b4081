"""Batches of random tokens, for the models of `zo2jax.shapes`."""

from dataclasses import dataclass

import jax
import numpy as np

from zo2jax.shapes import SHAPES as SHAPES
from zo2jax.shapes import random_model as random_model


@dataclass(frozen=True)
class Work:
    """What a step is given.

    >>> sorted(Work(tokens=8, rows=4, candidates=2).batch(100))
    ['ids', 'labels', 'positions', 'targets', 'weights']
    """

    tokens: int = 2048
    rows: int = 1
    candidates: int = 0
    """0: each token of each row is a target. Otherwise each row is an example of so many candidates of one token, as in
    a task of classification, and only they are scored."""
    steps: int = 10
    """In each of three timed rounds."""

    def batch(self, vocabulary: int) -> dict[str, jax.Array]:
        """Random rows, as the batch of a step."""
        ids = np.random.default_rng(0).integers(0, vocabulary, (self.rows, self.tokens)).astype(np.int32)
        if not self.candidates:
            return jax.device_put({"ids": ids, "targets": np.roll(ids, -1, 1)})
        shape = (self.rows, self.candidates)
        targets = np.broadcast_to(np.arange(self.candidates, dtype=np.int32), shape)
        batch = {"ids": ids, "positions": np.full(shape, self.tokens - 1, np.int32), "targets": targets}
        weights = np.ones((*shape, 1), np.float32)
        return jax.device_put(batch | {"weights": weights, "labels": np.zeros(self.rows, np.int32)})


DEFAULT = Work()
"""One row of 2048 tokens."""
