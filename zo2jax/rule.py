"""What follows from the losses of a run's steps, without a look at its weights; and from those of its journal again."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from zo2jax.directions import step_keys
from zo2jax.estimators import Estimator
from zo2jax.journal import Recorded
from zo2jax.mezo import Info, State, conclude
from zo2jax.optimizers import Optimizer
from zo2jax.stream import Members


class Rule:
    """The rule that a run's steps go by: which members a step evaluates, and what it makes of their losses.

    A step is counted from 0. Of `zo2jax.svrg`, what the first step of a period gave is kept until the next one.

    Args:
        estimator: of the run.
        optimizer: of the run.
        journal: of the run; its steps, up to where it was opened, can be concluded again.

    >>> import tempfile, zo2jax as zo
    >>> from pathlib import Path
    >>> from zo2jax.header import Header
    >>> from zo2jax.journal import Journal
    >>> from zo2jax.mezo import begin
    >>> estimator, optimizer = zo.two_point(0.5), zo.sgd(1.0)
    >>> state = begin(jnp.zeros(3), jax.random.key(0), estimator, optimizer)
    >>> with tempfile.TemporaryDirectory() as folder, Journal.create(Path(folder) / "j", Header((0, 0))) as journal:
    ...     rule = Rule(estimator, optimizer, journal)
    ...     info, state = rule.conclude(state, rule.keys(state), (jnp.array([3.0, 1.0]), jnp.ones(2)), 0)
    >>> info.update.coefs.tolist(), int(state.step)
    ([-2.0], 1)
    """

    def __init__(self, estimator: Estimator, optimizer: Optimizer, journal: Recorded):
        """Takes the population in parts of as many members as the run was begun with."""
        self._estimator, self._optimizer, self._journal = estimator, optimizer, journal
        self._chunks = jax.tree.map(jnp.asarray, estimator.parts(journal.header.members_at_once))
        self._full: tuple[int, jax.Array | None] = -1, None  # the first step of a period, and the coefficients it gave

    def keys(self, state: State) -> jax.Array:
        """Of the directions of a state's next step."""
        estimator = self._estimator
        of_anchor = 0 if estimator.full is None else estimator.full.directions
        return _step_keys(state.key, state.step, estimator.directions, estimator.direction, of_anchor)

    def members(self, state: State, keys: jax.Array, step: int) -> tuple[list[Members], list[Members]]:
        """What `zo2jax.stream.Stream.train` is given: the step's members part by part, and those of the anchor."""
        anchored, estimator = self._since_anchor(step) > 0, self._estimator
        chunks = self._chunks[anchored]
        members = [(keys, chunks[0][1])]
        if len(chunks) > 1 or estimator.eps is not None or estimator.full is not None:
            members = _members(estimator, keys, state.step, chunks)
        return members, members if anchored else []

    def conclude(self, state: State, keys: jax.Array, sums: Any, step: int) -> tuple[Info, State]:
        """What a step found, from (loss sums, counts) of its members, and the state after it.

        ``step`` is the number that the state has too, where it may still be on its way.
        """
        anchor, how = self._anchor(state, step), (self._estimator, self._optimizer)
        info, opt_state, after = _conclude(*how, keys, sums, state.opt_state, state.step, anchor)
        if anchor is None and self._estimator.full is not None:
            self._full = step, info.projected_gradient
        return info, state._replace(opt_state=opt_state, step=after)

    def again(self, state: State, step: int) -> tuple[Info, State]:
        """What a step of the journal found, and the state after it.

        If the state is not that of the step, its losses and projected gradient are right all the same.
        """
        state = state._replace(step=jnp.asarray(step, jnp.uint32))
        losses = self._journal.record(step).losses
        if self._since_anchor(step):
            losses = losses[: 2 * len(self._estimator.probes)]
        sums = jnp.asarray(losses), jnp.ones(len(losses))  # what the program of a step finds the same of
        return self.conclude(state, self.keys(state), sums, step)

    def _since_anchor(self, step: int) -> int:
        """How many steps the first one of its period is back; 0 without an anchor."""
        return 0 if self._estimator.full is None else step % (self._estimator.direction.refresh or 1)

    def _anchor(self, state: State, step: int) -> jax.Array | None:
        """The coefficients that the first step of a period gave, for a later one; see `zo2jax.svrg`."""
        first = step - self._since_anchor(step)
        if first == step:
            return None
        if self._full[0] != first:  # of another process
            self.again(state, first)
        return self._full[1]


_step_keys = jax.jit(step_keys, static_argnums=(2, 3, 4))


@partial(jax.jit, static_argnums=0)
def _members(estimator: Estimator, keys: jax.Array, step: jax.Array, chunks: Any) -> list[Members]:
    """The members of each chunk."""
    return [(keys[k], estimator.scaled(rows, step)) for k, rows in chunks]


@partial(jax.jit, static_argnums=(0, 1))
def _conclude(
    estimator: Estimator,
    optimizer: Optimizer,
    keys: jax.Array,
    sums: Any,
    opt_state: Any,
    step: jax.Array,
    anchor: jax.Array | None,
) -> tuple[Info, Any, jax.Array]:
    """From (loss sums, counts) of the members to the step's update, the optimizer's state and the next step."""
    total, count = sums
    losses = total / jnp.where(count > 0, count, 1)
    info, opt_state = conclude(estimator, optimizer, keys, losses, opt_state, step, anchor)
    return info, opt_state, step + 1
