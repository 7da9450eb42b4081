"""z from an address: (key, step, direction k, leaf, element) -> noise. Nothing is ever stored.

The chain of addresses is ``direction key = fold_in(fold_in(key, step), k)`` and
``leaf key = fold_in(direction key, leaf id)``; an element of a leaf is a counter (row, column group) under
the leaf key (see `pallas_kernels.bits`). A leaf of shape [..., n] is a matrix of prod(...) rows and n columns.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import bits
from zo2jax.leaves import PyTree, is_trained, leaf_name, plain_name


@dataclass(frozen=True)
class Direction:
    """A distribution of z: its name, and how a 32-bit word becomes two values (float32, 12 significant bits).

    >>> normal.name, rademacher.name
    ('normal', 'rademacher')
    """

    name: str
    pair: bits.WordMap
    rank: int = 0
    """Of z for matrices; 0: z has an entry of its own for each weight."""
    refresh: int | None = None
    """Steps between two folds, for which V is kept, if there is a rank; None: always, or, without a rank, no folds."""
    adapter: float | None = None
    """Of `lora`: what B A is multiplied by. None: matrices themselves are trained."""
    targets: tuple[str, ...] = ()
    """Patterns of the leaves that are trained; z of the others is 0. () for all, of `lora` for all matrices."""
    perturb_dtype: str | None = None
    """The dtype in which probes of matrices are made and multiplied; that of the weights if None."""

    @property
    def read_only(self) -> bool:
        """Whether `zo2jax.Run` only reads matrices, but for folds.

        >>> normal.read_only, dense("normal", refresh=8).read_only, lowrank(2, refresh=None).read_only
        (False, True, True)
        """
        return self.rank > 0 or self.refresh is not None

    def trains(self, name: str, ndim: int = 2) -> bool:
        """Whether a leaf of this dotted name and so many dimensions is trained, or of `lora` the adapter beside it.

        >>> lora(4, targets=("*.attn.q.*",)).trains("layers.0.attn.k.weight"), lowrank(4).trains("w")
        (False, True)
        """
        if self.adapter is not None and ndim < 2:
            return False
        return not self.targets or any(fnmatchcase(plain_name(name), pattern) for pattern in self.targets)

    def probe_dtype(self, dtype: Any) -> Any:
        """That of probes of a matrix of this dtype.

        >>> dense(perturb_dtype="bfloat16").probe_dtype(jnp.float32), normal.probe_dtype("float16")
        (dtype(bfloat16), dtype('float16'))
        """
        return jnp.dtype(dtype if self.perturb_dtype is None else self.perturb_dtype)

    @property
    def everywhere(self) -> "Direction":
        """The same for all leaves, for programs that know which are trained."""
        return replace(self, targets=())

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads.

        >>> from_json(lora(8, 16).as_json()), from_json(dense("rademacher", refresh=8).as_json())
        (lora(8, alpha=16), dense('rademacher', refresh=8))
        """
        z = "normal" if self.pair is bits.normal_pair else "rademacher"
        alpha = None if self.adapter is None else self.adapter * self.rank
        found = {"z": z, "rank": self.rank, "refresh": self.refresh, "alpha": alpha, "targets": list(self.targets)}
        return found if self.perturb_dtype is None else found | {"perturb_dtype": self.perturb_dtype}

    def __repr__(self) -> str:
        return self.name


normal = Direction("normal", bits.normal_pair)
"""z ~ N(0, I), the perturbation of MeZO (arXiv 2305.17333, definition 1)."""

rademacher = Direction("rademacher", bits.rademacher_pair)
"""z uniform on {-1, +1}^d, the perturbation of SPSA (Spall, 1992)."""


_PERTURB_DTYPES = ("float32", "bfloat16", "float16")


