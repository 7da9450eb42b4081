"""Matrices that are only read: what low-rank directions change of them stays beside them, as factors.

With W as it was at the last fold, P [n_out, rank] the sum of all updates since, and s what weight decay left of W,

    y_m = s (x_m W^T) + (x_m V) (P + sum_k C[m, k] U_k)^T

is the product by a member's matrix: all members share the product with W, which is never perturbed nor written back.
A fold, W <- s W + P V^T, makes room for another V. (LOZO, arXiv 2410.07698, section 3.2, moves W at every step.)

With momentum beta (LOZO-M, algorithm 2) a step is N <- beta N + (1 - beta) sum_k coefs_k U_k and P <- P - decay P + N,
which is momentum of the matrix itself as long as V stays. A fold takes N to the nearest one with the new V' that random
directions know of: N <- N (V^T V') / n_in, for N V^T ~ N (V^T V') V'^T / n_in.

With `zo2jax.lora` s is 1, and V is trained too: P and V are B, times its scale, and A^T of an adapter.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import bits
from pallas_kernels.lowrank import add_expanded, add_lowrank, thin_product
from pallas_kernels.perturb import Probes, Shard, Terms, perturb
from pallas_kernels.quantized import Codes
from pallas_kernels.reference import decayed
from zo2jax.directions import Direction, expand, factors, matrix_shape, u_pair
from zo2jax.leaves import leaf_id
from zo2jax.models.blocks import Params, set_leaf
from zo2jax.models.quantized import cut, dense, rows_of, times
from zo2jax.pages import Layout, Place, codes_in, encoded, flat
from zo2jax.pending import merged as with_pending
from zo2jax.pending import saved_pending
from zo2jax.probes import of_member
from zo2jax.updates import Update, by_leaf, folded, in_order, joined, repeated


class Basis(NamedTuple):
    """What the matrices of a model share between two folds.

    >>> Basis(jax.random.key(0), jnp.float32(0))._fields
    ('key', 'gone')
    """

    key: jax.Array
    """Typed PRNG key [], of V: the second one of each pair of `zo2jax.directions.step_keys`."""
    gone: jax.Array
    """float32 [], 1 - s: the fraction of W that went."""


class Sum(NamedTuple):
    """What is kept of a matrix: the sum of its updates, and their momentum.

    >>> Sum(jnp.zeros((3, 2))).n is None
    True
    """

    p: jax.Array
    """P, float32 [n_out, rank]; of an adapter P, and below it V: [n_out + n_in, rank]."""
    n: jax.Array | None = None
    """N, of the same shape; None for an optimizer without momentum."""

    @jax.named_scope("update")
    def moved(
        self,
        update: Update,
        keys: jax.Array,
        direction: Direction,
        shape: tuple[int, int],
        count: jax.Array | None = None,
    ) -> "Sum":
        """After an update of a matrix of this shape, with the leaf's ``keys`` uint32 [K, 2, 2]; exact products only.

        Or after the first ``count`` of several, whose arrays, and keys, have another axis in front.

        >>> from zo2jax.directions import lowrank
        >>> update = Update(jax.random.split(jax.random.key(0), (1, 2)), jnp.ones(1), jnp.float32(0), jnp.float32(0.5))
        >>> keys, start = jax.random.key_data(update.keys), jnp.zeros((3, 2))
        >>> plain, half = (x.moved(update, keys, lowrank(2), (3, 4)).p for x in (Sum(start), Sum(start, start)))
        >>> bool((half == 0.5 * plain).all())
        True
        """
        if update.decay.ndim:
            if self.n is None:  # all from one read of P
                terms = Terms(keys[..., 0, :], bits.cut12(update.coefs), bits.cut12(update.decay), count)
                return Sum(_moved(self.p, terms, direction, shape[0]))
            one = lambda held, update: held.moved(update, update.keys, direction, shape)  # noqa: E731
            return in_order(one, self, update._replace(keys=keys), count)

        def moved(x: jax.Array, coefs: jax.Array, decay: jax.Array) -> jax.Array:
            terms = Terms(keys[None, :, 0], bits.cut12(coefs)[None], bits.cut12(decay)[None])
            return _moved(x, terms, direction, shape[0])

        if self.n is None:
            return Sum(moved(self.p, update.coefs, update.decay))
        assert update.fresh is not None, "an optimizer with momentum says so in its updates"
        fresh = bits.cut12(update.fresh)
        n = moved(self.n, fresh * bits.cut12(update.coefs), fresh)
        decay = bits.cut12(lax.optimization_barrier(update.decay))
        return Sum(decayed(self.p, jnp.where(fresh > 0, n, 0), decay, jnp.float32), n)


def _moved(p: jax.Array, terms: Terms, direction: Direction, rows: int) -> jax.Array:
    """The P of a matrix of so many rows after ``terms``, from one read of it."""
    moved = [part.drawn(terms, None)[0] for part in _parts(p, direction, rows)]
    return moved[0] if len(moved) == 1 else jnp.concatenate(moved)


class Beside(NamedTuple):
    """What a visit is given beside the pages of a block.

    >>> Beside((), (), Basis(jax.random.key(0), jnp.float32(0))).own
    ()
    """

    own: tuple[Sum | None, ...]
    """Of the block's matrices; None for one without an adapter."""
    tied: tuple[Sum | None, ...]
    """Of those that it shares."""
    basis: Basis

    def matrices(
        self,
        places: Sequence[Place],
        pages: Sequence[jax.Array],
        ids: jax.Array,
        update: Update | None,
        probes: tuple[jax.Array | None, jax.Array | None],
        direction: Direction,
        tied: int | None = None,
        count: jax.Array | None = None,
    ) -> "Factors":
        """The block's matrices in a visit; with a number ``tied``, that one of those that it shares.

        >>> from zo2jax.directions import lowrank
        >>> nothing = Beside((), (), Basis(jax.random.key(0), jnp.float32(0)))
        >>> nothing.matrices([], [], jnp.zeros(0), None, (None, None), lowrank(2)).settle_all()
        ()
        """
        sums = self.own if tied is None else self.tied[tied : tied + 1]
        return Factors(places, pages, ids, sums, update, probes, self.basis, direction, count)


