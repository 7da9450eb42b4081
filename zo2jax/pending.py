"""Dense updates of matrices that are only read: the terms of a period, which every visit adds to what it reads.

With W as it was at the last fold, or what its codes stand for, the matrices after t updates are

    W_t = W + (sum_i coefs[i] z(keys[i]) - gone W)

where ``gone`` is the fraction of W that weight decay took, and coefs[i] is what later decays left of a coefficient. In
float32 these are the weights of a step-by-step computation up to rounding: that of sums, and of ``gone`` and decayed
coefficients to 12 bits where they are multiplied, which makes the products exact. All members of a step are made from
one read of the codes (`pallas_kernels.perturb_codes`), and nothing but keys and coefficients is kept. A fold takes the
terms of a period into float32 masters (or 16-bit matrices), in one pass, and encodes those anew.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import bits
from pallas_kernels.perturb_codes import perturb_codes
from pallas_kernels.quantized_reference import Codes
from pallas_kernels.quantized_reference import Pending as OfLeaf
from zo2jax.directions import Direction, matrix_shape
from zo2jax.models.blocks import Params
from zo2jax.models.quantized import cut
from zo2jax.pages import Place
from zo2jax.probes import Matrices
from zo2jax.updates import Rounding, Update, leaf_keys, nearest, rounded


class Pending(NamedTuple):
    """The terms that all matrices of a model lack.

    >>> Pending.none(8, jax.random.key(0)).coefs.shape
    (8,)
    """

    keys: jax.Array
    """uint32 [T, 2], of directions."""
    coefs: jax.Array
    """float32 [T]."""
    used: jax.Array
    """int32 []: how many of the T terms there are."""
    gone: jax.Array
    """float32 []: the fraction of the matrices that went."""
    key: jax.Array
    """Typed PRNG key [], of the rounding at the fold that ends the period (`zo2jax.directions.period_key`)."""

    @classmethod
    def none(cls, length: int, key: jax.Array) -> "Pending":
        """No terms, with room for so many.

        >>> int(Pending.none(8, jax.random.key(0)).used)
        0
        """
        return cls(jnp.zeros((length, 2), jnp.uint32), jnp.zeros(length), jnp.int32(0), jnp.float32(0), key)

    def of_leaves(self, ids: jax.Array) -> OfLeaf:
        """What leaves with these ids (uint32 [leaves]) lack: arrays with the leaves in front, of 12 significant bits.

        >>> Pending.none(8, jax.random.key(0)).of_leaves(jnp.arange(3, dtype=jnp.uint32)).keys.shape
        (3, 8, 2)
        """
        coefs, gone = (lax.reduce_precision(x, exponent_bits=8, mantissa_bits=11) for x in (self.coefs, self.gone))
        shared = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(ids), *x.shape)), (coefs, self.used, gone))
        return OfLeaf(leaf_keys(self.keys, ids), *shared)

    def terms(self, ids: jax.Array) -> list["Terms"]:
        """What a fold takes into each of the leaves with these ids.

        >>> len(Pending.none(8, jax.random.key(0)).terms(jnp.arange(3, dtype=jnp.uint32)))
        3
        """
        return _terms(self, ids)

    def matrices(
        self,
        places: Sequence[Place],
        pages: Sequence[jax.Array],
        ids: jax.Array,
        update: Update | None,
        probes: tuple[jax.Array | None, jax.Array | None],
        direction: Direction,
        tied: int | None = None,
    ) -> "PendingMatrices":
        """The matrices of a visit; ``update`` is among the terms already.

        >>> ids, nothing = jnp.zeros(0, jnp.uint32), (None, None)
        >>> Pending.none(8, jax.random.key(0)).matrices([], [], ids, None, nothing, None).settle_all()
        ()
        """
        return PendingMatrices(places, pages, ids, self, probes, direction)


class Terms(NamedTuple):
    """What a fold takes into a matrix.

    >>> Terms._fields
    ('pending', 'key')
    """

    pending: OfLeaf
    key: jax.Array
    """uint32 [2], of the noise of stochastic rounding."""

    def folded(self, w: jax.Array, start: jax.Array, direction: Direction, rounding: Rounding = nearest) -> jax.Array:
        """Rows of the matrix, from ``start`` on, with these terms, rounded once to their dtype.

        >>> from zo2jax.directions import normal
        >>> none = Pending.none(8, jax.random.key(0)).terms(jnp.arange(1, dtype=jnp.uint32))
        >>> none[0].folded(jnp.ones((1, 2)), jnp.int32(3), normal).tolist()
        [[1.0, 1.0]]
        """
        rows = jnp.asarray(start, jnp.uint32) + jnp.arange(w.shape[0], dtype=jnp.uint32)
        wide = perturb_codes(w, self.pending, None, jnp.float32, pair=direction.pair, rows=rows)
        return rounded(wide, w.dtype, rounding, self.key, start)


@jax.jit
@jax.named_scope("update")
def _terms(pending: Pending, ids: jax.Array) -> list[Terms]:
    """By one program: a fold asks for those of many leaves."""
    of_leaves, seed = pending.of_leaves(ids), jax.random.key_data(pending.key)
    return [Terms(jax.tree.map(lambda x, i=i: x[i], of_leaves), bits.fold(seed, ids[i])) for i in range(len(ids))]


@jax.jit
@jax.named_scope("update")
def after(pending: Pending, update: Update) -> Pending:
    """With the terms of an update, if any of its coefficients is not zero.

    >>> update = Update(jax.random.split(jax.random.key(0), 1), jnp.ones(1), jnp.float32(0.25))
    >>> pending = after(after(Pending.none(4, jax.random.key(0)), update), update)
    >>> pending.coefs.tolist(), int(pending.used), float(pending.gone)
    ([0.75, 1.0, 0.0, 0.0], 2, 0.4375)
    """
    coefs, decay = bits.cut12(update.coefs), bits.cut12(update.decay)
    gone = pending.gone + (decay - lax.optimization_barrier(decay * pending.gone))
    earlier = pending.coefs - lax.optimization_barrier(decay * pending.coefs)
    new = (coefs != 0).any()
    at = jnp.where(new, pending.used + jnp.arange(len(coefs)), len(pending.coefs))  # beyond the end: dropped
    return pending._replace(
        keys=pending.keys.at[at].set(jax.random.key_data(update.keys), mode="drop"),
        coefs=earlier.at[at].set(coefs, mode="drop"),
        used=pending.used + jnp.where(new, np.int32(len(coefs)), np.int32(0)),
        gone=gone,
    )


class PendingMatrices(Matrices):
    """The matrices of a block that are only read, and what they lack. Lives while a visit is traced.

    Args:
        places: of the matrices.
        pages: [length] arrays.
        ids: uint32 [matrices], the leaf ids.
        pending: what all matrices lack.
        probes: (keys, matrix) as in `zo2jax.updates.move`, or (None, None) for the matrices themselves.
        direction: the distribution of z.
    """

    def __init__(
        self,
        places: Sequence[Place],
        pages: Sequence[jax.Array],
        ids: jax.Array,
        pending: Pending,
        probes: tuple[jax.Array | None, jax.Array | None],
        direction: Direction,
    ):
        """Adds nothing yet."""
        super().__init__(list(places), pages, ids, None, probes, direction=direction, rounding=nearest)
        self._pending = pending.of_leaves(ids)

    def dtype(self, index: int) -> jnp.dtype:
        """Of a matrix, or of what its codes stand for."""
        return jnp.dtype(self.places[index].dtype or super().dtype(index))

    def noise(self, index: int) -> Any:
        """What members of a matrix are made with: the matrix as it is read, what it lacks, and its probes."""
        matrix = self.places[index].of(self.pages)
        if not isinstance(matrix, Codes):
            matrix = matrix.reshape(matrix_shape(matrix.shape))
        return matrix, *jax.tree.map(lambda x: x[index], (self._pending, self._probes))

    def members(self, index: int, noise: Any) -> jax.Array:
        """All members' matrices, [M, *shape]; without probes the matrix."""
        found = self._made(index, noise)
        return found.reshape(*found.shape[:-2], *self.places[index].shape)

    def rows(self, index: int, member: jax.Array | None, ids: jax.Array) -> jax.Array:
        """Rows ``ids`` [n] of a member's matrix, [n, n_in]: z is drawn for them alone."""
        matrix, pending, probes = self.noise(index)
        found = jax.tree.map(lambda x: x[ids], matrix)
        if member is None:
            return self._made(index, (found, pending, None), ids.astype(jnp.uint32))
        probes = probes._replace(matrix=probes.matrix[member][None])
        return self._made(index, (found, pending, probes), ids.astype(jnp.uint32))[0]

    def slab(self, index: int) -> Callable[[jax.Array, int], jax.Array]:
        """A function that gives so many rows from one on of all members' matrices, [M, rows, n_in]."""
        matrix, *rest = self.noise(index)

        def slab(start: jax.Array, count: int) -> jax.Array:
            rows = jnp.asarray(start, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
            return self._made(index, (cut(matrix, start, count), *rest), rows)

        return slab

    def settle_all(self) -> tuple[jax.Array, ...]:
        """Nothing: what changes is known to all blocks."""
        return ()

    def _made(self, index: int, noise: Any, rows: jax.Array | None = None) -> jax.Array:
        matrix, pending, probes = noise
        return perturb_codes(matrix, pending, probes, self.dtype(index), pair=self.direction.pair, rows=rows)


@partial(jax.jit, static_argnames=("dtype", "direction"))
def merged(w: jax.Array | Codes, pending: Pending, ident: jax.Array, dtype: Any, direction: Direction) -> jax.Array:
    """A matrix with what it lacks, rounded to nearest: a copy to look at or to export.

    >>> from zo2jax.directions import normal
    >>> merged(jnp.ones((1, 2)), Pending.none(8, jax.random.key(0)), jnp.uint32(1), jnp.float32, normal).tolist()
    [[1.0, 1.0]]
    """
    mine = jax.tree.map(lambda x: x[0], pending.of_leaves(ident[None]))
    flat = w if isinstance(w, Codes) else w.reshape(matrix_shape(w.shape))
    return perturb_codes(flat, mine, None, dtype, pair=direction.pair).reshape(w.shape)


SAVED = ("keys", "coefs", "used", "gone")
"""What checkpoints hold of `Pending`."""


def saved_pending(kept: Params) -> Pending:
    """What `Listed.saved` gave, again.

    >>> int(saved_pending(Pending.none(8, jax.random.key(0))._asdict()).used)
    0
    """
    none = Pending.none(len(kept["coefs"]), jax.random.key(0))  # no fold will ask for the key
    return none._replace(**{part: jnp.asarray(kept[part]) for part in SAVED})


def shapes_pending(length: int) -> Params:
    """What `Listed.saved` gives of a block with matrices, as ``jax.ShapeDtypeStruct``, but for "low".

    >>> shapes_pending(8)["keys"].shape
    (8, 2)
    """
    none = jax.eval_shape(partial(Pending.none, length), jax.random.key(0))
    return {part: getattr(none, part) for part in SAVED}