def dense(
    name: str = "normal",
    refresh: int | None = None,
    *,
    targets: Sequence[str] = (),
    perturb_dtype: str | None = None,
) -> Direction:
    """`normal` or `rademacher`; with a ``refresh``, `zo2jax.Run` moves matrices only every so many steps, by a fold.

    In between they are only read, and may be codes (`zo2jax.int8`): every step adds the terms of all updates since the
    last fold, each of which takes a pass of the generator. 4 to 16 steps are usual.

    With ``targets`` only the leaves train whose dotted names match one of these patterns (`fnmatch`), matrices or not:
    ``("head.*",)`` a head (its norm alone where its matrix is the embedding's), ``("*.bias",)`` biases (BitFit, Zaken
    et al., arXiv 2106.10199), ``("layers.2[0-3].*", "head.*")`` the last layers. The blocks before the first of them
    are the same for all members of a population, and `zo2jax.Run` takes a batch through them once. Without a refresh
    only. Where no matrix is among them, all matrices are only read, and may be codes.

    With a ``perturb_dtype``, "float32", "bfloat16" or "float16", the probes W + eps z of matrices are rounded to that
    dtype, and multiplied in it (on CPUs in float32), while updates move W in its own: of float32 weights 16-bit probes
    take half the memory and the tensor cores, of 16-bit weights float32 ones lose nothing of eps z. Vectors are
    perturbed as they are. Without a refresh only.

    Raises:
        ValueError: for another name or dtype, a refresh below 1, or one with targets or a dtype.

    >>> dense("rademacher", refresh=8), dense("normal") == normal, dense(targets=("head.*",))
    (dense('rademacher', refresh=8), True, dense('normal', targets=('head.*',)))
    """
    known = {direction.name: direction for direction in (normal, rademacher)}
    if name not in known:
        raise ValueError(f"direction {name!r}: expected {' or '.join(map(repr, known))}")
    targets = _patterns(targets)
    if perturb_dtype not in (None, *_PERTURB_DTYPES):
        raise ValueError(f"perturb_dtype is {perturb_dtype!r}, expected one of {', '.join(_PERTURB_DTYPES)}, or None")
    if refresh is None:
        given = {"targets": targets, "perturb_dtype": perturb_dtype}
        if not any(given.values()):
            return known[name]
        shown = "".join(f", {key}={value!r}" for key, value in given.items() if value)
        called = f"dense({name!r}{shown})"
        return replace(known[name], name=called, targets=targets, perturb_dtype=perturb_dtype)
    if targets:
        raise ValueError(
            f"refresh is {refresh}, with targets {targets}: dense directions have targets without a refresh, expected "
            "zo2jax.lowrank (direction=lowrank) for both"
        )
    if perturb_dtype:
        raise ValueError(
            f"refresh is {refresh}, with perturb_dtype {perturb_dtype!r}: with a refresh no probe of a matrix is made, "
            "expected one of the two"
        )
    if refresh < 1:
        raise ValueError(f"refresh is {refresh}, expected at least 1 step (4 to 16 are usual)")
    return Direction(f"dense({name!r}, refresh={refresh})", known[name].pair, refresh=refresh)


_MAX_RANK = 64


def lowrank(rank: int = 2, refresh: int | None = 50, *, targets: Sequence[str] = ()) -> Direction:
    """Z = U V^T for a matrix [n_out, n_in]: U [n_out, rank] new each step, V [n_in, rank] each ``refresh`` steps.

    Without a refresh (None) V stays as it is: what is trained then is an adapter of this rank. All directions of a step
    share V. V ~ N(0, 1) and U ~ N(0, 1 / rank), so that the entries of Z have variance 1 and the estimate of a gradient
    has no bias (LOZO, arXiv 2410.07698, algorithm 1, has the factor 1 / rank elsewhere).
    Arrays of more than two dimensions are matrices of prod(shape[:-1]) rows; those of fewer take a dense normal z.
    ``targets``: patterns of the leaves that train, as of `dense`.

    Raises:
        ValueError: for a rank that is not 1 to 64, or a refresh below 1.

    >>> lowrank(2, refresh=50)
    lowrank(2, refresh=50)
    """
    _check_rank(rank)
    if refresh is not None and refresh < 1:
        raise ValueError(f"refresh is {refresh}, expected at least 1 step (50 to 100 are usual)")
    targets = _patterns(targets)
    name = f"lowrank({rank}, refresh={refresh}" + (f", targets={targets})" if targets else ")")
    return Direction(name, bits.normal_pair, rank, refresh, targets=targets)


