"""The noise generator: threefry-2x32-20 words, and exact maps from words to N(0, 1) and +-1.

Everything is plain ``jax.numpy`` on float32, int32 and uint32, so that reference code and kernels call the
same functions. A draw is addressed by ``(key, row, column group)``: one threefry call gives two 32-bit words,
each word gives two values, so a group is four neighbouring columns of one row.

One address gives the same value in *every* program and on every backend, although compilers fuse multiply-adds
where they like and every GPU has its own approximate ``log`` and ``sin``. A word holds a radius and an angle of 16 bits
each, so there are 65536 of either, and both are rounded to a coarse grid before they are multiplied. The scales of the
two grids were searched for such that no radius, no sine and no cosine lies near a rounding boundary: whatever evaluates
them to a relative 1.6e-7 rounds to the same grid point. tests/test_bits.py goes through all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WordMap = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
Noise = Callable[[], jax.Array]
Words = jax.Array | tuple[jax.Array, jax.Array]
"""The two words of each call: uint32 [2, R, groups] on CPUs, else two [R, groups]."""

GROUP = 4
"""Columns that share one threefry call."""
GENERATOR = 1
"""Changes whenever an address gets another value, so that what was recorded before is not replayed with it."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA

# Near-minimax polynomials on the stated range, lowest power first; relative errors below 3e-8.
_LOG = (
    -2.0, 0.9999995827674866, -0.6666831970214844, 0.5000588893890381, -0.39916831254959106,
    0.3308749198913574, -0.2983478903770447, 0.28964272141456604, -0.1791960746049881,
)  # -2 log1p(t) / t, 1 + t in [rt.5, rt2)  # fmt: skip
_SIN = (
    0.7853981852531433,
    -0.08074543625116348,
    0.002490007085725665,
    -3.595450834836811e-05,
)  # sin(pi x / 4) / x
_COS = (1.0, -0.3084242641925812, 0.015849914401769638, -0.0003188805130776018)  # cos(pi x / 4); both in x^2, |x| <= 1
_TWO_LN2 = 1.3862943611198906
_SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2) in float32

# Radius and circle carry a scale each, found by search (docs/kernels.md); together they give z a variance of 0.99993.
RADIUS_SCALE = 1.169596875
"""The radius is scaled by this before it is rounded; the circle by about the inverse."""
_CIRCLE_SCALE = 0.8551145
_RADIUS_GRID = 2.0**-9
_CIRCLE_GRID = 2.0**-10


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


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    value = jnp.full_like(x, np.float32(coefficients[-1]))
    for c in coefficients[-2::-1]:
        value = np.float32(c) + x * value
    return value


