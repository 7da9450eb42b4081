"""How matrices are kept: as they are, or as int8 or int4 codes with a scale for each row, or each group of columns."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized import Codes, decode
from zo2jax.models.layers import product


@dataclass(frozen=True)
class Format:
    """Symmetric codes of so many bits: w = code * scale, with a scale for each group of columns of a row.

    Made by `int8` and `int4`. Only low-rank directions train a model in a format: its matrices are only read. Where
    their directions have a ``refresh``, a float32 master of every matrix is kept beside the codes in the same tier,
    touched at folds only, and the codes are made anew from it; without one the codes never change.

    >>> int4(group=32, keep=("embed.*", "head.*"))
    int4(group=32, keep=('embed.*', 'head.*'))
    """

    name: str
    bits: int
    group: int | None
    """The most columns that share a scale; None for a whole row."""
    keep: tuple[str, ...] = ()
    """Patterns of leaves that stay as they are, such as ``*.attn.*``."""

    def __repr__(self) -> str:
        return self.name

    def group_of(self, leaf: str, shape: tuple[int, ...]) -> int | None:
        """The columns of this leaf that share a scale, a divisor of their number; None if it stays as it is.

        >>> int8(per="group", group=128).group_of("layers.0.mlp.down.weight", (64, 172))
        86
        """
        if len(shape) != 2 or shape[1] % (8 // self.bits) or any(fnmatch.fnmatchcase(leaf, p) for p in self.keep):
            return None
        most = min(self.group or shape[1], shape[1])
        return next(n for n in range(most, 0, -1) if shape[1] % n == 0)


def int8(per: str = "channel", *, group: int = 128, keep: tuple[str, ...] = ()) -> Format:
    """int8 codes: one byte a weight, a scale for each row ("channel"), or for each ``group`` of its columns.

    Raises:
        ValueError: for another ``per``, or a group below 1.

    >>> int8()
    int8(per='channel', keep=())
    """
    if per not in ("channel", "group"):
        raise ValueError(f"per is {per!r}, expected 'channel' or 'group'")
    of_group = "" if per == "channel" else f", group={_positive(group)}"
    return Format(f"int8(per={per!r}{of_group}, keep={keep!r})", 8, group if per == "group" else None, tuple(keep))


def int4(*, group: int = 64, keep: tuple[str, ...] = ()) -> Format:
    """int4 codes: half a byte a weight, and a float32 scale for each ``group`` of columns of a row.

    Raises:
        ValueError: for a group below 1.

    >>> int4().bits
    4
    """
    return Format(f"int4(group={_positive(group)}, keep={keep!r})", 4, group, tuple(keep))


def _positive(group: int) -> int:
    if group < 1:
        raise ValueError(f"group is {group}, expected at least 1 column (32 to 128 are usual)")
    return group


def times(x: jax.Array, matrix: jax.Array | Codes, dtype: Any) -> jax.Array:
    """x W^T in ``dtype``, accumulated in float32: x [..., n_in], W [n_out, n_in].

    int8 codes with a scale a row are exact in 16 bits, and the scale is applied to the product; others are decoded to
    the dtype of x first.

    >>> from pallas_kernels.quantized import quantize
    >>> times(jnp.ones((1, 2)), quantize(jnp.array([[63.5, -127.0]]), 8), jnp.float32).tolist()
    [[-63.0]]
    """
    if not isinstance(matrix, Codes):
        return product(x, matrix, dtype)
    if matrix.bits == 8 and matrix.group == matrix.shape[1]:
        wide = jnp.float32 if dtype == jnp.float16 else dtype  # whose range sums of codes leave
        return (product(x, matrix.codes, wide).astype(jnp.float32) * matrix.scale[:, 0]).astype(dtype)
    return product(x, decode(matrix, x.dtype), dtype)


def rows_of(matrix: jax.Array | Codes, ids: jax.Array) -> jax.Array:
    """The rows of these indices, float32 [*ids.shape, n_in].

    >>> rows_of(jnp.eye(2), jnp.array([[1, 1]])).tolist()
    [[[0.0, 1.0], [0.0, 1.0]]]
    """
    if not isinstance(matrix, Codes):
        return matrix[ids].astype(jnp.float32)
    found = Codes(*(x[ids.reshape(-1)] for x in matrix))
    return decode(found, jnp.float32).reshape(*ids.shape, -1)


def cut(matrix: Any, start: jax.Array, count: int) -> Any:
    """``count`` rows from ``start``.

    >>> cut(jnp.eye(3), jnp.int32(1), 1).tolist()
    [[0.0, 1.0, 0.0]]
    """
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, count), matrix)


def dense(matrix: jax.Array | Codes, dtype: Any) -> jax.Array:
    """The matrix as an array.

    >>> dense(jnp.eye(1), jnp.bfloat16).dtype
    dtype(bfloat16)
    """
    return decode(matrix, dtype) if isinstance(matrix, Codes) else matrix.astype(dtype)


class Quantized:
    """A matrix of codes, a `zo2jax.models.layers.Weight`.

    >>> from pallas_kernels.quantized import quantize
    >>> Quantized(quantize(jnp.eye(4), 4), jnp.bfloat16).array().tolist()[0]
    [1.0, 0.0, 0.0, 0.0]
    """

    def __init__(self, codes: Codes, dtype: Any):
        """``dtype`` is that of the matrix where it is an array."""
        self._codes, self.shape, self.dtype = codes, codes.shape, jnp.dtype(dtype)

    def __getitem__(self, key: Any) -> "Quantized":
        """Itself: Flax variables are read as ``variable[...]``."""
        return self

    def product(self, x: jax.Array, dtype: Any) -> jax.Array:
        """X [..., n_in] -> x W^T in ``dtype``."""
        return times(x, self._codes, dtype)

    def array(self) -> jax.Array:
        """The matrix itself."""
        return dense(self._codes, self.dtype)

    def rows(self, ids: jax.Array) -> jax.Array:
        """The rows of these indices, float32 [*ids.shape, n_in]."""
        return rows_of(self._codes, ids)

    def slabs(self) -> Callable[[jax.Array, int], "Quantized"]:
        """Rows as matrices of their own."""
        return lambda start, count: Quantized(cut(self._codes, start, count), self.dtype)
