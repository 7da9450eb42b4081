"""The weights of a run after some steps: a stream, the update that it lacks yet, and its folds."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.directions import period_key
from zo2jax.journal import Recorded
from zo2jax.kept import Kept
from zo2jax.models.blocks import Params, Source, owned_shapes
from zo2jax.models.layers import Batch
from zo2jax.models.model import Model
from zo2jax.plan import Plan
from zo2jax.stream import Members, Stream
from zo2jax.tail import Tail
from zo2jax.updates import Update

AT_A_TIME = 64
"""Updates that a block takes in one visit of a replay."""


class Weights:
    """Weights that take one update after the other, each with the next step's probes or when somebody looks.

    Args:
        model: blocks, format, and the weights after ``done`` steps, in the form of ``kept``.
        kept: how a run keeps them; which blocks there are, the model says.
        key: of the run, typed.
        done: steps.
        begun: whether they are the weights that the probes of the step after those were made of; or as they were at
            its end. These differ where a period begins: `begin` has been called for the first.
        beside: what is beside the matrices, by block; nothing if None.
        plan: where the blocks live.
        pages: the folder for page files, if there are any.

    Raises:
        StoreError: see `zo2jax.stream.Stream`.

    >>> import zo2jax as zo
    >>> model = zo.blocks([(lambda p, x: p["w"] * x, {"w": jnp.ones((2, 2))})], loss=lambda y, batch: y.sum())
    >>> kept = Kept.of(model, zo.two_point(1e-3), zo.sgd(1e-3), zo.nearest)
    >>> weights, zero = Weights(model, kept, jax.random.key(0)), jnp.zeros(())
    >>> weights.take(Update(jax.random.split(jax.random.key(0), 1), jnp.zeros(1), zero + 0.25))  # a decay of a quarter
    >>> weights.settle()
    >>> [leaves["w"].tolist() for leaves in weights.stream.values()], weights.done
    ([[[0.75, 0.75], [0.75, 0.75]]], 1)
    """

    def __init__(
        self,
        model: Model,
        kept: Kept,
        key: jax.Array,
        *,
        done: int = 0,
        begun: bool = False,
        beside: Source | None = None,
        plan: Plan | None = None,
        pages: Path | None = None,
    ):
        """Reads the weights into their tiers."""
        self.done = done
        """Steps whose updates the weights have; but for the last one's, perhaps, which they lack yet."""
        self._direction, self._key = kept.direction, key
        self._period = self._period_of(done if begun else max(done - 1, 0))
        plan = Plan() if plan is None else plan
        how = kept.direction, kept.rounding, plan, pages, self._basis(), beside, model.format, kept.directions
        more: dict[str, Any] = {"fixed": kept.fixed, "momentum": kept.momentum, "anchor": kept.anchor}
        self.stream = Stream(model.blocks, model.source, *how, **more)
        shape = (kept.directions, 2) if kept.direction.rank else (kept.directions,)
        fresh = jnp.zeros(()) if kept.momentum else None
        self._nothing = Update(jnp.broadcast_to(key, shape), jnp.zeros(kept.directions), jnp.zeros(()), fresh)
        self._lacking = self._nothing
        self._first_order: Params | None = None

    @classmethod
    def of_block(cls, model: Model, name: str, kept: Kept, journal: Recorded, until: int, **options: Any) -> "Weights":
        """The weights of one block of a model after steps of a journal, on the device, as if it were all of it."""
        block = next(block for block in model.blocks if block.name == name)
        block = replace(block, shapes=owned_shapes([block])[name], aliases={})  # tied leaves move where they are owned
        weights = cls(replace(model, blocks=(block,)), kept, journal.header.typed_key, **options)
        try:
            weights.replay(journal, until)
        except BaseException:
            weights.close()
            raise
        return weights

    @property
    def begun(self) -> bool:
        """Whether the period of the next step has begun."""
        return self._period == self._period_of(self.done)

    def begin(self) -> None:
        """Where a period begins with the next step: takes the updates of the last one into the matrices."""
        period = self._period_of(self.done)
        if period != self._period:
            self.settle()
            self._period = period
            basis = self._basis()
            assert basis is not None, "only directions with which matrices are only read have periods"
            self.stream.fold(basis)

    def train(
        self,
        probes: Sequence[Members],
        batches: Sequence[Batch],
        anchored: Sequence[Members] = (),
        tail: Tail | None = None,
    ) -> list[Any]:
        """By batch, what the last block gives for the probes of the weights with every update, see `Stream.train`."""
        update, self._lacking = self._lacking, self._nothing
        return self.stream.train(update, probes, batches, anchored, tail)

    def take(self, update: Update, first_order: Params | None = None) -> None:
        """The update of a step, which is applied later; and, of a hybrid run, its first-order leaves after the step."""
        self._lacking, self._first_order = update, first_order
        self.done += 1

    def settle(self) -> None:
        """Applies what the weights lack."""
        update, self._lacking = self._lacking, self._nothing
        if update is not self._nothing:
            self.stream.apply(update)
        leaves, self._first_order = self._first_order, None
        if leaves is not None:
            self.stream.replace(leaves)

    def replay(self, journal: Recorded, until: int) -> None:
        """Takes the updates of a journal's steps from ``done`` on; each block takes many of them in one visit."""
        while self.done < until:
            self.begin()
            end = min(until, self.done + AT_A_TIME)
            if refresh := self._direction.refresh:
                end = min(end, (self.done // refresh + 1) * refresh)
            self.stream.replay(journal.updates(self.done, end, AT_A_TIME), end - self.done)
            self.done = end

    def close(self) -> None:
        """Lets go of host memory and page files."""
        self.stream.close()

    def _period_of(self, step: int) -> int:
        """How many periods of a direction with a refresh came before that of a step."""
        return step // refresh if (refresh := self._direction.refresh) else 0

    def _basis(self) -> jax.Array | None:
        """The key of the present period of a direction with which matrices are only read."""
        step = np.uint32(self._period * (self._direction.refresh or 1))
        return period_key(self._key, step, self._direction) if self._direction.read_only else None