class Factored:
    """The matrix s W + F V^T of one member, a `zo2jax.models.layers.Weight`; under vmap over members, of all of them.

    Args:
        matrix: W [n_out, n_in], or its codes.
        dtype: of W where it is an array.
        scale: s, float32 [].
        f: float32 [n_out, rank]: P, and the member's probe; rank 0 for none.
        v: float32 [n_in, rank], of 8 significant bits; of an adapter the member's own.
        compute: how products with codes are made, as in `zo2jax.models.quantized.times`.
        thin: x V, if it is known of the x of all products.

    >>> w = Factored(jnp.eye(2), jnp.float32, jnp.float32(1), jnp.array([[0.5], [0.0]]), jnp.ones((2, 1)))
    >>> w.product(jnp.ones((1, 2)), jnp.float32).tolist()
    [[2.0, 1.0]]
    """

    def __init__(
        self,
        matrix: jax.Array | Codes,
        dtype: Any,
        scale: jax.Array,
        f: jax.Array,
        v: jax.Array,
        compute: str = "",
        thin: jax.Array | None = None,
    ):
        """Computes nothing yet."""
        self._thin = thin
        self._matrix, self._scale, self._f, self._v, self._compute = matrix, scale, f, v, compute
        self.shape, self.dtype = matrix.shape, jnp.dtype(dtype)

    def __getitem__(self, key: Any) -> "Factored":
        """Itself: Flax variables are read as ``variable[...]``."""
        return self

    def product(self, x: jax.Array, dtype: Any) -> jax.Array:
        """X [..., n_in] -> x by the transposed matrix, in ``dtype``."""
        x, matrix = lax.optimization_barrier((x, self._matrix))  # as in `zo2jax.probes.Matrices.product`
        matrix = lax.stop_gradient(matrix)
        exact = jnp.float32 if self._compute == "int8" else dtype  # what no unit of 16 bits made is not rounded to them
        y = times(x, matrix, exact, self._compute)
        if not self._v.shape[1]:
            return (self._scale * y.astype(jnp.float32)).astype(dtype)
        if self._thin is not None:
            with jax.named_scope("perturb"):
                return add_expanded(y, self._thin, self._f, self._scale).astype(dtype)
        return _with_lowrank(y, x, self._v, self._f, self._scale).astype(dtype)

    def array(self) -> jax.Array:
        """The matrix itself, for modules that know no `Weight`."""
        wide = self._scale * dense(self._matrix, jnp.float32).reshape(matrix_shape(self.shape))
        wide = wide + expand(self._f, self._v) if self._v.shape[1] else wide
        return wide.astype(self.dtype).reshape(self.shape)

    def rows(self, ids: jax.Array) -> jax.Array:
        """The rows of these indices, float32 [*ids.shape, n_in]."""
        found = self._scale * rows_of(self._matrix, ids)
        for j in range(self._v.shape[1]):
            found = found + self._f[ids, j][..., None] * self._v[:, j]
        return found

    def slabs(self, x: jax.Array) -> Callable[[jax.Array, int], "Factored"]:
        """Rows as matrices of their own; x V is made once for all of them."""
        thin = None
        if self._v.shape[1]:
            with jax.named_scope("perturb"):
                thin = thin_product(x, self._v)

        def slab(start: jax.Array, count: int) -> Factored:
            matrix, f = cut((self._matrix, self._f), start, count)
            return Factored(matrix, self.dtype, self._scale, f, self._v, self._compute, thin)

        return slab


