"""Updates, and the only code that moves weights.

``theta <- theta - decay * theta + sum_k coefs[k] * z(keys[k])``, in float32, rounded once to the leaf's dtype.

The decay is kept as the *fraction that goes* (learning rate x weight decay, say 1e-7), not as the factor that
stays (0.9999999): a factor cut to 12 bits could not come nearer to 1 than 0.99976.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import bits
from zo2jax.directions import Direction, PyTree, is_trained, matrix_shape, normal

Noise = Callable[[], jax.Array]

_SMALL_LEAF = 1 << 20
"""Elements up to which equal leaves are moved together; see `_together`."""


class Update(NamedTuple):
    """All that a step leaves behind: theta <- theta - decay * theta + sum_k coefs[k] * z(keys[k]).

    The coefficients carry the sign and the learning rate, -lr * g_k for MeZO's SGD (arXiv 2305.17333,
    algorithm 1). ``decay`` applies to leaves of two or more dimensions. Both are cut to 12 significant bits.

    >>> Update(jax.random.split(jax.random.key(0), 2), jnp.zeros(2), jnp.float32(0)).coefs.shape
    (2,)
    """

    keys: jax.Array
    """Typed PRNG keys of the K directions, shape [K]."""
    coefs: jax.Array
    """float32 [K]."""
    decay: jax.Array
    """float32 [], the fraction of a weight that goes."""


@dataclass(frozen=True)
class Rounding:
    """How float32 results become 16-bit weights; float32 leaves are never rounded.

    ``apply(x, dtype, noise)`` maps float32 ``x`` to ``dtype``; ``noise()`` gives uint32 integers in [0, 65536)
    of the same shape, addressed like z.

    >>> nearest, stochastic
    (nearest, stochastic)
    """

    name: str
    apply: Callable[[jax.Array, Any, Noise], jax.Array]

    def __repr__(self) -> str:
        return self.name


def _stochastic(x: jax.Array, dtype: Any, noise: Noise) -> jax.Array:
    """Rounds to one of the two neighbours in ``dtype``, away from zero with probability (x - lower) / spacing."""
    raw = lax.bitcast_convert_type(x, jnp.uint32)
    sign, magnitude = raw & np.uint32(1 << 31), raw & np.uint32(0x7FFFFFFF)
    if dtype == jnp.bfloat16:
        moved = (magnitude + noise()) & np.uint32(0xFFFF0000)
    else:  # float16: 13 of float32's 23 fraction bits go; below 2**-14 the spacing is 2**-24 whatever the exponent
        normal_ = (magnitude + (noise() >> np.uint32(3))) & np.uint32(0xFFFFE000)
        steps = lax.bitcast_convert_type(magnitude, jnp.float32) * np.float32(2.0**24)
        lower = jnp.floor(steps)
        up = noise().astype(jnp.float32) * np.float32(2.0**-16) < steps - lower
        tiny = (lower + up.astype(jnp.float32)) * np.float32(2.0**-24)
        is_tiny = magnitude < np.uint32(0x38800000)  # 2**-14
        moved = jnp.where(is_tiny, lax.bitcast_convert_type(tiny, jnp.uint32), normal_)
    rounded = lax.bitcast_convert_type(moved | sign, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


nearest = Rounding("nearest", lambda x, dtype, noise: x.astype(dtype))
"""Round to nearest, ties to even. Loses updates smaller than half a spacing (91 % of 2e-6 at bf16 weights of 0.02)."""

stochastic = Rounding("stochastic", _stochastic)
"""Unbiased rounding, seeded by the update's first key, so that a replay rounds alike."""


def _decayed(w: jax.Array, delta: jax.Array, decay: jax.Array | None) -> jax.Array:
    """w + (delta - decay * w) in float32. Every product is exact, so no fusion can change a bit."""
    if decay is not None:
        high = bits.cut12(w)  # two halves of 12 bits, whose products with the decay's 12 bits are exact
        delta = delta - decay * high
        delta = delta - decay * (w - high)
    return w + delta


def _move_leaf(
    w: jax.Array,
    leaf_keys: jax.Array,
    coefs: jax.Array,
    decay: jax.Array | None,
    direction: Direction,
    rounding: Rounding,
) -> jax.Array:
    """One leaf after w - decay w + sum_k coefs[k] z(leaf_keys[k]), in its own dtype; leaf_keys uint32 [K, 2]."""
    rows, columns = matrix_shape(w.shape)
    row_numbers = jnp.arange(rows, dtype=jnp.uint32)

    def drawn(pair: bits.WordMap, key: jax.Array, stream: int) -> jax.Array:
        return bits.draw(pair, key, row_numbers, columns, stream=stream).reshape(w.shape)

    def add(k: jax.Array, delta: jax.Array) -> jax.Array:
        return delta + coefs[k] * drawn(direction.pair, leaf_keys[k], 0)

    terms = leaf_keys.shape[0]
    delta = lax.fori_loop(0, terms, add, jnp.zeros(w.shape, jnp.float32), unroll=terms == 1)
    moved = _decayed(w.astype(jnp.float32), delta, decay if w.ndim >= 2 else None)
    if w.dtype == jnp.float32:
        return moved
    return rounding.apply(moved, w.dtype, lambda: drawn(bits.uniform16_pair, leaf_keys[0], bits.ROUNDING_STREAM))


