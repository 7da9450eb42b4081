"""One reference for each operation, in plain ``jax.numpy``: the definition that kernels are compared with.

It is also the path wherever no kernel applies (CPUs, older GPUs), so it is written to compile well under XLA.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import bits

Rounding = Callable[[jax.Array, Any, bits.Noise], jax.Array]


class Terms(NamedTuple):
    """U updates, one after the other: w <- w - decay[u] w + sum_k coefs[u, k] z(keys[u, k]).

    Coefficients and decays have 12 significant bits (`pallas_kernels.bits.cut12`). Each update is rounded on its own,
    so that many at once give the weights that they would give one by one.

    >>> Terms(jnp.zeros((1, 1, 2), jnp.uint32), jnp.zeros((1, 1)))._fields
    ('keys', 'coefs', 'decay', 'used')
    """

    keys: jax.Array
    """uint32 [U, K, 2]: the threefry keys of the array's noise."""
    coefs: jax.Array
    """float32 [U, K]."""
    decay: jax.Array | None = None
    """float32 [U], the fraction of a weight that goes; None for none."""
    used: jax.Array | None = None
    """int32 [], how many of them there are, from the first on; None for all."""


class Probes(NamedTuple):
    """M probes of an array: w + sum_k matrix[m, k] z(keys[k]), each rounded to nearest.

    >>> Probes(jnp.zeros((1, 2), jnp.uint32), jnp.array([[1e-3], [-1e-3]])).matrix.shape
    (2, 1)
    """

    keys: jax.Array
    """uint32 [K, 2]."""
    matrix: jax.Array
    """float32 [M, K], 12 significant bits."""


class Shard(NamedTuple):
    """Where an array lies in a larger one, whose noise it takes part in.

    ``start`` may be traced (an index inside ``jax.shard_map(..., check_vma=False)``), except that a traced offset along
    the last axis must be a multiple of 4.

    >>> Shard(start=(2, 0), shape=(4, 8)).shape
    (4, 8)
    """

    start: tuple[Any, ...]
    """The offset of the first element along each axis."""
    shape: tuple[int, ...]
    """The shape of the whole array."""


