"""Quantised weights and activations: symmetric int8 and int4 codes, Mosaic GPU kernels beside their XLA reference.

`pallas_kernels.quantized_reference` states what codes and scales are, to the bit. The kernels go straight from global
memory to registers and back; a thread loads up to eight codes at once, and a warp 32 neighbours of those.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels import quantized_reference as reference
from pallas_kernels.implementations import apart, choose
from pallas_kernels.kernel_parts import FLOATS, check_dtype
from pallas_kernels.quantized_reference import QMAX, Codes

plgpu: Any = mosaic_gpu  # untyped: kernels need more of it than the oldest jax supported has

_WARPS, _LANES = 4, 32
_VECTORS_A_THREAD = 4  # loads that a thread has under way at once
_PIECE = 4096  # columns of a row that are in registers at once, where they come twice
_ROW_BYTES = 320 * _WARPS * _LANES  # of a row that is kept in registers, 80 of them


def quantize(w: jax.Array, bits: int, group: int | None = None, *, implementation: str | None = None) -> Codes:
    """Codes of a weight matrix: round_half_even(w * (1 / scale)) with scale = absmax * float32(1 / qmax).

    qmax is 127 (8 bits) or 7 (4 bits), absmax that of a group. A group of zeros has scale 1. A group that holds an
    infinity or NaN has such a scale, and unspecified codes: nothing of it decodes to a finite value.

    Args:
        w: [n_out, n_in] of float32, bfloat16 or float16.
        bits: 8 or 4; 4 takes an even n_in.
        group: the columns of a row that share a scale, a divisor of n_in; None for the whole row.
        implementation: None or "xla"; no kernel is needed, as weights are quantised once.

    Raises:
        ValueError: for arguments that do not fit.
        NotImplementedError: if the implementation named does not apply.

    >>> quantize(jnp.array([[7.0, -14.0, 0.2, 0.7]]), 4, 2)
    Codes(codes=Array([[ 36, 121]], dtype=uint8), scale=Array([[2. , 0.1]], dtype=float32))
    """
    _check_floats("quantize", "w", w, "[n_out, n_in]")
    if bits not in QMAX:
        raise ValueError(f"quantize to {bits!r} bits: expected 8 or 4")
    columns = w.shape[1]
    if bits == 4 and columns % 2:
        raise ValueError(f"quantize of w{list(w.shape)} to 4 bits: expected an even n_in; pad a column, or use 8 bits")
    if group is not None and (not isinstance(group, int) or group < 1 or columns % group):
        raise ValueError(
            f"quantize of w{list(w.shape)} in groups of {group!r}: expected a divisor of n_in = {columns}, such as "
            f"{math.gcd(columns, 128)}, or None for one scale a row"
        )
    choose("quantize", implementation, "there is no kernel; leave implementation to None")
    return reference.quantize(w, bits, group or columns)


def decode(codes: Codes, dtype: Any, *, implementation: str | None = None) -> jax.Array:
    """The matrix [n_out, n_in] that the codes stand for: code * scale in float32, rounded once to ``dtype``.

    Args:
        codes: of 8 or 4 bits. Of 4 bits, -8 is understood too.
        dtype: float32, bfloat16 or float16.
        implementation: "mosaic" or "mosaic_portable" (NVIDIA GPUs of compute capability 9.0, or 9.0 and above: the same
            kernel), "xla", "interpret", or None for the first of these that applies. Kernels take n_out in multiples of
            four, and n_in (its half for 4 bits) and groups that fill whole warps.

    Raises:
        ValueError: for codes whose parts do not fit one another, or another dtype.
        NotImplementedError: if the implementation named does not apply, with the reason.

    >>> decode(quantize(jnp.array([[7.0, -14.0, 0.2, 0.7]]), 4, 2), jnp.float32).tolist()
    [[8.0, -14.0, 0.20000000298023224, 0.699999988079071]]
    """
    _check_codes("decode", codes)
    check_dtype("decode", dtype)
    plan = _plan(codes, dtype)
    chosen = choose("decode", implementation, plan if isinstance(plan, str) else None)
    if chosen == "xla" or isinstance(plan, str):
        return reference.decode(codes, dtype)
    instead = partial(reference.decode, dtype=dtype)
    return _run(partial(_decode, plan, dtype, chosen == "interpret"), instead, implementation)(codes)


def quantize_rows(x: jax.Array, *, members: int = 1, implementation: str | None = None) -> Codes:
    """int8 codes of activations [rows, n], one scale a row: (int8 [rows, n], float32 [rows, 1]).

    As `quantize` with 8 bits, from one read of x. With ``members`` the rows are those of so many members, one after the
    other, and what becomes codes of all but the first is their difference from it, x_m - x_0 in float32.

    Args:
        x: [rows, n] of float32, bfloat16 or float16.
        members: a divisor of the rows.
        implementation: as in `decode`. The kernel takes n in multiples of 128, for one member up to 20480 (10240 in
            float32), which is what the registers of a block hold.

    Raises:
        ValueError: for another dtype or number of axes, or rows that are not those of so many members.
        NotImplementedError: if the implementation named does not apply, with the reason.

    >>> quantize_rows(jnp.array([[127.0, -1.4], [0.0, 0.0]]))
    Codes(codes=Array([[127,  -1],
           [  0,   0]], dtype=int8), scale=Array([[1.],
           [1.]], dtype=float32))
    """
    _check_floats("quantize_rows", "x", x, "[rows, n]")
    rows, columns = x.shape
    _check_members("quantize_rows", "x", x, members)
    limit = None
    if columns % (_WARPS * _LANES) or (members == 1 and columns * x.dtype.itemsize > _ROW_BYTES):
        most = _ROW_BYTES // x.dtype.itemsize
        limit = f"x{list(x.shape)} of {x.dtype}: the kernel takes rows of a multiple of 128 elements up to {most}"
    elif not rows or x.size >= 1 << 31:
        limit = f"x{list(x.shape)}: the kernel takes 1 to 2**31 - 1 elements"
    chosen = choose("quantize_rows", implementation, limit)
    if chosen == "xla":
        return reference.quantize_rows(x, members)
    launch = partial(_quantize_rows, chosen == "interpret", members)
    return Codes(*_run(launch, lambda x: tuple(reference.quantize_rows(x, members)), implementation)(x))


def matmul_int8(
    x_codes: jax.Array,
    x_scale: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    dtype: Any,
    *,
    members: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """x W^T of int8 codes, [rows, n_out]: sum_i x_codes[r, i] codes[o, i], times x_scale[r] scale[o].

    The sum is exact in int32. It is multiplied in float32 by the product of the two scales, and rounded once to
    ``dtype``. With ``members`` the rows are as `quantize_rows` makes them of so many members, and to those of all but
    the first its own are added in float32: y_m = y_0 + (x_m - x_0) W^T.

    Args:
        x_codes: int8 [rows, n_in], as from `quantize_rows`.
        x_scale: float32 [rows, 1].
        codes: int8 [n_out, n_in], as from `quantize` with 8 bits and no groups.
        scale: float32 [n_out, 1]. Scales of groups of columns would have to be applied within the sum.
        dtype: float32, bfloat16 or float16.
        members: a divisor of the rows.
        implementation: None or "xla": it is one GEMM of the vendor's library and a product fused into what follows.

    Raises:
        ValueError: for codes of 4 bits, scales of groups, shapes that do not fit one another, another dtype, or rows
            that are not those of so many members.
        NotImplementedError: if the implementation named does not apply.

    >>> x, w = quantize_rows(jnp.array([[127.0, 1.0]])), quantize(jnp.array([[127.0, 0.0], [0.0, -254.0]]), 8)
    >>> matmul_int8(*x, *w, jnp.float32).tolist()
    [[16129.0, -254.0]]
    """
    shapes = f"x_codes {x_codes.dtype}{list(x_codes.shape)} and codes {codes.dtype}{list(codes.shape)}"
    if not x_codes.dtype == codes.dtype == jnp.int8:
        raise ValueError(f"matmul_int8 of {shapes}: expected int8 both; decode codes of 4 bits")
    if not x_codes.ndim == codes.ndim == 2 or x_codes.shape[1] != codes.shape[1]:
        raise ValueError(f"matmul_int8 of {shapes}: expected [rows, n_in] and [n_out, n_in]; reshape to two axes")
    if codes.shape[1] >= 1 << 17:
        raise ValueError(f"matmul_int8 of {shapes}: expected n_in below 2**17, or int32 may overflow; decode them")
    for name, values, length in (("x_scale", x_scale, x_codes.shape[0]), ("scale", scale, codes.shape[0])):
        if values.dtype != jnp.float32 or values.shape != (length, 1):
            raise ValueError(
                f"matmul_int8 with {name} {values.dtype}{list(values.shape)}: expected float32[{length}, 1], one a row;"
                " quantise without groups, or decode them"
            )
    _check_members("matmul_int8", "x_codes", x_codes, members)
    check_dtype("matmul_int8", dtype)
    choose("matmul_int8", implementation, "there is no kernel; leave implementation to None")
    return reference.matmul_int8(x_codes, x_scale, codes, scale, dtype, members)


def _check_members(operation: str, name: str, x: jax.Array, members: int) -> None:
    if members < 1 or len(x) % members:
        raise ValueError(f"{operation} of {name}{list(x.shape)} of {members} members: expected a divisor of the rows")


def _check_floats(operation: str, name: str, x: jax.Array, axes: str) -> None:
    if x.ndim != 2 or x.dtype not in FLOATS or not x.shape[1]:
        raise ValueError(
            f"{operation} of {name} {x.dtype}{list(x.shape)}: expected {axes} of float32, bfloat16 or float16, with at "
            "least one column; reshape or cast it"
        )


def _check_codes(operation: str, codes: Codes) -> None:
    values, scale = codes
    fits = values.ndim == scale.ndim == 2 and values.dtype in (jnp.int8, jnp.uint8) and scale.dtype == jnp.float32
    if fits:
        (rows, columns), groups = codes.shape, scale.shape[1]
        fits = rows == scale.shape[0] and columns > 0 and groups > 0 and columns % groups == 0
    if not fits:
        raise ValueError(
            f"{operation} of codes {values.dtype}{list(values.shape)} with scale {scale.dtype}{list(scale.shape)}: "
            "expected int8 [n_out, n_in] (or uint8 [n_out, n_in / 2]) with float32 [n_out, groups], where groups "
            "divides n_in; make them by quantize"
        )


# --- the kernels ------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """How `_decode` cuts codes, seen as [n_out, groups, columns], into programs."""

    view: tuple[int, int, int]
    tile: tuple[int, int, int]
    lanes: tuple[int, int]
    """Lanes of a warp along groups and columns; the four warps lie along n_out."""
    vector: int
    halves: int
    """2 if a byte holds two codes, of columns half a row apart."""


def _plan(codes: Codes, dtype: Any) -> _Plan | str:
    """A plan, or why there is none."""
    (rows, columns), halves = codes.shape, 8 // codes.bits
    groups = codes.scale.shape[1]
    of = f"{codes.codes.dtype}{list(codes.codes.shape)} in groups of {codes.group}"
    if rows % _WARPS or not rows:
        return f"{of}: the kernel takes n_out in multiples of {_WARPS}"
    if rows * columns >= 1 << 31:
        return f"{of} has 2**31 elements or more"
    if groups > 1 and groups % halves:
        return f"{of}: the kernel takes whole groups in each half of a row"
    groups, columns = (1, columns // halves) if groups == 1 else (groups // halves, codes.group)
    for vector in (8, 4, 2)[jnp.dtype(dtype) == jnp.float32 :]:  # results are stored 16 bytes at a time
        across = math.gcd(columns, _LANES * vector) // vector
        if (
            across > 1
            and columns % (across * vector) == 0
            and _LANES % across == 0
            and groups % (_LANES // across) == 0
        ):
            break
    else:
        return f"{of}: the kernel takes rows that fill whole warps, and that does not"
    # Each thread takes as many vectors as divide the matrix, preferably neighbours along a row.
    base, tile, left = (_WARPS, _LANES // across, across * vector), [], _VECTORS_A_THREAD
    for length, unit in zip((columns, groups, rows), reversed(base), strict=True):
        times = math.gcd(length // unit, left)
        tile.append(unit * times)
        left //= times
    return _Plan((rows, groups, columns), (tile[2], tile[1], tile[0]), (base[1], across), vector, halves)


def _run(launch: Callable[..., Any], instead: Callable[..., Any], implementation: str | None) -> Callable[..., Any]:
    """Runs the kernel, and ``instead`` under vmap and, if no implementation is named, on platforms other than CUDA."""
    run = apart(launch, instead)
    if implementation is not None:
        return run
    return lambda x: lax.platform_dependent(x, cuda=run, default=instead)


def _kernel(
    body: Callable[..., None], out_type: Any, programs: int, *, interpret: bool, **parameters: Any
) -> Callable[..., Any]:
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(**parameters),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(plan: _Plan, dtype: Any, interpret: bool, codes: Codes) -> jax.Array:
    rows, groups, columns = plan.view
    halves_of_scale = codes.scale.size // (rows * groups)  # 1 if a row has a single scale
    out = jax.ShapeDtypeStruct((rows, plan.halves, groups, columns), dtype)
    programs = math.prod(length // unit for length, unit in zip(plan.view, plan.tile, strict=True))
    kernel = _kernel(partial(_decode_body, plan), (out,), programs, interpret=interpret)
    (w,) = kernel(codes.codes.reshape(plan.view), codes.scale.reshape(rows, halves_of_scale, groups))
    return w.reshape(codes.shape)


def _decode_body(plan: _Plan, codes: Any, scale: Any, out: Any) -> None:
    """One program: a tile of codes, and of each half of the matrix that those hold."""
    across_groups, across = plan.lanes
    of_codes = plgpu.Layout.TILED(
        plgpu.Tiling(((_WARPS, across_groups, across * plan.vector), (plan.vector,))),
        warp_dims=(-4,),
        lane_dims=(-2,) if across_groups == 1 else (-3, -2),
        vector_dim=-1,
    )
    program, index = lax.axis_index("program"), []
    for length, unit in zip(reversed(plan.view), reversed(plan.tile), strict=True):
        count = np.int32(length // unit)
        index.append(pl.ds(lax.rem(program, count) * np.int32(unit), unit))
        program = lax.div(program, count)
    columns, groups, rows = index
    values = plgpu.load(codes.at[rows, groups, columns], layout=of_codes, optimized=False)
    if plan.halves == 2:
        values = values.astype(jnp.int32)
    for half in range(plan.halves):
        code = (reference.nibble(values, half) if plan.halves == 2 else values).astype(jnp.float32)
        of_half = scale.at[rows, half if scale.shape[1] > 1 else 0, groups]
        factor = plgpu.load(of_half, layout=of_codes.reduce(2), optimized=False)
        factor = plgpu.layout_cast(lax.broadcast_in_dim(factor, plan.tile, (0, 1)), of_codes)
        out[rows, half, groups, columns] = (code * factor).astype(out.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _quantize_rows(interpret: bool, members: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes, scale = jax.ShapeDtypeStruct(x.shape, jnp.int8), jax.ShapeDtypeStruct((x.shape[0], 1), jnp.float32)
    # By default a number cannot be reinterpreted as an integer (only arrays can), which `reciprocal` needs.
    lanes = {"lowering_semantics": plgpu.LoweringSemantics.Lane}
    body = _quantize_rows_body if members == 1 else partial(_quantize_members_body, x.shape[0] // members)
    return _kernel(body, (codes, scale), x.shape[0], interpret=interpret, **lanes)(x)


def _quantize_rows_body(x: Any, codes: Any, scale: Any) -> None:
    """One program: a row. The maximum is found in the row's own dtype, in which it is exact."""
    row, columns = lax.axis_index("program"), x.shape[1]
    values = _load_of_row(x, row, 0, columns)
    absmax = jnp.max(jnp.abs(values)).astype(jnp.float32)
    of_row, inverse = reference.scale_of(absmax, QMAX[8])
    code = reference.code_of(values.astype(jnp.float32), lax.broadcast_in_dim(inverse, (columns,), ()), QMAX[8])
    codes[row] = code.astype(jnp.int8)
    scale[row, 0] = of_row