@partial(jax.jit, static_argnames=("direction", "rounding"))
def _move_leaves(
    leaves: list[jax.Array],
    leaf_keys: jax.Array,
    coefs: jax.Array,
    decay: jax.Array | None,
    direction: Direction,
    rounding: Rounding,
) -> list[jax.Array]:
    """Leaves of one shape and dtype, leaf_keys uint32 [leaves, K, 2]; several are moved as one stacked array."""

    def move(w: jax.Array, keys: jax.Array) -> jax.Array:
        return _move_leaf(w, keys, coefs, decay, direction, rounding)

    if len(leaves) == 1:
        return [move(leaves[0], leaf_keys[0])]
    return list(jax.vmap(move)(jnp.stack(leaves), leaf_keys))


def _together(leaves: list[Any]) -> list[list[int]]:
    """Indices of the trained leaves, those that move together in one list: equal in shape and dtype, and small.

    Law 1 makes the grouping invisible in the bits. It shortens compilation (one program for all norms of a model,
    say) and fills a device that one small leaf would not; a large leaf would only pay for the copy.
    """
    groups: dict[Any, list[int]] = {}
    for i, w in enumerate(leaves):
        if is_trained(w):
            groups.setdefault((w.shape, w.dtype) if w.size <= _SMALL_LEAF else i, []).append(i)
    return list(groups.values())


def _move_tree(
    params: PyTree,
    leaf_ids: jax.Array,
    keys: jax.Array,
    coefs: jax.Array,
    decay: jax.Array | None,
    direction: Direction,
    rounding: Rounding,
) -> PyTree:
    if decay is not None:
        # Where weights and decay are constants of a program, XLA would reorder the sums of their products.
        decay = lax.optimization_barrier(decay)
    leaves, treedef = jax.tree.flatten(params)
    data = jax.random.key_data(keys)
    leaf_keys = jax.vmap(lambda ident: jax.vmap(lambda key: bits.fold(key, ident))(data))(jnp.asarray(leaf_ids))
    moved = list(leaves)
    for group in _together(leaves):
        inputs = [jnp.asarray(leaves[i]) for i in group]
        # The barrier keeps the choice of keys out of the kernels, so that equal leaves share one on the GPU.
        keys_here = lax.optimization_barrier(leaf_keys[np.array(group)])
        outputs = _move_leaves(inputs, keys_here, coefs, decay, direction, rounding)
        for i, w in zip(group, outputs, strict=True):
            moved[i] = w
    return jax.tree.unflatten(treedef, moved)


def apply_update(
    params: PyTree,
    update: Update,
    leaf_ids: jax.Array,
    *,
    direction: Direction = normal,
    rounding: Rounding = stochastic,
) -> PyTree:
    """Moves the weights: theta <- theta - decay * theta + sum_k coefs[k] * z(keys[k]).

    Computed in float32 (small terms are summed first) and rounded once, to each leaf's dtype. ``leaf_ids`` are
    those of `zo2jax.directions.leaf_ids`. Integer leaves and keys are returned as they are.

    >>> from zo2jax.directions import leaf_ids
    >>> params = {"w": jnp.ones((2, 2))}
    >>> update = Update(jax.random.split(jax.random.key(0), 1), jnp.zeros(1), jnp.float32(0.25))
    >>> apply_update(params, update, leaf_ids(params))["w"].tolist()
    [[0.75, 0.75], [0.75, 0.75]]
    """
    coefs, decay = bits.cut12(update.coefs), bits.cut12(update.decay)
    return _move_tree(params, jnp.asarray(leaf_ids), update.keys, coefs, decay, direction, rounding)


def perturb(
    params: PyTree, keys: jax.Array, coefs: jax.Array, leaf_ids: jax.Array, *, direction: Direction = normal
) -> PyTree:
    """A probe: theta + sum_k coefs[k] * z(keys[k]), a new pytree; rounded to nearest in 16-bit leaves.

    >>> from zo2jax.directions import leaf_ids, rademacher
    >>> params = {"w": jnp.zeros((1, 2))}
    >>> probe = perturb(params, jax.random.split(jax.random.key(0), 1), jnp.ones(1), leaf_ids(params),
    ...                 direction=rademacher)
    >>> jnp.abs(probe["w"]).tolist()
    [[1.0, 1.0]]
    """
    return _move_tree(params, jnp.asarray(leaf_ids), keys, bits.cut12(coefs), None, direction, nearest)