@jax.custom_batching.custom_vmap
def _with_lowrank(y: jax.Array, x: jax.Array, v: jax.Array, f: jax.Array, scale: jax.Array) -> jax.Array:
    """scale y + (x V) F^T for y [.., n_out], x [.., n_in] of one member; under vmap of all, by one program."""
    return _of_members(y[None], x[None], v[None], f[None], scale)[0]


@_with_lowrank.def_vmap
def _(size: int, in_batched: Any, y: jax.Array, x: jax.Array, v: jax.Array, f: jax.Array, scale: jax.Array) -> Any:
    assert not in_batched[4], "members share what went of W"
    y, x, f = (
        a if batched else repeated(a, size)
        for a, batched in zip((y, x, f), (*in_batched[:2], in_batched[3]), strict=True)
    )
    return _of_members(y, x, v if in_batched[2] else v[None], f, scale), True


@jax.named_scope("perturb")
def _of_members(y: jax.Array, x: jax.Array, v: jax.Array, f: jax.Array, scale: jax.Array) -> jax.Array:
    rows, of_x = (a.reshape(len(a), -1, a.shape[-1]) for a in (y, x))
    return add_lowrank(rows, of_x, v, f, scale).reshape(y.shape)


class Factors:
    """The matrices of a block that are only read, each with its factors. Lives while a visit is traced.

    Args:
        places: of the matrices.
        pages: [length] arrays.
        ids: uint32 [matrices], the leaf ids.
        sums: of each matrix, before the update; None for one that stays as it is.
        update: or None.
        probes: (keys, matrix) as in `zo2jax.updates.move`.
        basis: with what is gone after the update.
        direction: one with a rank.
        count: of updates, as in `Sum.moved`.
    """

    def __init__(
        self,
        places: Sequence[Place],
        pages: Sequence[jax.Array],
        ids: jax.Array,
        sums: Sequence[Sum | None],
        update: Update | None,
        probes: tuple[jax.Array | None, jax.Array | None],
        basis: Basis,
        direction: Direction,
        count: jax.Array | None = None,
    ):
        """Adds the update to the sums."""
        self._places, self._pages, self._direction = places, pages, direction
        self._scale = 1 - bits.cut12(basis.gone)
        terms, self._probes = by_leaf(ids, update, *probes) if places else (None, None)
        self.sums = tuple(sums)
        if update is not None and terms is not None:
            keys = terms.keys if update.decay.ndim else terms.keys[:, 0]
            self.sums = tuple(
                None if one is None else one.moved(update, keys[i], direction, matrix_shape(place.shape), count)
                for i, (place, one) in enumerate(zip(places, sums, strict=True))
            )
        self._basis, self._ids = basis, ids

    @jax.named_scope("perturb")
    def weight(self, index: int, member: jax.Array | None) -> Factored:
        """A member's matrix; the one without a probe if ``member`` is None."""
        place = self._places[index]
        matrix, own = place.of(self._pages), self.sums[index]
        dtype, (rows, columns) = place.dtype or matrix.dtype, matrix_shape(place.shape)
        if own is None:
            nothing = jnp.float32(1), jnp.zeros((rows, 0)), jnp.zeros((columns, 0))
            return Factored(matrix, dtype, *nothing, place.compute)
        parts = _parts(own.p, self._direction, rows)
        if member is not None:
            assert self._probes is not None
            probes = Probes(self._probes.keys[index][:, 0], self._probes.matrix[index])
            drawn = [part.drawn(None, probes)[1] for part in parts]  # of all members
            parts = [part._replace(p=of_member(member, members)) for part, members in zip(parts, drawn, strict=True)]
        if self._direction.adapter is not None:
            return Factored(matrix, dtype, self._scale, parts[0].p, parts[1].p, place.compute)
        v = basis_of(self._basis, self._ids[index], place.shape, self._direction)
        return Factored(matrix, dtype, self._scale, parts[0].p, v, place.compute)

    def settle_all(self) -> tuple[Sum | None, ...]:
        """What is kept of each matrix, with the update."""
        return self.sums