def _snap(x: jax.Array, grid: float) -> jax.Array:
    """Rounds to the nearest multiple of ``grid``, a power of two; zero is +0, whatever the sign of ``x``."""
    whole = lax.round(x * np.float32(1 / grid), lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.where(whole == np.float32(0), np.float32(0), whole * np.float32(grid))


def box_muller(
    radius: jax.Array, cosine: jax.Array, sine: jax.Array, snap: Callable[[jax.Array, float], jax.Array] = _snap
) -> tuple[jax.Array, jax.Array]:
    """Two values of z from the radius times RADIUS_SCALE and a point of the unit circle, good to a relative 1.6e-7.

    ``snap(x, grid)`` rounds to the nearest multiple of ``grid``. Together with `cut12` it is all the rounding of z.

    >>> [float(z) for z in box_muller(jnp.float32(1.0), jnp.float32(0.6), jnp.float32(0.8))]
    [0.5126953125, 0.6845703125]
    """
    radius, scale = snap(radius, _RADIUS_GRID), np.float32(_CIRCLE_SCALE)
    return cut12(radius * snap(cosine * scale, _CIRCLE_GRID)), cut12(radius * snap(sine * scale, _CIRCLE_GRID))


def normal_pair(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two independent N(0, 1) values, 12 significant bits each, from one uint32 word (Box and Muller, 1958).

    With m the high half of the word and l the low half as a signed integer, u = (m + 1/2) / 65536:
    z = sqrt(-2 ln u) (cos, sin)(2 pi l / 65536), the radius on a grid of 2**-9 / 1.17 and the circle on one of
    2**-10 / 0.855. |z| <= 4.86. Box, G. E. P. and Muller, M. E., Ann. Math. Statist. 29 (1958).

    >>> [round(float(z), 3) for z in normal_pair(jnp.uint32(0x12345678))]
    [-1.205, 1.959]
    """
    odd = ((word >> _u32(16)) * _u32(2) + _u32(1)).astype(jnp.int32)  # 2m + 1 = 2**17 u
    bits = lax.bitcast_convert_type(odd.astype(jnp.float32), jnp.int32)
    exponent = (bits - np.int32(_SQRT_HALF)) >> np.int32(23)  # of u * 2**17, so that its mantissa is in [rt.5, rt2)
    t = lax.bitcast_convert_type(bits - (exponent << np.int32(23)), jnp.float32) - np.float32(1)
    halvings = (np.int32(17) - exponent).astype(jnp.float32)
    squared = t * _polynomial(_LOG, t) + halvings * np.float32(_TWO_LN2)
    radius = jnp.sqrt(squared * np.float32(RADIUS_SCALE**2))
    # The angle as a multiple q of a quarter turn and a rest of at most an eighth turn.
    shifted = word + _u32(1 << 13)
    rest = (shifted & _u32(0x3FFF)).astype(jnp.int32) - np.int32(1 << 13)
    x = rest.astype(jnp.float32) * np.float32(2.0**-13)
    sine, cosine = x * _polynomial(_SIN, x * x), _polynomial(_COS, x * x)
    odd_quarter = (shifted & _u32(1 << 14)) != _u32(0)
    sign = (shifted << _u32(16)) & _u32(1 << 31)  # q in (2, 3)
    across = (shifted ^ (shifted << _u32(1))) << _u32(16) & _u32(1 << 31)  # q in (1, 2)
    first, second = jnp.where(odd_quarter, sine, cosine), jnp.where(odd_quarter, cosine, sine)
    return box_muller(radius, _float(_bits(first) ^ across), _float(_bits(second) ^ sign))


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


def rounding_pair(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two integers in [0, 65536), as uint32, for stochastic rounding: the halves of the word, mixed.

    A word serves its direction and the rounding of the update along it, which saves a threefry call. The mixing is that
    of MurmurHash3's 32-bit finalizer (A. Appleby, public domain), a bijection after which no correlation with z is
    left: below 3e-5 over 2**28 words (docs/kernels.md).

    >>> [hex(u) for u in rounding_pair(jnp.uint32(1))]
    ['0x514e', '0x28b7']
    """
    word = (word ^ (word >> _u32(16))) * _u32(0x85EBCA6B)
    word = (word ^ (word >> _u32(13))) * _u32(0xC2B2AE35)
    return uniform16_pair(word ^ (word >> _u32(16)))


@partial(jax.jit, static_argnames="columns")  # a program with many draws traces and lowers few
def words(key: jax.Array, rows: jax.Array, columns: int, first_group: jax.Array | int = 0) -> Words:
    """The threefry words of the rows ``rows`` (uint32 [R]) of an array with ``columns`` columns: two [R, groups].

    ``key`` is uint32 [2]. Group c of row r has the counter (r, c), from ``first_group`` on.

    >>> words(jnp.zeros(2, jnp.uint32), jnp.arange(2, dtype=jnp.uint32), 5)[0].shape
    (2, 2)
    """
    shape = (2,) * _words_in_one() + (rows.shape[0], -(-columns // GROUP))
    group = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1) + jnp.asarray(first_group, jnp.uint32)
    pair = threefry2x32(key[0], key[1], jnp.broadcast_to(rows[:, None], shape), group)
    first = lax.broadcasted_iota(jnp.uint32, shape, 0) == _u32(0)
    # Behind the barrier they are computed once, not once for each of the four lanes that read them.
    return lax.optimization_barrier(jnp.where(first, *pair) if _words_in_one() else pair)


def _words_in_one() -> bool:
    """Whether both words of a call are one array.

    XLA makes a loop of each result on a CPU, and so would compute, and compile, the rounds once for each word, and
    what is made of words, twice.
    """
    return jax.default_backend() == "cpu"


@partial(jax.jit, static_argnames=("pair", "columns"))
def spread(pair: WordMap, words: Words, columns: int) -> jax.Array:
    """The four values of each group, side by side: two [R, groups] of words -> [R, columns].

    >>> spread(rademacher_pair, jnp.array([[[0]], [[1 << 31]]], jnp.uint32), 3).tolist()
    [[1.0, 1.0, -1.0]]
    """
    rows, groups = words[0].shape
    if _words_in_one():  # in the loop over lanes, the map would be made for each, and not by vectors
        first, second = lax.optimization_barrier(pair(jnp.asarray(words)))
        values = jnp.stack([first[0], second[0], first[1], second[1]], axis=2)
    else:
        lane = lax.broadcasted_iota(jnp.uint32, (rows, groups, GROUP), 2)
        first, second = pair(jnp.where(lane < _u32(2), words[0][:, :, None], words[1][:, :, None]))
        values = jnp.where(lane % _u32(2) == _u32(0), first, second)
    return values.reshape(rows, groups * GROUP)[:, :columns]


def draw(
    pair: WordMap, key: jax.Array, rows: jax.Array, columns: int, *, first_group: jax.Array | int = 0
) -> jax.Array:
    """Values of the rows ``rows`` (uint32[R]) of an array with ``columns`` columns: [R, columns].

    ``key`` is uint32[2]. Element (r, c) is value ``c % 4`` of the threefry call with counter ``(r, c // 4)``; it
    depends on nothing else, so any subset of rows can be drawn alone, and so can the columns from ``4 * first_group``
    on.

    >>> draw(rademacher_pair, jnp.zeros(2, jnp.uint32), jnp.arange(2, dtype=jnp.uint32), 3).tolist()
    [[1.0, 1.0, -1.0], [1.0, -1.0, -1.0]]
    """
    return spread(pair, words(key, rows, columns, first_group), columns)


def round_to_nearest(x: jax.Array, dtype: Any, noise: Noise) -> jax.Array:
    """Float32 ``x`` in ``dtype``, ties to even.

    >>> float(round_to_nearest(jnp.float32(1.003), jnp.bfloat16, lambda: jnp.uint32(0)))
    1.0
    """
    return x.astype(dtype)


def round_stochastically(x: jax.Array, dtype: Any, noise: Noise) -> jax.Array:
    """One of the two neighbours of ``x`` in ``dtype``: away from zero with probability (|x| - lower) / spacing.

    ``dtype`` is bfloat16 or float16; ``noise()`` gives uint32 integers in [0, 65536), of the shape of ``x``.

    >>> [float(round_stochastically(jnp.float32(1.002), jnp.bfloat16, lambda n=n: jnp.uint32(n))) for n in (0, 65535)]
    [1.0, 1.0078125]
    """
    raw = _bits(x)
    sign, magnitude = raw & _u32(1 << 31), raw & _u32(0x7FFFFFFF)
    if dtype == jnp.bfloat16:
        moved = (magnitude + noise()) & _u32(0xFFFF0000)
    else:  # float16: 13 of float32's 23 fraction bits go; below 2**-14 the spacing is 2**-24 whatever the exponent
        chance = noise()
        moved = (magnitude + (chance >> _u32(3))) & _u32(0xFFFFE000)
        steps = _float(magnitude) * np.float32(2.0**24)
        whole = jnp.minimum(steps, np.float32(1024)).astype(jnp.int32).astype(jnp.float32)
        up = jnp.where(chance.astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-16) < steps - whole, 1.0, 0.0)
        tiny = (whole + up.astype(jnp.float32)) * np.float32(2.0**-24)
        moved = jnp.where(magnitude < _u32(0x38800000), _bits(tiny), moved)  # 2**-14
    moved = jnp.where(magnitude < _u32(0x7F800000), moved, magnitude)  # infinities and NaN stay
    return _float(moved | sign).astype(dtype)
