"""Updates, and the only code that moves weights.

``theta <- theta - decay * theta + sum_k coefs[k] * z(keys[k])``, in float32, rounded once to the leaf's dtype.

The decay is kept as the *fraction that goes* (learning rate x weight decay, say 1e-7), not as the factor that
stays (0.9999999): a factor cut to 12 bits could not come nearer to 1 than 0.99976.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import bits
from pallas_kernels.implementations import choose
from pallas_kernels.perturb import Probes, Terms
from pallas_kernels.perturb import perturb as perturb_leaf
from pallas_kernels.reference import decayed
from zo2jax.directions import Direction, check_of_weights, expand, factors, matrix_shape, normal, trained_leaves
from zo2jax.leaves import PyTree

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
    """Typed PRNG keys of the K directions, shape [K]; of low-rank ones [K, 2] (`zo2jax.directions.step_keys`)."""
    coefs: jax.Array
    """float32 [K]."""
    decay: jax.Array
    """float32 [], the fraction of a weight that goes."""
    fresh: jax.Array | None = None
    """float32 [], of an optimizer with momentum beta: 1 - beta, the part of the momentum that is this update's. 0: no
    update, which moves nothing, the momentum included."""


def in_order(one: Callable[[Any, Update], Any], held: Any, updates: Update, count: Any) -> Any:
    """``held = one(held, update)`` for the first ``count`` of updates, whose arrays have another axis in front.

    Or for one update as it is: without a loop, which takes longer to compile and to run.

    >>> updates = Update(jax.random.split(jax.random.key(0), 3)[:, None], jnp.ones((3, 1)), jnp.zeros(3))
    >>> in_order(lambda total, update: total + update.coefs, jnp.zeros(1), updates, 2).tolist()
    [2.0]
    """
    if updates.decay.ndim == 0:
        return one(held, updates)
    return lax.fori_loop(0, count, lambda i, held: one(held, jax.tree.map(lambda x: x[i], updates)), held)


@dataclass(frozen=True)
class Rounding:
    """How float32 results become 16-bit weights; float32 leaves are never rounded.

    ``apply(x, dtype, noise)`` maps float32 ``x`` to ``dtype``; ``noise()`` gives uint32 integers in [0, 65536)
    of the same shape, addressed like z.

    >>> nearest, stochastic
    (nearest, stochastic)
    """

    name: str
    apply: Callable[[jax.Array, Any, bits.Noise], jax.Array]

    def __repr__(self) -> str:
        return self.name


nearest = Rounding("nearest", bits.round_to_nearest)
"""Round to nearest, ties to even. Loses updates smaller than half a spacing (91 % of 2e-6 at bf16 weights of 0.02)."""

stochastic = Rounding("stochastic", bits.round_stochastically)
"""Unbiased rounding, seeded by the update's first key, so that a replay rounds alike."""


residual = Rounding("residual", bits.round_to_nearest)
"""Exact: what rounding to nearest leaves of a float32 weight stays beside its bfloat16 as an int16. For the folds of
directions with which `zo2jax.Run` only reads; it takes as many bytes again, which are touched at folds only."""


