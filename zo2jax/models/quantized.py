"""Products with matrices of codes, and their rows; arrays go through the same functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized import Codes, decode, matmul_int8, quantize_rows
from zo2jax.models.layers import product


def times(x: jax.Array, matrix: jax.Array | Codes, dtype: Any, compute: str = "") -> jax.Array:
    """x W^T in ``dtype``, accumulated in float32: x [..., n_in], W [n_out, n_in].

    int8 codes with a scale a row are exact in 16 bits, and the scale is applied to the product; others are decoded to
    the dtype of x first. With ``compute`` "int8" see `times_int8`.

    >>> from pallas_kernels.quantized import quantize
    >>> times(jnp.ones((1, 2)), quantize(jnp.array([[63.5, -127.0]]), 8), jnp.float32).tolist()
    [[-63.0]]
    """
    if not isinstance(matrix, Codes):
        return product(x, matrix, dtype)
    if compute == "int8":
        return times_int8(x, *matrix).astype(dtype)
    if matrix.bits == 8 and matrix.group == matrix.shape[1]:
        wide = jnp.float32 if dtype == jnp.float16 else dtype  # whose range sums of codes leave
        return (product(x, matrix.codes, wide).astype(jnp.float32) * matrix.scale[:, 0]).astype(dtype)
    return product(x, decode(matrix, x.dtype), dtype)


@jax.custom_batching.custom_vmap
def times_int8(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """x W^T by int8 products, float32: every row of x becomes int8 codes with a scale of its own.

    Members (under ``jax.vmap``) after the first are rounded as their difference from it: y_m = y_0 + (x_m - x_0) W^T.
    So the members share the error of x_0, and that of their difference, on which the projected gradient rests, is in
    proportion to it: with each x_m rounded by itself it would be in proportion to x_m, which is 1 / eps times larger.

    Args:
        x: [..., n_in].
        codes: int8 [n_out, n_in].
        scale: float32 [n_out, 1].

    >>> from pallas_kernels.quantized import quantize
    >>> w, x = quantize(jnp.array([[127.0, 1.0]]), 8), jnp.array([[1.0, 1.0], [1.0, 1.0 + 1e-3]])
    >>> [round(float(y), 4) for y in jax.vmap(times_int8, in_axes=(0, None, None))(x, *w).ravel()]
    [128.0, 128.001]
    """
    return _times_int8(x, codes, scale)


@times_int8.def_vmap
def _(size: int, in_batched: Any, x: jax.Array, codes: jax.Array, scale: jax.Array) -> Any:
    assert in_batched[0] and not (in_batched[1] or in_batched[2]), "members share the codes"
    return _times_int8(x, codes, scale, size), True


def _times_int8(x: jax.Array, codes: jax.Array, scale: jax.Array, members: int = 1) -> jax.Array:
    rows = quantize_rows(x.reshape(-1, x.shape[-1]), members=members)
    return matmul_int8(*rows, codes, scale, jnp.float32, members=members).reshape(*x.shape[:-1], -1)


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

    def __init__(self, codes: Codes, dtype: Any, compute: str = ""):
        """``dtype`` is that of the matrix where it is an array; ``compute`` as in `times`."""
        self._codes, self.shape, self.dtype, self._compute = codes, codes.shape, jnp.dtype(dtype), compute

    def __getitem__(self, key: Any) -> "Quantized":
        """Itself: Flax variables are read as ``variable[...]``."""
        return self

    def product(self, x: jax.Array, dtype: Any) -> jax.Array:
        """X [..., n_in] -> x W^T in ``dtype``."""
        return times(x, self._codes, dtype, self._compute)

    def array(self) -> jax.Array:
        """The matrix itself."""
        return dense(self._codes, self.dtype)

    def rows(self, ids: jax.Array) -> jax.Array:
        """The rows of these indices, float32 [*ids.shape, n_in]."""
        return rows_of(self._codes, ids)

    def slabs(self, x: jax.Array) -> Callable[[jax.Array, int], "Quantized"]:
        """Rows as matrices of their own."""
        return lambda start, count: Quantized(cut(self._codes, start, count), self.dtype, self._compute)
