"""Probes of a matrix that is only read, with all that it still lacks: a Mosaic GPU kernel beside its XLA reference.

One read of int8 codes (or of an array) gives every member of the population: the codes are decoded, the terms that are
pending are added, and each probe is rounded once. A thread holds four or eight neighbouring columns, one or two groups
of four that share a threefry call; a warp 32 neighbours of those, in one row, and the four warps four rows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels import bits, quantized_reference
from pallas_kernels.implementations import apart, choose
from pallas_kernels.kernel_parts import FLOATS, by_lane, check_dtype, check_probes, word_map, write_members
from pallas_kernels.quantized_reference import Codes, Pending
from pallas_kernels.reference import Probes, decayed

plgpu: Any = mosaic_gpu  # untyped: kernels need more of it than the oldest jax supported has

_WARPS, _LANES = 4, 32
_WEIGHTS_A_THREAD = 16


class _Plan(NamedTuple):
    """What a kernel is compiled for, besides the shapes of its arguments."""

    tile: tuple[int, int, int]
    """Rows, vectors in a row, and columns in a vector, of what a program makes."""
    pair: bits.WordMap
    dtype: Any
    implementation: str


@jax.named_scope("perturb")
def perturb_codes(
    codes: Codes | jax.Array,
    pending: Pending | None,
    probes: Probes | None,
    dtype: Any,
    *,
    pair: bits.WordMap = bits.normal_pair,
    rows: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Members of the population, [M, n_out, n_in], from one read of a matrix that lacks its last updates.

    With w = code * scale, rounded to float32,

        w <- w + (sum_t coefs[t] z(keys[t]) - gone w)    over the terms that are pending,
        members[m] = w + sum_k matrix[m, k] z(probes.keys[k]), rounded once to ``dtype``.

    Sums are formed in float32 in the order of the terms, and every product is exact (`pallas_kernels.bits.cut12`), so
    that all implementations give the same bits. z is that of `pallas_kernels.perturb`. MeZO, arXiv 2305.17333,
    algorithm 1, for weights that change at folds only.

    Args:
        codes: the matrix [n_out, n_in], as codes or as an array of float32, bfloat16 or float16.
        pending: what it lacks; None if that is nothing.
        probes: the probes; without any (None), the result is w itself, [n_out, n_in], rounded once to ``dtype``.
        dtype: of the result: float32, bfloat16 or float16.
        pair: the distribution of z, as in `pallas_kernels.perturb`.
        rows: uint32 [n_out], which rows of a larger matrix these are; None for the first ones.
        implementation: as in `pallas_kernels.perturb`. The kernel takes arrays, and int8 codes with one scale a row;
            n_out in multiples of 4, and n_in of 128.

    Raises:
        ValueError: for arguments that do not fit one another, or another dtype.
        NotImplementedError: if the implementation named does not apply, with the reason.

    >>> codes = Codes(jnp.ones((1, 4), jnp.int8), jnp.full((1, 1), 2.0))
    >>> probes = Probes(jnp.zeros((1, 2), jnp.uint32), jnp.array([[1.0], [-1.0]]))
    >>> perturb_codes(codes, None, probes, jnp.float32, pair=bits.rademacher_pair).tolist()
    [[[3.0, 3.0, 1.0, 3.0]], [[1.0, 1.0, 3.0, 1.0]]]
    """
    _check(codes, pending, probes, dtype, rows)
    tile = _tile(codes, 1 if probes is None else probes.matrix.shape[0], dtype)
    chosen = choose("perturb_codes", implementation, tile if isinstance(tile, str) else None)
    if rows is None:
        rows = jnp.arange(codes.shape[0], dtype=jnp.uint32)
    instead = partial(_xla, pair, jnp.dtype(dtype))
    if chosen == "xla" or isinstance(tile, str):
        return instead(codes, pending, probes, rows)
    run = apart(partial(_launch, _Plan(tile, pair, jnp.dtype(dtype), chosen)), instead)
    if implementation is not None:
        return run(codes, pending, probes, rows)
    return lax.platform_dependent(codes, pending, probes, rows, cuda=run, default=instead)


def _check(codes: Codes | jax.Array, pending: Pending | None, probes: Probes | None, dtype: Any, rows: Any) -> None:
    of = f"perturb_codes of {list(codes.shape)}"
    if not isinstance(codes, Codes) and (codes.ndim != 2 or codes.dtype not in FLOATS):
        raise ValueError(f"{of} {codes.dtype}: expected Codes, or [n_out, n_in] of float32, bfloat16 or float16")
    check_dtype(of, dtype)
    if pending is not None:
        shapes = [list(x.shape) for x in pending]
        if shapes != [[shapes[0][0], 2], [shapes[0][0]], [], []] or not shapes[0][0]:
            raise ValueError(f"{of} with pending {shapes}: expected keys [T, 2], coefs [T], used [] and gone []")
    if probes is not None:
        check_probes(f"{of} with probes of", probes)
    if rows is not None and (rows.shape != codes.shape[:1] or rows.dtype != jnp.uint32):
        raise ValueError(f"{of} with rows {rows.dtype}{list(rows.shape)}: expected uint32[{codes.shape[0]}]")


