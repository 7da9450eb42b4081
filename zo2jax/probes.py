"""The matrices of a block while it is visited: moved in their page, and made into probes where they are used.

A member's matrix exists from the product that needs it to the end of that product. Embeddings draw z for the rows of
their tokens only, and a head for as many rows of the vocabulary as it looks at.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import bits
from pallas_kernels.perturb import Probes, Shard, perturb, perturb_in_page
from zo2jax.directions import Direction
from zo2jax.models.layers import product
from zo2jax.models.quantized import Quantized
from zo2jax.pages import Place
from zo2jax.updates import Rounding, Update, by_leaf


class Matrices:
    """Matrices in pages, each of which takes an update once, when it is first used. Lives while a visit is traced.

    Args:
        places: of the matrices.
        pages: [length] arrays; `pages` are those after what was moved so far.
        ids: uint32 [matrices], the leaf ids.
        update: or None.
        probes: (keys, matrix) as in `zo2jax.updates.move`.
        count: of updates, as there.
        direction: the distribution of z.
        rounding: of the update.
        frozen: numbers of the matrices that are not trained.
    """

    def __init__(
        self,
        places: list[Place],
        pages: Any,
        ids: jax.Array,
        update: Update | None,
        probes: tuple[jax.Array | None, jax.Array | None],
        *,
        count: jax.Array | None = None,
        direction: Direction,
        rounding: Rounding,
        frozen: Collection[int] = (),
    ):
        """Moves nothing yet."""
        self.places, self.pages = places, list(pages)
        self.direction = direction
        self._rounding = rounding
        self._terms, self._probes = by_leaf(ids, update, *probes, count) if places else (None, None)
        self._waiting = set(range(len(places))) - set(frozen) if update is not None else set()
        self._frozen = set(frozen)
        self._last: tuple[jax.Array, ...] = ()

    def weight(self, index: int, member: jax.Array | None) -> "Probe | Quantized | jax.Array":
        """A member's matrix; of one that is not trained the array itself, or its codes."""
        if index in self._frozen:  # read after all moves: a move of its page after it was read would copy the page
            return self.places[index].weight(self.settle_all())
        return Probe(self, index, member)

    def dtype(self, index: int) -> jnp.dtype:
        """Of members of a matrix."""
        return self.direction.probe_dtype(self.pages[self.places[index].page].dtype)

    def noise(self, index: int) -> Any:
        """What members of a matrix are made with: its `Probes`, keys [K, 2] and coefficients [M, K]."""
        return jax.tree.map(lambda x: x[index], self._probes)

    def members(self, index: int, noise: Any) -> jax.Array:
        """All members' matrices, [M, *shape]; ``noise`` is its `noise`."""
        members = self._moved(index, noise)
        assert members is not None, "weights as they are need no probes"
        return members

    def product(self, index: int, member: jax.Array | None, x: jax.Array, dtype: Any) -> jax.Array:
        """x W^T by a member's matrix, which is not made before x and the last product are there.

        Nor does x become part of the product: where XLA's own kernel for that loses against cuBLAS, what computes x
        would be left as a pass of its own.
        """
        noise, x, _ = lax.optimization_barrier((self.noise(index), x, self._last))
        y = member_product(member, x, self.members(index, lax.stop_gradient(noise)), dtype)
        self._last = (lax.slice(y, (0,) * y.ndim, (1,) * y.ndim),)  # all of it would have to stay in memory
        return y

    @jax.named_scope("perturb")
    def rows(self, index: int, member: jax.Array | None, ids: jax.Array) -> jax.Array:
        """Rows ``ids`` [n] of a member's matrix, [n, n_in]: z is drawn for them alone."""
        place, probes = self.places[index], self.noise(index)
        matrix = place.of(self.settle_all())  # a move after rows were read would copy the page
        row = probes.matrix[member]

        def noise(k: Any) -> jax.Array:
            return row[k] * bits.draw(self.direction.pair, probes.keys[k], ids.astype(jnp.uint32), place.shape[-1])

        directions = probes.keys.shape[0]
        delta = noise(0) if directions == 1 else sum(map(noise, range(1, directions)), np.float32(0) + noise(0))
        return (matrix[ids].astype(jnp.float32) + delta).astype(self.dtype(index))

    def slab(self, index: int) -> Callable[[jax.Array, int], jax.Array]:
        """A function that gives so many rows from one on of all members' matrices, [M, rows, n_in]."""
        place, probes = self.places[index], self.noise(index)
        page = self.settle(index)
        pages = tuple(self.pages)
        columns = place.shape[-1]

        def cut(start: jax.Array, count: int) -> jax.Array:
            if place.size == page.size or page.size >= 1 << 31:  # numbers of rows fit in 32 bits
                w = lax.dynamic_slice_in_dim(place.of(pages), start, count)
            else:
                at = place.offset + start * columns
                w = lax.dynamic_slice(page, (at,), (count * columns,)).reshape(count, columns)
            shard = Shard((start, 0), place.shape)
            members = perturb(w, None, probes, self.dtype(index), pair=self.direction.pair, shard=shard)[1]
            assert members is not None
            return members

        return cut

    def settle(self, index: int) -> jax.Array:
        """The page of a matrix, which has taken its update."""
        if index in self._waiting:
            self._moved(index, None)
        return self.pages[self.places[index].page]

    def settle_all(self) -> tuple[jax.Array, ...]:
        """All pages, with every update taken."""
        for index in sorted(self._waiting):
            self._moved(index, None)
        return tuple(self.pages)

    def _moved(self, index: int, probes: Probes | None) -> jax.Array | None:
        place = self.places[index]
        terms = jax.tree.map(lambda x: x[index], self._terms) if index in self._waiting else None
        self._waiting.discard(index)
        page, members = perturb_in_page(
            self.pages[place.page],
            place.offset,
            place.shape,
            terms,
            probes,
            self.dtype(index),
            pair=self.direction.pair,
            rounding=self._rounding.apply,
        )
        self.pages[place.page] = page
        return members


