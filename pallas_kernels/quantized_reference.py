"""Symmetric int8 and int4 weights and int8 activations in plain ``jax.numpy``: the definition, and the path of XLA.

A group (a row, or a run of its columns) of absolute maximum ``a`` has the scale a * float32(1 / qmax), a product that
every backend rounds in the same way, and the codes round_half_even(w * (1 / scale)). A compiler is free to replace a
quotient by such a product, and GPUs divide to within two units in the last place; so it is a product here, and
`reciprocal` repairs whatever the division gave. Codes and scales are therefore the same bits in every program.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import bits, reference

QMAX = {8: 127, 4: 7}
"""The largest code, by the number of bits; the smallest is its negative."""
SMALLEST_SCALE = 2.0**-100
"""A group whose scale would be smaller (its weights are below 1.1e-28) counts as zeros: scale 1, codes 0. So neither
scales nor their reciprocals are subnormal, which some programs flush to zero."""


class Codes(NamedTuple):
    """A quantised matrix [n_out, n_in], w = code * scale: codes, and the scale of each group of columns of a row.

    int8 codes are an int8 [n_out, n_in]. int4 codes are packed two to a byte, uint8 [n_out, n_in / 2]: byte j of a row
    holds column j in its low nibble and column j + n_in / 2 in its high one, in two's complement.

    >>> Codes(jnp.zeros((4, 8), jnp.uint8), jnp.ones((4, 2))).shape
    (4, 16)
    """

    codes: jax.Array
    scale: jax.Array
    """float32 [n_out, n_in / group]."""

    @property
    def bits(self) -> int:
        """The bits of a code, 8 or 4.

        >>> Codes(jnp.zeros((4, 8), jnp.uint8), jnp.ones((4, 2))).bits
        4
        """
        return 8 if self.codes.dtype == jnp.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, [n_out, n_in].

        >>> Codes(jnp.zeros((4, 8), jnp.int8), jnp.ones((4, 2))).shape
        (4, 8)
        """
        rows, columns = self.codes.shape
        return rows, columns * (8 // self.bits)

    @property
    def group(self) -> int:
        """The columns that share a scale.

        >>> Codes(jnp.zeros((4, 8), jnp.int8), jnp.ones((4, 2))).group
        4
        """
        return self.shape[1] // self.scale.shape[1]


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x for float32 in [2**-126, 2**126], rounded correctly, however inexact the division of a backend is.

    With x = m 2**e, m an integer of 24 bits, the quotient q = 2**47 / m is corrected by its remainder in integers, by
    up to three units.

    >>> float(reciprocal(jnp.float32(3.0))) == float(np.float32(1 / 3))
    True
    """
    raw = _bits(x)
    m = (raw & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
    unit = _float((raw & np.uint32(0x7FFFFF)) | np.uint32(0x3F800000))  # in [1, 2)
    q = (lax.div(jnp.ones_like(unit), unit) * np.float32(1 << 24)).astype(jnp.int32)
    divisor = lax.bitcast_convert_type(m, jnp.int32)
    for _ in range(3):
        # 2**47 - q m is small, and 2**47 is 0 modulo 2**32.
        twice = np.int32(-2) * (q * divisor)
        q = q + jnp.where(twice > divisor, np.int32(1), jnp.where(twice < -divisor, np.int32(-1), np.int32(0)))
    exponent = (raw >> np.uint32(23)) & np.uint32(0xFF)
    return q.astype(jnp.float32) * np.float32(2.0**-24) * _float((np.uint32(254) - exponent) << np.uint32(23))


def scale_of(absmax: jax.Array, qmax: int) -> tuple[jax.Array, jax.Array]:
    """The scale of groups with these absolute maxima (float32), and its reciprocal.

    >>> [float(x) for x in scale_of(jnp.float32(0.0), 127)]
    [1.0, 1.0]
    """
    scale = absmax * np.float32(1 / qmax)
    scale = jnp.where(scale < np.float32(SMALLEST_SCALE), np.float32(1), scale)
    return scale, reciprocal(scale)


def code_of(w: jax.Array, inverse: jax.Array, qmax: int) -> jax.Array:
    """The codes of float32 ``w`` as float32: w * inverse, rounded half to even, in [-qmax, qmax].

    >>> code_of(jnp.array([0.5, -1.5, 9.0]), jnp.float32(1.0), 7).tolist()
    [0.0, -2.0, 7.0]
    """
    code = lax.round(w * inverse, lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.minimum(jnp.maximum(code, np.float32(-qmax)), np.float32(qmax))


def nibble(x: jax.Array, half: int) -> jax.Array:
    """The code (int32) in the low (``half`` 0) or high (1) nibble of integers in [0, 256), int32 too.

    >>> [int(nibble(jnp.int32(0x9F), half)) for half in (0, 1)]
    [-1, -7]
    """
    return (x << np.int32(28 - 4 * half)) >> np.int32(28)


def pack(codes: jax.Array) -> jax.Array:
    """Codes in [-8, 7], an int8 [n_out, n_in], two to a byte: uint8 [n_out, n_in / 2].

    >>> [hex(byte) for byte in pack(jnp.array([[-1, 2, -7, 5]], jnp.int8))[0].tolist()]
    ['0x9f', '0x52']
    """
    low, high = jnp.split(lax.bitcast_convert_type(codes, jnp.uint8), 2, axis=1)
    return (low & np.uint8(0xF)) | (high << np.uint8(4))


def unpack(codes: jax.Array) -> jax.Array:
    """The inverse of `pack`, as int8.

    >>> unpack(jnp.array([[0x9F, 0x52]], jnp.uint8)).tolist()
    [[-1, 2, -7, 5]]
    """
    wide = codes.astype(jnp.int32)
    return jnp.concatenate([nibble(wide, 0), nibble(wide, 1)], axis=1).astype(jnp.int8)


def quantize(w: jax.Array, bits: int, group: int) -> Codes:
    """Codes of a matrix; see `pallas_kernels.quantized.quantize`.

    >>> quantize(jnp.array([[127.0, -1.4, 0.0, 0.0]]), 8, 2)
    Codes(codes=Array([[127,  -1,   0,   0]], dtype=int8), scale=Array([[1., 1.]], dtype=float32))
    """
    rows, columns = w.shape
    wide = w.astype(jnp.float32).reshape(rows, columns // group, group)
    # Once for each group, not once for each weight that reads them.
    scale, inverse = lax.optimization_barrier(scale_of(jnp.max(jnp.abs(wide), axis=2), QMAX[bits]))
    codes = code_of(wide, inverse[:, :, None], QMAX[bits]).astype(jnp.int8).reshape(rows, columns)
    return Codes(codes if bits == 8 else pack(codes), scale)


def decode(codes: Codes, dtype: Any) -> jax.Array:
    """code * scale in float32, rounded once to ``dtype``: [n_out, n_in].

    >>> decode(Codes(jnp.array([[0x9F, 0x52]], jnp.uint8), jnp.array([[0.5, 2.0]])), jnp.float32).tolist()
    [[-0.5, 1.0, -14.0, 10.0]]
    """
    rows, columns = codes.shape
    values = codes.codes if codes.bits == 8 else unpack(codes.codes)
    values = values.astype(jnp.float32).reshape(rows, columns // codes.group, codes.group)
    return (values * codes.scale[:, :, None]).astype(dtype).reshape(rows, columns)


def quantize_rows(x: jax.Array, members: int = 1) -> Codes:
    """int8 codes of activations [rows, n], with one scale for each row; see `pallas_kernels.quantized.quantize_rows`.

    >>> quantize_rows(jnp.array([[127.0, -1.4]])).codes.tolist()
    [[127, -1]]
    >>> quantize_rows(jnp.array([[127.0, -1.4], [127.0, -1.3]]), 2).codes.tolist()
    [[127, -1], [0, 127]]
    """
    if members > 1:
        wide = x.astype(jnp.float32).reshape(members, -1, x.shape[1])
        later = lax.broadcasted_iota(jnp.int32, wide.shape, 0) > 0  # elementwise, not joined: XLA fuses it
        x = jnp.where(later, wide - wide[:1], wide).reshape(x.shape)
    return quantize(x, 8, x.shape[1])


def matmul_int8(
    x_codes: jax.Array, x_scale: jax.Array, codes: jax.Array, scale: jax.Array, dtype: Any, members: int = 1
) -> jax.Array:
    """x W^T of int8 codes: [rows, n_in] and [n_out, n_in] with scales [rows, 1] and [n_out, 1] -> [rows, n_out].

    Sums of products are exact in int32; they are multiplied in float32 by the product of the two scales. What the first
    of the members gives is added to the others, as `quantize_rows` took it from them.

    >>> eye = jnp.eye(2, dtype=jnp.int8)
    >>> matmul_int8(eye, jnp.array([[1.0], [2.0]]), 3 * eye, jnp.array([[1.0], [0.5]]), jnp.float32).tolist()
    [[3.0, 0.0], [0.0, 3.0]]
    """
    sums = lax.dot_general(x_codes, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    of_member = sums.reshape(members, -1, len(codes)), x_scale.reshape(members, -1, 1)

    def scaled(sums: jax.Array, x_scale: jax.Array) -> jax.Array:
        return sums.astype(jnp.float32) * (x_scale * scale.reshape(1, -1))

    y = scaled(*of_member)
    if members > 1:  # the integers are cut, not y, or XLA would keep y in float32 for both that read it
        later = lax.broadcasted_iota(jnp.int32, (members, 1, 1), 0) > 0
        y = jnp.where(later, scaled(*(x[:1] for x in of_member)) + y, y)
    return y.astype(dtype).reshape(sums.shape)


class Pending(NamedTuple):
    """Terms that a matrix which is only read still lacks: w - gone w + sum_t coefs[t] z(keys[t]), t < used.

    >>> Pending(jnp.zeros((8, 2), jnp.uint32), jnp.zeros(8), jnp.int32(0), jnp.float32(0)).coefs.shape
    (8,)
    """

    keys: jax.Array
    """uint32 [T, 2]: the threefry keys of the matrix's noise."""
    coefs: jax.Array
    """float32 [T], 12 significant bits."""
    used: jax.Array
    """int32 []: how many of the T terms are there; no others are drawn."""
    gone: jax.Array
    """float32 [], 12 significant bits: the fraction of a weight that went."""


def exact_product(values: jax.Array, scale: jax.Array) -> jax.Array:
    """values * scale, rounded to float32 before anything is added to it; ``values`` have 12 significant bits at most.

    A compiler may fuse a product with a sum that follows, and so skip the rounding. Of two exact products only the sum
    is rounded, whatever is fused.

    >>> float(exact_product(jnp.float32(3.0), jnp.float32(0.1))) == float(np.float32(3) * np.float32(0.1))
    True
    """
    high = bits.cut12(scale)
    return values * high + values * (scale - high)


def perturb_codes(
    matrix: Codes | jax.Array,
    pending: Pending | None,
    probes: reference.Probes | None,
    rows: jax.Array,
    dtype: Any,
    *,
    pair: bits.WordMap,
) -> jax.Array:
    """The weights with what is pending, or probes of those; see `pallas_kernels.perturb_codes`.

    >>> codes, rows = Codes(jnp.ones((1, 4), jnp.int8), jnp.full((1, 1), 2.0)), jnp.zeros(1, jnp.uint32)
    >>> pending = Pending(jnp.zeros((1, 2), jnp.uint32), jnp.ones(1), jnp.int32(1), jnp.float32(0.5))
    >>> perturb_codes(codes, pending, None, rows, jnp.float32, pair=bits.rademacher_pair).tolist()
    [[2.0, 2.0, 0.0, 2.0]]
    """
    if isinstance(matrix, Codes):
        (n_out, n_in), group = matrix.shape, matrix.group
        values = matrix.codes if matrix.bits == 8 else unpack(matrix.codes)
        values = values.astype(jnp.float32).reshape(n_out, n_in // group, group)
        wide = exact_product(values, matrix.scale[:, :, None]).reshape(n_out, n_in)
    else:
        wide = matrix.astype(jnp.float32)
    columns = matrix.shape[1]

    def z(key: jax.Array) -> jax.Array:
        return bits.draw(pair, key, rows, columns)

    if pending is not None:
        # Of constants, XLA would drop the sum with zero and reorder the others.
        count, gone = lax.optimization_barrier((pending.used, pending.gone))
        start = jnp.zeros(matrix.shape, jnp.float32)
        delta = lax.fori_loop(0, count, lambda t, total: total + pending.coefs[t] * z(pending.keys[t]), start)
        wide = reference.decayed(wide, delta, gone, jnp.float32)
    return wide.astype(dtype) if probes is None else reference.members(wide, probes, z, dtype)