def lora(rank: int = 8, alpha: float | None = None, *, targets: Sequence[str] = ()) -> Direction:
    """Adapters: a matrix W [n_out, n_in] stays as it is, and what is trained is W + alpha / rank B A.

    B [n_out, rank] begins at 0 and A [rank, n_in] at N(0, 1 / (3 n_in)), the variance of PEFT's default. Both are
    perturbed along dense normal z and both take updates and weight decay; W, and vectors (norms, biases), never move
    (LoRA, Hu et al., arXiv 2106.09685; with MeZO, arXiv 2305.17333, section 3). For `zo2jax.Run`, which keeps the
    adapters.

    Args:
        rank: of B A.
        alpha: B A is multiplied by alpha / rank; the rank if None.
        targets: patterns (`fnmatch`) of the dotted names of matrices that have an adapter, such as "*.attn.[qv].*";
            all matrices if empty.

    Raises:
        ValueError: for a rank that is not 1 to 64, or an alpha that is not positive.

    >>> lora(8, 16)
    lora(8, alpha=16)
    """
    _check_rank(rank)
    alpha = rank if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}, expected a positive number (one or two times the rank is usual)")
    targets = _patterns(targets)
    more = f", targets={targets}" if targets else ""
    return Direction(f"lora({rank}, alpha={alpha:g}{more})", bits.normal_pair, rank, None, alpha / rank, targets)


def _patterns(targets: Sequence[str]) -> tuple[str, ...]:
    if isinstance(targets, str):
        raise ValueError(f"targets is the string {targets!r}, expected a tuple of patterns: ({targets!r},)")
    return tuple(targets)


def from_json(values: Mapping[str, Any]) -> Direction:
    """The direction that `Direction.as_json` described.

    Raises:
        ValueError, KeyError: if it is something else.

    >>> from_json(normal.as_json()) == normal
    True
    """
    if values["alpha"] is not None:
        return lora(values["rank"], values["alpha"], targets=values["targets"])
    how = {"refresh": values["refresh"], "targets": values["targets"]}
    if values["rank"]:
        return lowrank(values["rank"], **how)
    return dense(values["z"], **how, perturb_dtype=values.get("perturb_dtype"))


def check_of_weights(direction: Direction) -> Direction:
    """Returns a direction of the weights themselves, or raises: one of adapters says nothing without them.

    Raises:
        ValueError: for `lora`.

    >>> check_of_weights(normal)
    normal
    """
    if direction.adapter is not None:
        raise ValueError(f"the direction is {direction}: adapters are for zo2jax.Run, which keeps them")
    return direction


def _check_rank(rank: int) -> None:
    if not 1 <= rank <= _MAX_RANK:
        raise ValueError(f"rank is {rank}, expected 1 to {_MAX_RANK} (1 to 8 are usual)")


def check_key(key: jax.Array) -> jax.Array:
    """Returns ``key`` as a typed threefry key of shape (), or raises.

    Threefry alone is invariant under vmap, sharding and backend, on which every address relies; a raw
    ``jax.random.PRNGKey`` array (uint32[2]) is accepted and wrapped.

    Raises:
        ValueError: for a key of another generator ("rbg", "unsafe_rbg"), a batch of keys, or no key.

    >>> check_key(jax.random.PRNGKey(0)).dtype == jax.random.key(0).dtype
    True
    """
    key = jnp.asarray(key) if not isinstance(key, jax.Array) else key
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        name = str(jax.random.key_impl(key))
        if name != "threefry2x32":
            raise ValueError(f"key has the generator {name!r}, expected 'threefry2x32': jax.random.key(seed, impl=...)")
        if key.shape != ():
            raise ValueError(f"key has shape {key.shape}, expected one key of shape ()")
        return key
    if key.dtype == jnp.uint32 and key.shape == (2,):
        return jax.random.wrap_key_data(key, impl="threefry2x32")
    raise ValueError(
        f"key is {key.dtype}{list(key.shape)}, expected jax.random.key(seed) of the threefry2x32 generator"
    )