class Address(NamedTuple):
    """How the elements of an array map to counters, but for where the array starts; made by `address`. Hashable.

    >>> address((2, 3, 5), None)[0].row_shape, address((2, 3, 5), Shard((0, 3, 0), (2, 9, 5)))[0].row_shape
    ((6,), (2, 3))
    """

    row_shape: tuple[int, ...]
    """Axes that count rows; the first of them may have any length."""
    row_strides: tuple[int, ...]
    """How far apart neighbours along those axes are, in rows of the whole array."""
    lead: int
    """Columns of the first group that come before the array."""
    columns: int

    @property
    def row_count(self) -> int:
        """The rows of the array."""
        return math.prod(self.row_shape)

    @property
    def groups(self) -> int:
        """The groups of four columns in a row."""
        return -(-(self.lead + self.columns) // bits.GROUP)

    def rows(self, local: jax.Array) -> jax.Array:
        """How far rows of the array, counted from 0, are from its first one, in rows of the whole array (uint32)."""
        number = jnp.zeros_like(local)
        for length, stride in reversed(list(zip(self.row_shape[1:], self.row_strides[1:], strict=True))):
            outer = local // np.uint32(length)
            number = number + (local - outer * np.uint32(length)) * np.uint32(stride)
            local = outer
        return number + local * np.uint32(self.row_strides[0])


def address(shape: tuple[int, ...], shard: Shard | None) -> tuple[Address, jax.Array]:
    """The address of an array of this shape: a matrix of prod(shape[:-1]) rows, or the part of one that it is.

    The second result, uint32 [2], is its origin: the row, and the group of four columns, of the first element.

    Raises:
        ValueError: if a shard does not lie within its array, or that has 2**32 rows or 2**33 columns or more.

    >>> address((4, 6), Shard((8, 4), (16, 16)))[1].tolist()
    [8, 1]
    """
    whole, start = (shape, (0,) * len(shape)) if shard is None else (tuple(shard.shape), tuple(shard.start))
    if not len(shape) == len(whole) == len(start):
        raise ValueError(f"shard {shard} of an array of shape {shape}: expected one offset and one length an axis")
    start = tuple(s if isinstance(s, jax.core.Tracer) else int(s) for s in start)
    for offset, length, total in zip(start, shape, whole, strict=True):
        if isinstance(offset, int) and not 0 <= offset <= total - length:
            raise ValueError(f"a shard of shape {shape} at {start} does not lie within an array of shape {whole}")
    if not shape:
        shape, whole, start = (1,), (1,), (0,)
    if math.prod(whole[:-1]) >= 1 << 32 or whole[-1] >= 1 << 33:
        raise ValueError(f"an array of shape {whole} has too many rows or columns: expected below 2**32 and 2**33")
    strides = tuple(math.prod(whole[axis + 1 : -1]) for axis in range(len(whole) - 1))
    row = sum((jnp.asarray(s, jnp.uint32) * np.uint32(d) for s, d in zip(start, strides, strict=False)), np.uint32(0))
    lead = int(start[-1]) % bits.GROUP if isinstance(start[-1], int) else 0
    group = jnp.asarray(start[-1] // bits.GROUP, jnp.uint32)
    # Axes that the shard spans whole fold into the one before them, so that most arrays have a single axis of rows.
    axes: list[tuple[int, int]] = []
    for axis, stride in enumerate(strides):
        if axes and shape[axis] == whole[axis]:
            axes[-1] = (axes[-1][0] * shape[axis], stride)
        else:
            axes.append((shape[axis], stride))
    lengths, steps = zip(*(axes or [(1, 1)]), strict=True)
    return Address(lengths, steps, lead, shape[-1]), jnp.stack([jnp.asarray(row), group])


def decayed(w: jax.Array, delta: jax.Array, decay: jax.Array | None, dtype: Any) -> jax.Array:
    """w + (delta - decay w) for float32 ``w`` that comes from ``dtype``; every product is exact, whatever is fused.

    >>> float(decayed(jnp.float32(1.0), jnp.float32(0.5), jnp.float32(0.25), jnp.float32))
    1.25
    """
    if decay is None:
        return w + delta
    if dtype != jnp.float32:  # at most 11 bits, times the decay's 12
        return w + (delta - decay * w)
    high = bits.cut12(w)  # two halves of 12 bits
    return w + ((delta - decay * high) - decay * (w - high))


def perturb(
    where: Address,
    origin: jax.Array,
    w: jax.Array,
    terms: Terms | None,
    probes: Probes | None,
    dtype: Any = None,
    *,
    pair: bits.WordMap,
    rounding: Rounding,
) -> tuple[jax.Array, jax.Array | None]:
    """The weights after ``terms``, and the probes of those: (w, [M, *w.shape] or None). See `pallas_kernels.perturb`.

    >>> probes = Probes(jnp.zeros((1, 2), jnp.uint32), jnp.array([[1.0], [-1.0]]))
    >>> maps = {"pair": bits.rademacher_pair, "rounding": bits.round_to_nearest}
    >>> perturb(*address((3,), None), jnp.ones(3), None, probes, **maps)[1].tolist()
    [[2.0, 2.0, 0.0], [0.0, 0.0, 2.0]]
    """
    rows = where.rows(jnp.arange(where.row_count, dtype=jnp.uint32)) + origin[0]

    columns = where.lead + where.columns

    def words(key: jax.Array) -> bits.Words:
        return bits.words(key, rows, columns, origin[1])

    def values(of: bits.WordMap, words: bits.Words) -> jax.Array:
        return bits.spread(of, words, columns)[:, where.lead :].reshape(w.shape)

    wide = w.astype(jnp.float32)
    if terms is not None:
        # Where weights and decay are constants of a program, XLA would reorder the sums of their products.
        decay = None if terms.decay is None else lax.optimization_barrier(terms.decay)

        @jax.named_scope("update")
        def update(u: jax.Array, x: jax.Array) -> jax.Array:
            keys, coefs = terms.keys[u], terms.coefs[u]
            first = words(keys[0])  # they serve the rounding too

            def term(k: Any) -> jax.Array:
                return coefs[k] * values(pair, first if len(coefs) == 1 else words(keys[k]))

            delta = _sum(len(coefs), term, jnp.zeros(w.shape, jnp.float32))
            x = decayed(x, delta, None if decay is None else decay[u], w.dtype)
            if w.dtype == jnp.float32:
                return x
            x = rounding(x, w.dtype, lambda: values(bits.rounding_pair, first))
            # Without the barrier XLA drops the rounding for whoever reads the float32 value.
            return lax.optimization_barrier(x).astype(jnp.float32)

        if terms.used is None and len(terms.keys) == 1:
            wide = update(jnp.int32(0), wide)
        else:
            wide = lax.fori_loop(0, len(terms.keys) if terms.used is None else terms.used, update, wide)
        w = wide.astype(w.dtype)
    if probes is None:
        return w, None
    return w, members(wide, probes, lambda key: values(pair, words(key)), w.dtype if dtype is None else dtype)


@jax.named_scope("perturb")
def members(wide: jax.Array, probes: Probes, z: Callable[[jax.Array], jax.Array], dtype: Any) -> jax.Array:
    """wide + sum_k matrix[m, k] z(keys[k]) for float32 ``wide``, rounded once to ``dtype``: [M, *wide.shape].

    >>> probes = Probes(jnp.zeros((1, 2), jnp.uint32), jnp.array([[1.0], [-1.0]]))
    >>> members(jnp.zeros(2), probes, lambda key: jnp.array([1.0, 2.0]), jnp.float32).tolist()
    [[1.0, 2.0], [-1.0, -2.0]]
    """
    matrix = probes.matrix.reshape(*probes.matrix.shape, *(1,) * wide.ndim)
    start = jnp.zeros((matrix.shape[0], *wide.shape), jnp.float32)
    delta = _sum(matrix.shape[1], lambda k: matrix[:, k] * z(probes.keys[k]), start)
    return (wide + delta).astype(dtype)


def _sum(count: int, term: Callable[[Any], jax.Array], start: jax.Array) -> jax.Array:
    """The sum of ``count`` terms. A single one is not added to zero, which would turn -0 into +0 in some programs."""
    return term(0) if count == 1 else lax.fori_loop(0, count, lambda k, total: total + term(k), start)