class _Part(NamedTuple):
    """Rows of a P: all of it; or of an adapter's, in which z is another one, those of B or of A^T."""

    p: jax.Array
    start: int
    whole: tuple[int, int]
    pair: bits.WordMap

    def drawn(self, terms: Terms | None, probes: Probes | None) -> tuple[jax.Array, jax.Array | None]:
        """After ``terms``, and probes of it: each number of U is drawn once, for all of them. Keys are those of U."""
        shard = None if self.p.shape == self.whole else Shard((self.start, 0), self.whole)
        return perturb(self.p, terms, probes, pair=self.pair, shard=shard)


def _parts(p: jax.Array, direction: Direction, rows: int) -> list[_Part]:
    """Those of the P of a matrix of so many rows."""
    whole = (p.shape[0], p.shape[1])
    if direction.adapter is None:
        return [_Part(p, 0, whole, u_pair(direction))]
    return [_Part(p[:rows], 0, whole, u_pair(direction)), _Part(p[rows:], rows, whole, direction.pair)]


@jax.jit
@jax.named_scope("update")
def after(basis: Basis, update: Update) -> Basis:
    """What is gone after an update: s <- s - decay s.

    >>> update = Update(jax.random.split(jax.random.key(0), (1, 2)), jnp.zeros(1), jnp.float32(0.25))
    >>> float(after(after(Basis(jax.random.key(0), jnp.float32(0)), update), update).gone)
    0.4375
    """
    decay = bits.cut12(update.decay)
    return basis._replace(gone=basis.gone + (decay - lax.optimization_barrier(decay * basis.gone)))


@partial(jax.jit, static_argnames=("shape", "direction"))
def basis_of(basis: Basis, ident: jax.Array, shape: tuple[int, ...], direction: Direction) -> jax.Array:
    """V of a leaf of this shape, or what that of an adapter begins with: float32 [n_in, rank].

    >>> from zo2jax.directions import lowrank
    >>> basis_of(Basis(jax.random.key(0), jnp.float32(0)), jnp.uint32(1), (4, 3), lowrank(2)).shape
    (3, 2)
    """
    key = bits.fold(jax.random.key_data(basis.key), jnp.asarray(ident))
    return factors(direction, jnp.stack([key, key]), matrix_shape(shape))[1]