def trained_leaves(params: PyTree, direction: Direction) -> list[bool]:
    """Of each leaf, in pytree order, whether a direction moves it.

    >>> params = {"bias": np.zeros(3, np.float32), "count": np.int32(1), "w": np.zeros((3, 3), np.float32)}
    >>> trained_leaves(params, normal), trained_leaves(params, dense(targets=("b*",)))
    ([True, False, True], [True, False, False])
    """
    if not direction.targets and direction.adapter is None:
        return [is_trained(leaf) for leaf in jax.tree.leaves(params)]
    found = jax.tree_util.tree_leaves_with_path(params)
    return [is_trained(leaf) and direction.trains(leaf_name(path), leaf.ndim) for path, leaf in found]


def check_targets(params: PyTree, direction: Direction) -> None:
    """Raises unless each of a direction's targets names a leaf that it can train.

    Raises:
        ValueError: naming those that do not.

    >>> check_targets({"w": np.zeros((3, 3), np.float32)}, dense(targets=("v",)))
    Traceback (most recent call last):
    ...
    ValueError: targets ['v'] name no leaf that dense('normal', targets=('v',)) trains, such as w
    """
    every, found = direction.everywhere, jax.tree_util.tree_leaves_with_path(params)
    names = [
        leaf_name(path) for (path, _), trained in zip(found, trained_leaves(params, every), strict=True) if trained
    ]
    if unknown := [target for target in direction.targets if not any(fnmatchcase(name, target) for name in names)]:
        raise ValueError(f"targets {unknown} name no leaf that {direction} trains, such as {', '.join(names[:9])}")


def step_keys(key: jax.Array, step: jax.Array, count: int, direction: Direction = normal, anchor: int = 0) -> jax.Array:
    """The keys of the ``count`` directions of one step: fold_in(fold_in(key, step), k), typed keys [count].

    Those of a `lowrank` direction are pairs, [count, 2]: of U, and of V, which is
    fold_in(fold_in(key, 2^32 - 1), step // refresh), the quotient being 0 without a refresh. The last ``anchor`` ones
    are the first ones of the step that the period began with (`zo2jax.svrg`).

    >>> step_keys(jax.random.key(0), 5, 2).shape, step_keys(jax.random.key(0), 5, 2, lowrank(2)).shape
    ((2,), (2, 2))
    """

    def of(step: jax.Array, count: int) -> jax.Array:
        at_step = jax.random.fold_in(key, step)
        return jax.vmap(lambda k: jax.random.fold_in(at_step, k))(jnp.arange(count, dtype=jnp.uint32))

    keys = of(step, count - anchor)
    if anchor:
        refresh = np.uint32(direction.refresh or 1)
        first = jnp.asarray(step, jnp.uint32) // refresh * refresh
        keys = jnp.concatenate([keys, of(first, anchor)])
    if not direction.rank:
        return keys
    return jnp.stack([keys, jnp.broadcast_to(period_key(key, step, direction), keys.shape)], axis=1)


@partial(jax.jit, static_argnames="direction")
def period_key(key: jax.Array, step: jax.Array, direction: Direction) -> jax.Array:
    """fold_in(fold_in(key, 2^32 - 1), step // refresh): what V, and the rounding of folds, have of one period.

    >>> keys = [period_key(jax.random.key(0), step, dense("normal", refresh=4)) for step in (0, 3, 4)]
    >>> bool(keys[0] == keys[1]), bool(keys[1] == keys[2])
    (True, False)
    """
    period = jnp.asarray(step, jnp.uint32) // np.uint32(direction.refresh or 2**32 - 1)
    return jax.random.fold_in(jax.random.fold_in(key, np.uint32(2**32 - 1)), period)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """How a leaf is addressed: (rows, columns), the last axis being the columns.

    >>> matrix_shape((2, 3, 5)), matrix_shape((7,)), matrix_shape(())
    ((6, 5), (1, 7), (1, 1))
    """
    return math.prod(shape[:-1]), shape[-1] if shape else 1