class Probe:
    """One member's matrix, a `zo2jax.models.layers.Weight`: under ``jax.vmap`` over ``member`` = 0 .. M-1.

    Or, with None for a member, the one matrix that there is without probes.
    """

    def __init__(self, matrices: Matrices, index: int, member: jax.Array | None):
        """Makes nothing yet."""
        self._matrices, self._index, self._member = matrices, index, member
        self.shape, self.dtype = matrices.places[index].shape, matrices.dtype(index)

    def __getitem__(self, key: Any) -> "Probe":
        """Itself: Flax variables are read as ``variable[...]``."""
        return self

    def product(self, x: jax.Array, dtype: Any) -> jax.Array:
        """X [..., n_in] -> x W^T in ``dtype``."""
        return self._matrices.product(self._index, self._member, x, dtype)

    def array(self) -> jax.Array:
        """The matrix itself, for modules that know no `Weight`."""
        members = self._matrices.members(self._index, self._matrices.noise(self._index))
        return members if self._member is None else of_member(self._member, members)

    def rows(self, ids: jax.Array) -> jax.Array:
        """The rows of these indices, [*ids.shape, n_in]: z is drawn for them alone."""
        return self._matrices.rows(self._index, self._member, ids.reshape(-1)).reshape(*ids.shape, -1)

    def slabs(self, x: jax.Array) -> Callable[[jax.Array, int], "Slab"]:
        """Rows as matrices of their own."""
        slab = self._matrices.slab(self._index)
        return lambda start, count: Slab(self._member, slab(start, count))


class Slab:
    """Some rows of one member's matrix."""

    def __init__(self, member: jax.Array | None, members: jax.Array):
        """``members`` [M, rows, n_in]; [rows, n_in] without probes."""
        self._member, self._members = member, members
        self.shape, self.dtype = members.shape[-2:], members.dtype

    def product(self, x: jax.Array, dtype: Any) -> jax.Array:
        """X [..., n_in] -> x W^T in ``dtype``."""
        return member_product(self._member, x, self._members, dtype)


@jax.custom_batching.custom_vmap
def of_member(member: jax.Array, members: jax.Array) -> jax.Array:
    """``members[member]``; under vmap over all members in order, the members themselves, without a copy.

    >>> x = jnp.arange(3.0)
    >>> jax.vmap(of_member, in_axes=(0, None))(jnp.arange(3), x).tolist()
    [0.0, 1.0, 2.0]
    """
    return members[member]


@of_member.def_vmap
def _(size: int, in_batched: Any, member: jax.Array, members: jax.Array) -> Any:
    assert in_batched[0] and not in_batched[1], "members are counted once, from 0"
    return members, True


def member_product(member: jax.Array | None, x: jax.Array, members: jax.Array, dtype: Any) -> jax.Array:
    """x W^T by a member's matrix [n_out, n_in]: one batched product, or on CPUs, where that is slow, one after another.

    Without a member, by the one matrix that ``members`` is.

    >>> w = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
    >>> f = lambda m, x: member_product(m, x, w, jnp.float32)
    >>> jax.vmap(f)(jnp.arange(2), jnp.ones((2, 1, 2))).tolist()
    [[[1.0, 1.0]], [[2.0, 2.0]]]
    """
    if member is None:
        return product(x, members, dtype)
    if jax.default_backend() != "cpu":
        return product(x, of_member(member, members), dtype)

    @jax.custom_batching.custom_vmap
    def apart(member: jax.Array, x: jax.Array, members: jax.Array) -> jax.Array:
        return product(x, members[member], dtype)

    @apart.def_vmap
    def _(size: int, in_batched: Any, member: jax.Array, x: jax.Array, members: jax.Array) -> Any:
        assert in_batched[0] and not in_batched[2], "members are counted once, from 0"
        return jnp.stack([product(x[m] if in_batched[1] else x, members[m], dtype) for m in range(size)]), True

    return apart(member, x, members)