ROUNDINGS = {rounding.name: rounding for rounding in (nearest, stochastic, residual)}
"""By name."""


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float32 ``x`` as (bfloat16, int16): 2^16 times the bits of the one, plus the other, are the bits of x.

    >>> x = jnp.array([1.0, -1e-3, 3.14159265], jnp.float32)
    >>> bool((joined(*split(x)) == x).all())
    True
    """
    word = lax.bitcast_convert_type(x, jnp.uint32)
    high = (word + np.uint32(0x8000)) >> 16
    low = lax.bitcast_convert_type(word - (high << 16), jnp.int32).astype(jnp.int16)
    return lax.bitcast_convert_type(high.astype(jnp.uint16), jnp.bfloat16), low


def joined(high: jax.Array, low: jax.Array) -> jax.Array:
    """What `split` was given, float32.

    >>> joined(jnp.ones(1, jnp.bfloat16), jnp.zeros(1, jnp.int16)).tolist()
    [1.0]
    """
    word = lax.bitcast_convert_type(high, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(word + lax.bitcast_convert_type(low.astype(jnp.int32), jnp.uint32), jnp.float32)


@partial(jax.jit, static_argnames=("direction", "rounding"))
def _move_leaves(
    leaves: list[jax.Array],
    terms: Terms | None,
    probes: Probes | None,
    direction: Direction,
    rounding: Rounding,
) -> list[tuple[jax.Array, jax.Array | None]]:
    """Leaves of one shape and dtype, with keys [leaves, ...]; several are moved as one stacked array.

    Returns the weights after ``terms`` and the probes of those [M, ...], leaf by leaf.
    """
    used = None if terms is None or terms.used is None else terms.used[0]  # of every leaf, whatever is stacked
    terms = terms if terms is None else terms._replace(used=None)

    def one(w: jax.Array, terms: Terms | None, probes: Probes | None, implementation: str | None) -> Any:
        terms = terms if terms is None else terms._replace(used=used)
        if direction.rank and w.ndim >= 2:
            return _move_low_rank(w, terms, probes, direction, rounding)
        if direction.rank:  # dense: the first key of each pair
            terms = terms if terms is None else terms._replace(keys=terms.keys[..., 0, :])
            probes = probes if probes is None else probes._replace(keys=probes.keys[..., 0, :])
        if terms is not None and w.ndim < 2:
            terms = terms._replace(decay=None)
        how: dict[str, Any] = {"pair": direction.pair, "rounding": rounding.apply, "implementation": implementation}
        dtype = direction.probe_dtype(w.dtype) if w.ndim >= 2 else w.dtype
        return perturb_leaf(w, terms, probes, dtype, **how)

    # A loop of small programs, one for each of several updates, takes a GPU longer than a kernel for each leaf.
    if len(leaves) == 1 or (used is not None and choose("perturb", None).startswith("mosaic")):
        each = [jax.tree.map(lambda x, i=i: x[i], (terms, probes)) for i in range(len(leaves))]
        return [one(w, of_w, probes_of_w, None) for w, (of_w, probes_of_w) in zip(leaves, each, strict=True)]
    moved, members = jax.vmap(partial(one, implementation="xla"))(jnp.stack(leaves), terms, probes)
    return [(w, None if members is None else members[i]) for i, w in enumerate(moved)]


def _move_low_rank(
    w: jax.Array, terms: Terms | None, probes: Probes | None, direction: Direction, rounding: Rounding
) -> tuple[jax.Array, jax.Array | None]:
    """A matrix after ``terms``, each W + P V^T with P = sum_k coefs[k] U_k, and the probes of that."""
    shape = matrix_shape(w.shape)

    def pair(keys: jax.Array, coefs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return combined(keys, coefs, shape, direction), factors(direction, keys[0], shape)[1]

    def update(u: Any, w: jax.Array) -> jax.Array:
        assert terms is not None
        p, v = pair(terms.keys[u], terms.coefs[u])
        # Without the barrier XLA drops the rounding for whoever reads the float32 value.
        return lax.optimization_barrier(
            folded(w, p, v, None if terms.decay is None else terms.decay[u], rounding, terms.keys[u, 0, 0])
        )

    if terms is not None:
        updates = len(terms.coefs)
        one = terms.used is None and updates == 1
        w = update(0, w) if one else lax.fori_loop(0, updates if terms.used is None else terms.used, update, w)
    members = None if probes is None else [folded(w, *pair(probes.keys, row)) for row in probes.matrix]
    return w, None if members is None else jnp.stack(members)


def combined(keys: jax.Array, coefs: jax.Array, shape: tuple[int, int], direction: Direction) -> jax.Array:
    """sum_k coefs[k] U_k of a matrix, float32 [rows, rank]; ``keys`` uint32 [K, 2, 2], ``coefs`` of 12 bits.

    >>> from zo2jax.directions import lowrank
    >>> combined(jnp.zeros((3, 2, 2), jnp.uint32), jnp.ones(3), (4, 5), lowrank(2)).shape
    (4, 2)
    """

    def term(k: Any) -> jax.Array:
        return coefs[k] * factors(direction, keys[k], shape)[0]

    return lax.fori_loop(1, len(coefs), lambda k, total: total + term(k), term(0)) if len(coefs) > 1 else term(0)


def folded(
    w: jax.Array,
    p: jax.Array,
    v: jax.Array,
    gone: jax.Array | None = None,
    rounding: Rounding = nearest,
    key: jax.Array | None = None,
    first: jax.Array | int = 0,
) -> jax.Array:
    """W - gone W + P V^T: in float32, rounded once to W's dtype; the same bits in any program.

    P float32 [rows, rank], V [columns, rank] as of `zo2jax.directions.factors`, ``gone`` float32 [] or None; ``key``
    uint32 [2] is that of the noise that `stochastic` rounding takes. W and P may be rows of a larger matrix, from
    ``first`` on.

    >>> folded(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((3, 1)), jnp.float32(0.5)).tolist()[0]
    [1.5, 1.5, 1.5]
    """
    rows, columns = matrix_shape(w.shape)
    gone = None if gone is None else lax.optimization_barrier(bits.cut12(gone))
    wide = decayed(w.astype(jnp.float32).reshape(rows, columns), expand(p, v), gone, w.dtype)
    return rounded(wide, w.dtype, rounding, key, first).reshape(w.shape)


def rounded(
    wide: jax.Array,
    dtype: Any,
    rounding: Rounding = nearest,
    key: jax.Array | None = None,
    first: jax.Array | int = 0,
) -> jax.Array:
    """A float32 matrix after a fold, in ``dtype``; ``key`` and ``first`` as in `folded`.

    >>> rounded(jnp.full((1, 1), 1.003), jnp.bfloat16).tolist()
    [[1.0]]
    """
    if dtype == jnp.float32:
        return wide

    def noise() -> jax.Array:
        assert key is not None, "stochastic rounding has a key"
        of_rows = jnp.asarray(first, jnp.uint32) + jnp.arange(wide.shape[0], dtype=jnp.uint32)
        return bits.draw(bits.rounding_pair, bits.fold(key, jnp.uint32(1)), of_rows, wide.shape[1])

    return rounding.apply(wide, dtype, noise)


def _together(leaves: list[Any], trained: Sequence[bool]) -> list[list[int]]:
    """Indices of the trained leaves, those that move together in one list: equal in shape, dtype and memory, and small.

    Law 1 makes the grouping invisible in the bits. It shortens compilation (one program for all norms of a model,
    say) and fills a device that one small leaf would not; a large leaf would only pay for the copy.
    """
    groups: dict[Any, list[int]] = {}
    for i, w in enumerate(leaves):
        if trained[i]:
            groups.setdefault((w.shape, w.dtype, _on_host(w)) if w.size <= _SMALL_LEAF else i, []).append(i)
    return list(groups.values())


def _on_host(x: Any) -> bool:
    """Whether an array is in host memory (a part of its type, in programs too), where nothing should be computed."""
    return isinstance(x, jax.Array) and jax.typeof(x).memory_space == jax.memory.Space.Host


def _to_device(x: Any, after: Any = ()) -> Any:
    """Arrays of host memory in device memory, not before those of ``after`` are there."""
    x, _ = lax.optimization_barrier((x, after))
    return jax.device_put(x, jax.memory.Space.Device)


def move(
    params: PyTree,
    leaf_ids: jax.Array,
    update: Update | None,
    keys: jax.Array | None = None,
    matrix: jax.Array | None = None,
    *,
    count: jax.Array | None = None,
    trained: Sequence[bool] | None = None,
    direction: Direction = normal,
    rounding: Rounding = stochastic,
) -> tuple[PyTree, PyTree]:
    """The weights after an update and the probes of those weights, from one read of each leaf: (params, members).

    ``keys`` (typed, [K]) and ``matrix`` (float32 [M, K]) are those of the probes theta + sum_k matrix[m, k] z(keys[k]);
    each leaf of ``members`` has the members along its first axis, [M, ...]; leaves that are not trained are repeated.
    ``trained`` says which are, in pytree order; those that the direction trains by their names if None.
    ``members`` is None without them.
    The results are those of `apply_update` and then `perturb` for each row, in every bit.

    Several updates, whose arrays have another axis in front, are taken one after the other: the first ``count`` (int32
    []) of them, from one read of each leaf too.

    Leaves in host memory (memory kind "pinned_host") come to the device for their turn and go back; at most two are
    under way at a time. Members are in device memory.

    >>> from zo2jax.directions import rademacher
    >>> from zo2jax.leaves import leaf_ids
    >>> params = {"w": jnp.zeros((1, 2))}
    >>> _, members = move(params, leaf_ids(params), None, jax.random.split(jax.random.key(0), 1),
    ...                   jnp.array([[1.0], [-1.0]]), direction=rademacher)
    >>> (members["w"][0] == -members["w"][1]).all().item()
    True
    """
    leaves, treedef = jax.tree.flatten(params)
    if not leaves:
        return params, None if matrix is None else params
    if direction.adapter is not None:  # nothing moves but adapters, which are elsewhere
        return params, None if matrix is None else jax.tree.map(lambda w: repeated(w, len(matrix)), params)
    terms, probes = by_leaf(leaf_ids, update, keys, matrix, count)
    trained = trained_leaves(params, direction) if trained is None else trained
    moved, both = list(leaves), zip(leaves, trained, strict=True)
    members = [w if probes is None or t else repeated(w, probes.matrix.shape[1]) for w, t in both]
    done: list[Any] = []
    for group in _together(leaves, trained):
        here, hosted = np.array(group), _on_host(leaves[group[0]])
        # The barrier keeps the choice of keys out of the programs, so that equal leaves share one on the GPU.
        ours = lax.optimization_barrier(jax.tree.map(lambda x, here=here: x[here], (terms, probes)))
        weights = [jnp.asarray(leaves[i]) for i in group]
        if hosted:  # to wait for the keys keeps the uploads within a loop over probes
            weights = _to_device(weights, (ours, done[-2:-1]))
        outputs = _move_leaves(weights, *ours, direction, rounding)
        for i, (w, probed) in zip(group, outputs, strict=True):
            moved[i], members[i] = w, probed
            if hosted:
                moved[i] = leaves[i] if update is None else jax.device_put(w, jax.memory.Space.Host)
        done.append([(members[i] if update is None else moved[i]) for i in group])
    probed = None if probes is None else jax.tree.unflatten(treedef, members)
    return jax.tree.unflatten(treedef, moved), probed


def repeated(w: Any, count: int) -> jax.Array:
    """An array that is the same for each member: [count, ...].

    >>> repeated(jnp.ones(3), 2).shape
    (2, 3)
    """
    return jnp.broadcast_to(_to_device(w) if _on_host(w) else w, (count, *jnp.shape(w)))


def by_leaf(
    leaf_ids: jax.Array,
    update: Update | None,
    keys: jax.Array | None = None,
    matrix: jax.Array | None = None,
    count: jax.Array | None = None,
) -> tuple[Terms | None, Probes | None]:
    """What `pallas_kernels.perturb` is told of each leaf: terms and probes whose arrays have the leaves in front.

    The arguments are those of `move`.

    >>> terms, probes = by_leaf(jnp.arange(3, dtype=jnp.uint32), None, jax.random.split(jax.random.key(0), 1),
    ...                         jnp.ones((2, 1)))
    >>> terms, probes.keys.shape, probes.matrix.shape
    (None, (3, 1, 2), (3, 2, 1))
    """
    terms = probes = None

    def of_all(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (len(leaf_ids), *x.shape))

    if update is not None:
        one = update.decay.ndim == 0
        data, *numbers = jax.random.key_data(update.keys), bits.cut12(update.coefs), bits.cut12(update.decay)
        data, coefs, decay = (x[None] if one else x for x in (data, *numbers))
        used = None if one or count is None else of_all(count)
        with jax.named_scope("update"):
            terms = Terms(leaf_keys(data, leaf_ids), of_all(coefs), of_all(decay), used)
    if keys is not None and matrix is not None:
        with jax.named_scope("perturb"):
            probes = Probes(leaf_keys(jax.random.key_data(keys), leaf_ids), of_all(bits.cut12(matrix)))
    return terms, probes


def leaf_keys(data: jax.Array, leaf_ids: jax.Array) -> jax.Array:
    """The threefry keys of each leaf's noise, of those of directions: uint32 [.., 2] -> [leaves, .., 2].

    >>> leaf_keys(jnp.zeros((4, 2), jnp.uint32), jnp.arange(3, dtype=jnp.uint32)).shape
    (3, 4, 2)
    """
    folded = jax.vmap(jax.vmap(bits.fold, in_axes=(0, None)), in_axes=(None, 0))(data.reshape(-1, 2), leaf_ids)
    return folded.reshape(len(leaf_ids), *data.shape)


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
    those of `zo2jax.leaves.leaf_ids`. Integer leaves and keys are returned as they are, and leaves in host memory
    to host memory.

    Raises:
        ValueError: for an update of an optimizer with momentum, which is not in it; for `zo2jax.lora`.

    >>> from zo2jax.leaves import leaf_ids
    >>> params = {"w": jnp.ones((2, 2))}
    >>> update = Update(jax.random.split(jax.random.key(0), 1), jnp.zeros(1), jnp.float32(0.25))
    >>> apply_update(params, update, leaf_ids(params))["w"].tolist()
    [[0.75, 0.75], [0.75, 0.75]]
    """
    if update.fresh is not None:
        raise ValueError(
            "the update lacks its momentum, which zo2jax.Run keeps: expected an optimizer without momentum"
        )
    return move(params, leaf_ids, update, direction=check_of_weights(direction), rounding=rounding)[0]


def perturb(
    params: PyTree, keys: jax.Array, coefs: jax.Array, leaf_ids: jax.Array, *, direction: Direction = normal
) -> PyTree:
    """A probe: theta + sum_k coefs[k] * z(keys[k]), a new pytree; rounded to nearest in 16-bit leaves.

    Matrices are of the direction's ``perturb_dtype``, if it has one.

    >>> from zo2jax.directions import rademacher
    >>> from zo2jax.leaves import leaf_ids
    >>> params = {"w": jnp.zeros((1, 2))}
    >>> probe = perturb(params, jax.random.split(jax.random.key(0), 1), jnp.ones(1), leaf_ids(params),
    ...                 direction=rademacher)
    >>> jnp.abs(probe["w"]).tolist()
    [[1.0, 1.0]]
    """
    members = move(params, leaf_ids, None, keys, coefs[None], direction=check_of_weights(direction))[1]
    return jax.tree.map(lambda w: w[0], members)
