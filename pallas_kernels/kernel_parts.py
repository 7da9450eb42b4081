"""What kernels share: checks of arguments, z by the GPU's functions, values of a group side by side, members."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import bits
from pallas_kernels.reference import Probes

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
"""What arrays may be."""
_log2: Any = getattr(lax, "log2", None)  # untyped: the oldest jax supported lacks it
_TOGETHER = 8  # probes whose sums over several directions are kept in registers at once


def _normal_by_hardware(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`bits.normal_pair` by way of log2, exp2, sin and cos, each one instruction of the GPU.

    The same values, checked for every radius and every angle on compute capability 9.0 (tests/test_kernels.py).
    """
    u = lax.bitcast_convert_type(((word >> np.uint32(9)) & np.uint32(0x7FFF80)) | np.uint32(0x3F800000), jnp.float32)
    u = u - np.float32(1 - 2.0**-17)
    shift = np.float32(0.5 * math.log2(2 * math.log(2)) + math.log2(bits.RADIUS_SCALE))
    radius = lax.exp2(np.float32(0.5) * _log2(-_log2(u)) + shift)
    angle = word.astype(jnp.int16).astype(jnp.float32) * np.float32(math.pi / 2**15)
    return bits.box_muller(radius, jnp.cos(angle), jnp.sin(angle), _snap_by_adding)


def _snap_by_adding(x: jax.Array, grid: float) -> jax.Array:
    """Rounds to multiples of ``grid``: float32 has no finer steps beyond 2**23 grid. XLA would cancel the two sums."""
    shift = np.float32(1.5 * 2**23 * grid)
    return (x + shift) - shift


_BY_HARDWARE: dict[bits.WordMap, bits.WordMap] = {bits.normal_pair: _normal_by_hardware}


def check_dtype(operation: str, dtype: Any) -> None:
    """Raises ValueError for a dtype that results cannot have.

    >>> check_dtype("decode", jnp.int8)
    Traceback (most recent call last):
    ValueError: decode to int8: expected float32, bfloat16 or float16; cast the result
    """
    if jnp.dtype(dtype) not in FLOATS:
        raise ValueError(f"{operation} to {jnp.dtype(dtype)}: expected float32, bfloat16 or float16; cast the result")


def check_probes(whose: str, probes: Probes) -> None:
    """Raises ValueError for probes whose parts do not fit one another.

    >>> check_probes("probes have", Probes(jnp.zeros((1, 2), jnp.uint32), jnp.ones((2, 3))))
    Traceback (most recent call last):
    ValueError: probes have keys[1, 2], matrix[2, 3]: expected [K, 2], [M, K], neither of them empty
    """
    members, directions = probes.matrix.shape if probes.matrix.ndim == 2 else (0, 0)
    if not members or not directions or probes.keys.shape != (directions, 2):
        found = f"keys{list(probes.keys.shape)}, matrix{list(probes.matrix.shape)}"
        raise ValueError(f"{whose} {found}: expected [K, 2], [M, K], neither of them empty")


def word_map(pair: bits.WordMap, implementation: str) -> bits.WordMap:
    """The map to use in a kernel: "mosaic" has one by the GPU's functions where there is one, with the same values.

    >>> word_map(bits.normal_pair, "interpret") is bits.normal_pair
    True
    """
    return _BY_HARDWARE.get(pair, pair) if implementation == "mosaic" else pair


def by_lane(parts: Sequence[jax.Array], lane: jax.Array, first: int = 0) -> jax.Array:
    """The part number ``lane``, element by element; a thread knows its lanes, so that nothing is left to select.

    >>> by_lane([jnp.zeros(3), jnp.ones(3), 2 * jnp.ones(3)], jnp.array([2, 0, 1])).tolist()
    [2.0, 0.0, 1.0]
    """
    if len(parts) == 1:
        return parts[0]
    half = (len(parts) + 1) // 2
    left, right = by_lane(parts[:half], lane, first), by_lane(parts[half:], lane, first + half)
    return jnp.where(lane < first + half, left, right)


def write_members(
    wide: jax.Array, probes: Any, out: Any, at: tuple[Any, ...], z: Callable[..., jax.Array], zeros: Callable[..., Any]
) -> None:
    """Writes a program's part of each member, out[m, *at] = wide + sum_k matrix[m, k] z(*keys[k]).

    ``zeros()`` is an array of zeros, float32 like ``wide`` and of the same layout.

    >>> out, probes = np.zeros((2, 1, 3)), (np.zeros((1, 2)), np.array([[1.0], [-1.0]]))
    >>> write_members(np.ones(3), probes, out, (0,), lambda *key: np.arange(3.0), lambda: np.zeros(3))
    >>> out[:, 0].tolist()
    [[1.0, 2.0, 3.0], [1.0, 0.0, -1.0]]
    """
    keys, matrix = probes
    members, directions = matrix.shape
    if directions == 1:
        noise = z(keys[0, 0], keys[0, 1])
        for m in range(members):
            out[m, *at] = (wide + matrix[m, 0] * noise).astype(out.dtype)
        return
    for start in range(0, members, _TOGETHER):
        chunk = range(start, min(start + _TOGETHER, members))

        def accumulate(k: Any, deltas: tuple[jax.Array, ...], chunk: range = chunk) -> tuple[jax.Array, ...]:
            def add(deltas: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                noise = z(keys[k, 0], keys[k, 1])
                return tuple(delta + matrix[m, k] * noise for m, delta in zip(chunk, deltas, strict=True))

            # Members of most estimators move along few directions: the others need no z.
            along = reduce(lambda a, b: a | b, (matrix[m, k] != np.float32(0) for m in chunk))
            return lax.cond(along, add, lambda deltas: deltas, deltas)

        deltas = lax.fori_loop(0, directions, accumulate, tuple(zeros() for _ in chunk))
        for m, delta in zip(chunk, deltas, strict=True):
            out[m, *at] = (wide + delta).astype(out.dtype)