def _tile(codes: Codes | jax.Array, members: int, dtype: Any) -> tuple[int, int, int] | str:
    """A plan's tile, or why there is none."""
    n_out, n_in = codes.shape
    of = f"[{n_out}, {n_in}]"
    if isinstance(codes, Codes):
        of += f" of {codes.bits} bits in groups of {codes.group}"
        if codes.bits != 8 or codes.group != n_in:
            return f"{of}: the kernel takes int8 codes with one scale a row"
    if not n_out or not n_in or n_out % _WARPS or n_in % (_LANES * bits.GROUP):
        return f"{of}: the kernel takes n_out in multiples of {_WARPS}, and n_in of {_LANES * bits.GROUP}"
    if members * n_out * n_in >= 1 << 31:
        return f"{members} members of {of} have 2**31 elements or more"
    wide = 2 * bits.GROUP  # in 16 bits a store of 16 bytes
    vector = wide if jnp.dtype(dtype).itemsize == 2 and n_in % (_LANES * wide) == 0 else bits.GROUP
    across, left = n_in // (_LANES * vector), _WEIGHTS_A_THREAD // vector
    along_row = next(n for n in range(left, 0, -1) if left % n == 0 and across % n == 0)
    left //= along_row
    down = next(n for n in range(left, 0, -1) if left % n == 0 and n_out // _WARPS % n == 0)
    return _WARPS * down, _LANES * along_row, vector


@partial(jax.jit, static_argnums=(0, 1))  # matrices of one shape are traced once
def _xla(
    pair: bits.WordMap,
    dtype: Any,
    codes: Codes | jax.Array,
    pending: Pending | None,
    probes: Probes | None,
    rows: jax.Array,
) -> jax.Array:
    return quantized_reference.perturb_codes(codes, pending, probes, rows, dtype, pair=pair)


# --- the kernel -------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def _launch(
    plan: _Plan, codes: Codes | jax.Array, pending: Pending | None, probes: Probes | None, rows: jax.Array
) -> jax.Array:
    """Brings the matrix into the form [n_out, vectors, columns of a vector] and launches the kernel."""
    n_out, n_in = codes.shape
    values, scale = (codes.codes, codes.scale.reshape(n_out)) if isinstance(codes, Codes) else (codes, None)
    view = (n_out, n_in // plan.tile[2], plan.tile[2])
    if pending is not None:
        pending = Pending(pending.keys, pending.coefs, pending.used.reshape(1), pending.gone.reshape(1))
    members = 1 if probes is None else probes.matrix.shape[0]
    kernel = plgpu.kernel(
        partial(_body, plan),
        out_type=(jax.ShapeDtypeStruct((members, *view), plan.dtype),),
        grid=(view[0] // plan.tile[0] * (view[1] // plan.tile[1]),),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=plan.implementation == "mosaic"),
        interpret=plgpu.InterpretGPUParams() if plan.implementation == "interpret" else None,
    )
    (out,) = kernel(values.reshape(view), scale, rows, pending, probes)
    return out.reshape(members, n_out, n_in) if probes is not None else out.reshape(n_out, n_in)


def _body(plan: _Plan, values: Any, scale: Any, rows: Any, pending: Any, probes: Any, out: Any) -> None:
    """One program: a tile of the matrix, in the layout ``of_weights``; ``of_vectors`` has a number for each vector."""
    tile, vector = plan.tile, plan.tile[2]
    of_weights = plgpu.Layout.TILED(
        plgpu.Tiling(((_WARPS, _LANES, vector),)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    )
    of_vectors = of_weights.reduce(2)
    across = np.int32(values.shape[1] // tile[1])
    program = lax.axis_index("program")
    first = lax.div(program, across) * np.int32(tile[0]), lax.rem(program, across) * np.int32(tile[1])
    at = tuple(pl.ds(start, n) for start, n in zip(first, tile[:2], strict=True))

    def of_rows(ref: Any) -> jax.Array:
        """A number for each row, by vector."""
        found = plgpu.load(ref.at[at[0]], layout=of_vectors.reduce(1), optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(found, tile[:2], (0,)), of_vectors)

    def spread(x: jax.Array) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, tile, (0, 1)), of_weights)

    def zeros() -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(tile, jnp.float32), of_weights)

    row, groups = of_rows(rows), vector // bits.GROUP
    column = plgpu.broadcasted_iota(jnp.uint32, tile[:2], 1, layout=of_vectors) + first[1].astype(jnp.uint32)
    lane = plgpu.broadcasted_iota(jnp.int32, tile, 2, layout=of_weights)
    pair = word_map(plan.pair, plan.implementation)

    def z(key0: jax.Array, key1: jax.Array) -> jax.Array:
        parts = []
        for g in range(groups):
            words = bits.threefry2x32(key0, key1, row, column * np.uint32(groups) + np.uint32(g))
            parts += [spread(x) for word in words for x in pair(word)]
        return by_lane(parts, lane)

    wide = plgpu.load(values.at[at], layout=of_weights, optimized=False).astype(jnp.float32)
    if scale is not None:
        wide = quantized_reference.exact_product(wide, spread(of_rows(scale)))
    if pending is not None:
        keys, coefs, used, gone = pending
        term = lambda t, total: total + coefs[t] * z(keys[t, 0], keys[t, 1])  # noqa: E731
        wide = decayed(wide, lax.fori_loop(0, used[0], term, zeros()), gone[0], jnp.float32)
    if probes is None:
        out[0, *at] = wide.astype(out.dtype)
    else:
        write_members(wide, probes, out, at, z, zeros)
