"""The noise generator: threefry-2x32-20 words, and exact maps from words to N(0, 1) and +-1.

Everything is plain ``jax.numpy`` on float32, int32 and uint32, so that reference code and kernels call the
same functions. A draw is addressed by ``(key, row, column group)``: one threefry call gives two 32-bit words,
each word gives two values, so a group is four neighbouring columns of one row.

Two words of the same address give the same value in *every* program and on every backend that follows
IEEE-754 for ``+``, ``*`` and ``sqrt``:

* no library ``log``, ``cos`` or ``sin`` is called (these differ between backends); short polynomials are used;
* no product can be contracted with a following sum into a fused multiply-add, since each such product passes
  through an integer mask first (`_rounded`); without that masking, jitted and eager values differ.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WordMap = Callable[[jax.Array], tuple[jax.Array, jax.Array]]

GROUP = 4
"""Columns that share one threefry call."""

ROUNDING_STREAM = 1 << 31
"""Offset of the column groups whose words feed stochastic rounding; those below it feed directions."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA

# Near-minimax polynomials on the stated range; the relative error of each is below 2**-16, and z keeps 12 bits.
_LOG = (-2.00000912, 0.99980434, -0.66516056, 0.5080658, -0.44111766, 0.285838)  # -2 log1p(t) / t, g in [rt.5, rt2)
_SIN = (0.78539698, -0.08072476, 0.00243562)  # sin(pi x / 4) / x in x^2, |x| < 1
_COS = (0.99998822, -0.30823113, 0.01535802)  # cos(pi x / 4) in x^2, |x| < 1
_TWO_LN2 = 1.3862934  # 19 significant bits, so that its product with an integer below 32 is exact
_SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2) in float32