def projected(n: jax.Array, v: jax.Array, new: jax.Array) -> jax.Array:
    """N (V^T V') / n_in: the momentum N [n_out, rank] of a fold from V to V' [n_in, rank].

    V and V' are independent and their entries have variance 1, so that V' V'^T / n_in is the identity on average. Two
    programs of their own, so that nothing is fused with them.

    >>> projected(jnp.ones((3, 1)), jnp.array([[1.0], [1.0]]), jnp.array([[1.0], [0.5]])).tolist()
    [[0.75], [0.75], [0.75]]
    """
    return _along(n, _overlap(v, new))


@jax.jit
def _overlap(v: jax.Array, new: jax.Array) -> jax.Array:
    """V^T V' / n_in, by a sum whose order does not depend on the backend; products of 8 bits are exact."""
    terms, count = v[:, :, None] * new[:, None, :], len(v)
    terms = jnp.pad(terms, ((0, (1 << (count - 1).bit_length()) - count), (0, 0), (0, 0)))
    while len(terms) > 1:
        terms = terms[: len(terms) // 2] + terms[len(terms) // 2 :]
    return terms[0] * np.float32(1 / count)


@jax.jit
def _along(n: jax.Array, overlap: jax.Array) -> jax.Array:
    high = bits.cut12(overlap)
    return expand(n, high.T) + expand(n, (overlap - high).T)


@partial(jax.jit, static_argnames="dtype")
def merged(
    w: jax.Array | Codes, beside: tuple[jax.Array, jax.Array, jax.Array] | None, low: jax.Array | None, dtype: Any
) -> jax.Array:
    """A matrix with what is beside it, (P, V, gone), rounded to nearest: a copy to look at or to export.

    >>> merged(jnp.ones((2, 3)), (jnp.zeros((2, 4)), jnp.ones((3, 4)), jnp.float32(0.5)), None, jnp.float32).tolist()[0]
    [0.5, 0.5, 0.5]
    """
    wide = dense(w, jnp.float32) if low is None or isinstance(w, Codes) else joined(w, low)
    return (wide if beside is None else folded(wide, *beside)).astype(dtype)


def merge(block: str, leaves: Params, beside: Params, shapes: Params, layout: Layout, direction: Direction) -> Params:
    """The leaves of a block as arrays of the dtypes of ``shapes``, of which what is beside them is a part.

    ``leaves`` are what `zo2jax.stream.Stream.stored` gives, and ``beside`` its `beside`; of codes, the result is what
    they stand for, and not their masters.

    >>> from zo2jax.directions import lowrank
    >>> beside = {"p": {"w": jnp.ones((2, 1))}, "v": {"w": jnp.ones((3, 1))}, "gone": jnp.float32(0)}
    >>> shapes = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    >>> merge("", {"w": jnp.ones((2, 3))}, beside, shapes, Layout.of(shapes), lowrank(1))["w"].tolist()[0]
    [2.0, 2.0, 2.0]
    """
    out: Params = {}
    places = dict(layout.matrices)
    named, lows, p, v = (flat(tree) for tree in (leaves, *(beside.get(x, {}) for x in ("low", "p", "v"))))
    pending = saved_pending(beside) if beside and not direction.rank else None
    for name, shape in flat(shapes).items():
        w = named[name] if name in named else codes_in(named, name)
        place = places.get(name)
        if place is not None and place.scale is not None and not isinstance(w, Codes):
            w = encoded(w, place)
        dtype = jnp.dtype(shape.dtype)
        if isinstance(w, Codes) or (place is not None and beside) or w.dtype != dtype:
            given, low = jax.tree.map(jnp.asarray, (w, lows.get(name)))
            if pending is not None and place is not None:
                wide = given if low is None else joined(given, low)
                moved = with_pending(wide, pending, jnp.uint32(leaf_id(f"{block}.{name}")), dtype, direction)
            else:
                there = (p[name], v[name], beside["gone"]) if name in p else None
                moved = merged(given, jax.tree.map(jnp.asarray, there), low, dtype)
            w = moved if isinstance(jax.tree.leaves(w)[0], jax.Array) else np.asarray(moved)
        set_leaf(out, name, w)
    return out
