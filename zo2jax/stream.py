"""Sweeps: carries go through the blocks of a model one block at a time, in one compiled program per kind of block.

A visit of a training sweep applies the last step's update to a block, makes the probes of the new weights from the same
read, and takes all members of the population one block further; what it leaves behind are the block's weights and the
carries. So the memory it needs is that of one block's largest leaf, M times, whatever the size of the model.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax

from zo2jax.directions import Direction
from zo2jax.models.blocks import Block, Kind, Params, Visit, kinds, tied_leaves, with_tied
from zo2jax.models.layers import Batch, Cache
from zo2jax.updates import Rounding, Update, move


@partial(jax.jit, static_argnames=("kind", "one_by_one", "direction", "rounding"), donate_argnames="leaves")
def _visit(
    kind: Kind,
    leaves: Params,
    tied: Params,
    ids: tuple[Any, Any],
    update: Update,
    keys: jax.Array,
    matrix: jax.Array,
    carry: Any,
    batch: Batch,
    one_by_one: bool,
    direction: Direction,
    rounding: Rounding,
) -> tuple[Params, Any]:
    """One block: its leaves after the update, and the members' carries [M, ...] after the block."""
    leaves, members = move(leaves, ids[0], update, keys, matrix, direction=direction, rounding=rounding)
    if tied:  # a tied leaf was moved with its owner
        members = with_tied(members, move(tied, ids[1], None, keys, matrix, direction=direction)[1])
    if one_by_one:
        return leaves, lax.map(lambda member: kind.block.apply(member[0], member[1], batch), (members, carry))
    return leaves, jax.vmap(kind.block.apply, in_axes=(0, 0, None), axis_size=len(matrix))(members, carry, batch)


@partial(jax.jit, static_argnames=("direction", "rounding"), donate_argnums=0)
def _apply(leaves: Params, ids: Any, update: Update, direction: Direction, rounding: Rounding) -> Params:
    return move(leaves, ids, update, direction=direction, rounding=rounding)[0]


@partial(jax.jit, static_argnames=("kind", "one_by_one", "direction"), donate_argnames="cache")
def _extend(
    kind: Kind,
    leaves: Params,
    tied: Params,
    ids: tuple[Any, Any],
    keys: jax.Array,
    matrix: jax.Array,
    rows: tuple[Any, Batch],
    cache: Cache | None,
    one_by_one: bool,
    direction: Direction,
) -> tuple[Any, Cache | None]:
    """One block of a generating sweep: rows come member by member, [M b, ...], and go so."""
    members = move(leaves, ids[0], None, keys, matrix, direction=direction)[1]
    if tied:
        members = with_tied(members, move(tied, ids[1], None, keys, matrix, direction=direction)[1])
    apart = jax.tree.map(lambda x: x.reshape(len(matrix), -1, *x.shape[1:]), (*rows, cache))
    if one_by_one:
        done = lax.map(lambda member: kind.block.extend(member[0], *member[1]), (members, apart))
    else:
        done = jax.vmap(lambda leaves, row: kind.block.extend(leaves, *row))(members, apart)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)


class Sweep:
    """Training sweeps over resident blocks.

    Args:
        blocks: the model's.
        leaf_ids: uint32, one for each leaf of ``{block name: leaves}`` in pytree order (`zo2jax.directions.leaf_ids`).
        structure: that pytree's structure.
        direction: the distribution of z.
        rounding: of the updates of 16-bit leaves.
        borrowed: whether the first parameters belong to somebody else. Then each block is copied before it is changed
            for the first time; the others' arrays are let go one by one.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> from zo2jax.directions import leaf_ids, normal
    >>> from zo2jax.updates import stochastic
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=2, heads=2, kv_heads=1, head_size=4, context=16)
    >>> model = config.init(jax.random.key(0))
    >>> sweep = Sweep(model.blocks, leaf_ids(model.params), jax.tree.structure(model.params), normal, stochastic)
    >>> len(sweep.kinds), len(set(sweep.kinds))
    (6, 4)
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        leaf_ids: Any,
        structure: Any,
        direction: Direction,
        rounding: Rounding,
        *,
        borrowed: bool = False,
    ):
        """Sorts out which leaves each block owns and which it shares."""
        self._borrowed = {block.name for block in blocks} if borrowed else set()
        self.blocks, self.kinds = tuple(blocks), kinds(blocks)
        self._direction, self._rounding = direction, rounding
        ids = jax.tree.unflatten(structure, np.asarray(leaf_ids, np.uint32))
        self._ids = {
            block.name: (
                np.array(jax.tree.leaves(ids[block.name]), np.uint32),
                np.array(jax.tree.leaves(tied_leaves(block, ids)), np.uint32),
            )
            for block in blocks
        }

    def train(self, params: Params, update: Update, keys: jax.Array, matrix: jax.Array, batch: Batch) -> Any:
        """Applies ``update`` and evaluates the probes of the result: what the last block returns, [M, ...].

        ``keys`` (typed, [K]) and ``matrix`` (float32 [M, K]) are those of `zo2jax.updates.move`. The new leaves take
        the place of the old in the dictionary ``params``, and their memory. If a visit fails, the update is applied
        to the rest of the blocks all the same.
        """
        carry, visited = None, 0
        on_cpu = jax.default_backend() == "cpu"
        try:
            for block, kind in zip(self.blocks, self.kinds, strict=True):
                # Members share one batched product, except in the head, whose logits are the largest activations by
                # far, and on CPUs, where a batch of matrices is multiplied more slowly than one after the other.
                one_by_one = on_cpu or block is self.blocks[-1]
                params[block.name], carry = _visit(
                    kind,
                    self._own(block, params),
                    tied_leaves(block, params),
                    self._ids[block.name],
                    update,
                    keys,
                    matrix,
                    carry,
                    batch,
                    one_by_one=one_by_one,
                    direction=self._direction,
                    rounding=self._rounding,
                )
                visited += 1
        except BaseException:  # a batch that does not fit the model, or an interrupt: no block may lack the update
            self.apply(params, update, self.blocks[visited:])
            raise
        return carry

    def apply(self, params: Params, update: Update, blocks: Sequence[Block] | None = None) -> None:
        """Applies ``update`` to all blocks, or to those given, in place like `train`."""
        for block in self.blocks if blocks is None else blocks:
            ids = self._ids[block.name][0]
            params[block.name] = _apply(self._own(block, params), ids, update, self._direction, self._rounding)

    def visits(self, params: Params, keys: jax.Array, matrix: jax.Array) -> Visit:
        """Visits of the probes of ``params``, for generation; rows stand member by member, [M b, ...].

        Probes are made anew in every visit, as in `train`: a generated token costs a pass over the weights.
        """
        kind_of = dict(zip((block.name for block in self.blocks), self.kinds, strict=True))

        def visit(block: Block, carry: Any, batch: Batch, cache: Cache | None) -> tuple[Any, Cache | None]:
            return _extend(
                kind_of[block.name],
                params[block.name],
                tied_leaves(block, params),
                self._ids[block.name],
                keys,
                matrix,
                (carry, batch),
                cache,
                one_by_one=jax.default_backend() == "cpu",
                direction=self._direction,
            )

        return visit

    def _own(self, block: Block, params: Params) -> Params:
        """A block's leaves, as arrays whose memory may be reused."""
        if block.name not in self._borrowed:
            return params[block.name]
        self._borrowed.discard(block.name)
        # Waiting keeps the copies of many blocks from being under way at once.
        params[block.name] = jax.block_until_ready(jax.tree.map(jax.numpy.copy, params[block.name]))
        return params[block.name]