def _quantize_members_body(rows: int, x: Any, codes: Any, scale: Any) -> None:
    """One program: a row, without that of the first member if it is of another. Reads both twice, in pieces."""
    row, columns = lax.axis_index("program"), x.shape[1]
    first, kept = lax.rem(row, np.int32(rows)), jnp.where(row < rows, np.float32(0), np.float32(1))
    piece = next(n for n in range(min(columns, _PIECE), 0, -_WARPS * _LANES) if columns % n == 0)

    def part(start: int) -> jax.Array:
        own, other = (_load_of_row(x, r, start, piece).astype(jnp.float32) for r in (row, first))
        return own - other * lax.broadcast_in_dim(kept, (piece,), ())

    starts = range(0, columns, piece)
    absmax = jnp.max(jnp.abs(part(0)))
    for start in starts[1:]:
        absmax = jnp.maximum(absmax, jnp.max(jnp.abs(part(start))))
    of_row, inverse = reference.scale_of(absmax, QMAX[8])
    for start in starts:
        code = reference.code_of(part(start), lax.broadcast_in_dim(inverse, (piece,), ()), QMAX[8])
        codes[row, pl.ds(start, piece)] = code.astype(jnp.int8)
    scale[row, 0] = of_row


def _load_of_row(x: Any, row: Any, start: int, count: int) -> jax.Array:
    vector = min(math.gcd(count // (_WARPS * _LANES), 8), 16 // x.dtype.itemsize)
    layout = plgpu.Layout.WG_STRIDED((count,), vec_size=vector)
    return plgpu.load(x.at[row, pl.ds(start, count)], layout=layout, optimized=False)