def _u32(value: int) -> np.uint32:
    return np.uint32(value)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def threefry2x32(key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encrypts the counter (x0, x1) under the key (key0, key1): two uint32 words.

    Threefry-2x32 with 20 rounds, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    All arguments are uint32 and broadcast; the words are those of ``jax.extend.random.threefry_2x32``.

    >>> [hex(w) for w in threefry2x32(*jnp.zeros((4, 1), jnp.uint32))[0].tolist()]
    ['0x6b200159']
    """
    schedule = (key0, key1, key0 ^ key1 ^ _u32(_PARITY))
    x0, x1 = x0 + key0, x1 + key1
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << _u32(rotation)) | (x1 >> _u32(32 - rotation))) ^ x0
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + schedule[(i + 2) % 3] + _u32(i + 1)
    return x0, x1


def fold(key: jax.Array, data: jax.Array) -> jax.Array:
    """The key data (uint32[2]) of ``jax.random.fold_in(key, data)`` for a threefry key and a uint32 scalar.

    >>> key = jax.random.key(7)
    >>> bool((fold(jax.random.key_data(key), jnp.uint32(3)) == jax.random.key_data(jax.random.fold_in(key, 3))).all())
    True
    """
    return jnp.stack(threefry2x32(key[0], key[1], jnp.zeros_like(data), data))


def cut12(x: jax.Array) -> jax.Array:
    """Cuts float32 values to their 12 leading significant bits (toward zero).

    The product of two cut numbers has at most 24 bits and is therefore exact in float32: neither a fused
    multiply-add nor the order in which a compiler fuses can change it.

    >>> float(cut12(jnp.float32(1.0009765)))
    1.00048828125
    """
    return _float(_bits(jnp.asarray(x, jnp.float32)) & _u32(0xFFFFF000))


def _rounded(product: jax.Array) -> jax.Array:
    """Clears a product's last bit, which keeps compilers from contracting it with the sum that follows."""
    return _float(_bits(product) & _u32(0xFFFFFFFE))


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    value = jnp.full_like(x, np.float32(coefficients[-1]))
    for c in coefficients[-2::-1]:
        value = np.float32(c) + _rounded(x * value)
    return value


def normal_pair(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two independent N(0, 1) values, 12 significant bits each, from one uint32 word (Box and Muller, 1958).

    With m the high 16 bits, u = (m + 1/2) / 65536 and the radius is sqrt(-2 ln u); the low 16 bits choose one of
    65536 equally spaced angles. So |z| <= 4.85. Box, G. E. P. and Muller, M. E., Ann. Math. Statist. 29 (1958).

    >>> [round(float(z), 3) for z in normal_pair(jnp.uint32(0x12345678))]
    [-2.235, -0.533]
    """
    odd = ((word >> _u32(16)) * _u32(2) + _u32(1)).astype(jnp.int32)  # 2m + 1 = 2**17 u
    bits = lax.bitcast_convert_type(odd.astype(jnp.float32), jnp.int32)
    exponent = (bits - np.int32(_SQRT_HALF)) >> np.int32(23)  # of u * 2**17, so that its mantissa is in [rt.5, rt2)
    t = lax.bitcast_convert_type(bits - (exponent << np.int32(23)), jnp.float32) - np.float32(1)
    halvings = (np.int32(17) - exponent).astype(jnp.float32)
    radius = cut12(jnp.sqrt(_rounded(t * _polynomial(_LOG, t)) + halvings * np.float32(_TWO_LN2)))
    # The low word: 14 bits of angle within (-pi/4, pi/4), the sign of the cosine, and a swap of the axes.
    offset = ((word & _u32(0x3FFF)) * _u32(2) + _u32(1)).astype(jnp.int32) - np.int32(1 << 14)
    x = offset.astype(jnp.float32) * np.float32(2.0**-14)
    sine = x * _polynomial(_SIN, x * x)
    cosine = _float(_bits(_polynomial(_COS, x * x)) ^ ((word << _u32(17)) & _u32(1 << 31)))
    swap = (word & _u32(1 << 15)) != _u32(0)
    first, second = jnp.where(swap, sine, cosine), jnp.where(swap, cosine, sine)
    return cut12(radius * first), cut12(radius * second)


def rademacher_pair(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two independent signs, +-1.0, from the leading bit of each half of one uint32 word.

    >>> [float(z) for z in rademacher_pair(jnp.uint32(0x80000000))]
    [-1.0, 1.0]
    """
    sign, one = _u32(1 << 31), _u32(0x3F800000)
    return _float((word & sign) | one), _float(((word << _u32(16)) & sign) | one)


def uniform16_pair(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two halves of one uint32 word, high first: integers in [0, 65536), as uint32.

    >>> [hex(u) for u in uniform16_pair(jnp.uint32(0x12345678))]
    ['0x1234', '0x5678']
    """
    return word >> _u32(16), word & _u32(0xFFFF)


def draw(pair: WordMap, key: jax.Array, rows: jax.Array, columns: int, *, stream: int = 0) -> jax.Array:
    """Values of the rows ``rows`` (uint32[R]) of an array with ``columns`` columns: [R, columns].

    ``key`` is uint32[2]. Element (r, c) is value ``c % 4`` of the threefry call with counter
    ``(r, c // 4 + stream)``; it depends on nothing else, so any subset of rows can be drawn alone.

    >>> draw(rademacher_pair, jnp.zeros(2, jnp.uint32), jnp.arange(2, dtype=jnp.uint32), 3).tolist()
    [[1.0, 1.0, -1.0], [1.0, -1.0, -1.0]]
    """
    groups = -(-columns // GROUP)
    group = lax.broadcasted_iota(jnp.uint32, (rows.shape[0], groups), 1) + _u32(stream)
    words = threefry2x32(key[0], key[1], jnp.broadcast_to(rows[:, None], group.shape), group)
    low, high = lax.optimization_barrier(words)  # computed once, not once for each of the four lanes that read them
    lane = lax.broadcasted_iota(jnp.uint32, (rows.shape[0], groups, GROUP), 2)
    first, second = pair(jnp.where(lane < _u32(2), low[:, :, None], high[:, :, None]))
    values = jnp.where(lane % _u32(2) == _u32(0), first, second)
    return values.reshape(rows.shape[0], groups * GROUP)[:, :columns]