@partial(jax.jit, static_argnames=("direction", "shape"))
def draw(
    direction: Direction, key: jax.Array, ident: jax.Array, shape: tuple[int, ...], rows: jax.Array | None = None
) -> jax.Array:
    """z of one leaf: float32 of shape ``shape``, or, with ``rows`` (integers [R]), only these rows: [R, columns].

    ``key`` is a direction's key (`step_keys`), ``ident`` a leaf id (uint32, data rather than a constant). The entries
    of a dense z have 12 significant bits; those of a low-rank one are sums of ``rank`` products, which are exact.

    >>> key, ident = jax.random.key(0), np.uint32(1)
    >>> z = draw(normal, key, ident, (5, 6))
    >>> bool((draw(normal, key, ident, (5, 6), rows=jnp.array([3, 1])) == z[jnp.array([3, 1])]).all())
    True
    """
    n_rows, columns = matrix_shape(shape)
    data, ident = jax.random.key_data(key), jnp.asarray(ident, jnp.uint32)
    if check_of_weights(direction).rank and len(shape) >= 2:
        u, v = factors(direction, jax.vmap(bits.fold, in_axes=(0, None))(data, ident), (n_rows, columns))
        return expand(u, v).reshape(shape) if rows is None else expand(u[rows], v)
    leaf_key = bits.fold(data[0] if direction.rank else data, ident)
    if rows is not None:
        return bits.draw(direction.pair, leaf_key, rows.astype(jnp.uint32), columns)
    return bits.draw(direction.pair, leaf_key, jnp.arange(n_rows, dtype=jnp.uint32), columns).reshape(shape)


def factors(direction: Direction, keys: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """(U [rows, rank], V [columns, rank]) of a matrix, float32 with 12 and 8 significant bits; Z = U V^T.

    ``keys`` uint32 [2, 2] are the leaf's, of U and of V. Row i of a factor is that of an array with ``rank`` columns
    under its key, so that any rows can be drawn alone; U is divided by sqrt(rank) and cut to 12 bits again, V rounded
    to 8, so that 16-bit products with it are those of Z.

    Those of `lora` are of its adapter: U [rows + columns, rank] is z of B, times alpha / rank, and below it z of A^T; V
    is what A^T begins with.

    >>> u, v = factors(lowrank(2), jnp.zeros((2, 2), jnp.uint32), (3, 5))
    >>> u.shape, v.shape
    ((3, 2), (5, 2))
    """
    rank, (rows, columns) = direction.rank, shape
    u_scale: Any = u_scale_of(rank)
    v_scale = np.float32(1)
    if direction.adapter is not None:
        u_scale = np.repeat(np.array([direction.adapter, 1], np.float32), (rows, columns))[:, None]
        v_scale, rows = np.float32(1 / math.sqrt(3 * columns)), rows + columns
    u, v = (
        bits.draw(direction.pair, keys[i], jnp.arange(n, dtype=jnp.uint32), rank) for i, n in enumerate((rows, columns))
    )
    return bits.cut12(u * u_scale), lax.reduce_precision(v * v_scale, exponent_bits=8, mantissa_bits=7)


def u_scale_of(rank: int) -> np.float32:
    """What U of a `lowrank` direction is scaled by.

    >>> float(u_scale_of(4))
    0.5
    """
    return np.float32(1 / math.sqrt(rank))


@lru_cache
def u_pair(direction: Direction) -> bits.WordMap:
    """The two entries of U of a `lowrank` direction, or of that of B of `lora`, that come from a word; see `factors`.

    >>> [float(u) for u in u_pair(lowrank(4))(jnp.uint32(0x12345678))]
    [-0.6025390625, 0.9794921875]
    """
    scale = u_scale_of(direction.rank) if direction.adapter is None else np.float32(direction.adapter)

    def pair(word: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = direction.pair(word)
        return bits.cut12(first * scale), bits.cut12(second * scale)

    return pair


def expand(p: jax.Array, v: jax.Array) -> jax.Array:
    """P V^T: float32 [n, rank] and [m, rank] -> [n, m], an ordered sum over the rank.

    V has 12 significant bits at most, and P is cut into two halves of 12, so that every product is exact: it does not
    matter, to the bit, what else a program fuses with it.

    >>> expand(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.5], [1.0, 1.0]])).tolist()
    [[4.0, 3.0]]
    """
    high = bits.cut12(p)
    low = p - high
    total = None
    for j in range(p.shape[1]):
        for half in (high, low):
            term = half[:, j, None] * v[None, :, j]
            total = term if total is None else total + term
    assert total is not None, "a rank is at least 1"
    return total
