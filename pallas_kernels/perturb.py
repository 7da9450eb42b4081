"""Update and probes of a weight array from one read of it: a Mosaic GPU kernel beside its XLA reference.

A program of the grid moves ``_TILES`` groups of four neighbouring weights; a thread holds whole groups, so that one
threefry call serves the four. Nothing but the weights and the results passes through memory.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels import bits, reference
from pallas_kernels.implementations import apart, choose
from pallas_kernels.kernel_parts import FLOATS, by_lane, check_dtype, check_probes, word_map, write_members
from pallas_kernels.reference import Address, Probes, Rounding, Shard, Terms

plgpu: Any = mosaic_gpu  # untyped: kernels need more of it than the oldest jax supported has

_TILES = (512, 256, 128)  # groups of four weights in one program: the first that divides the array into enough programs
_PROGRAMS = 256  # that keep a GPU busy
ALIGNMENT = _TILES[0] * bits.GROUP
"""Arrays that lie in a page (`perturb_in_page`) begin at multiples of so many elements."""
_THREADS = 128


class _Plan(NamedTuple):
    """What a kernel is compiled for, besides the shapes of its arguments."""

    where: Address
    whole: bool
    """Whether the array starts at row and group zero, which saves adding them."""
    pair: bits.WordMap
    rounding: Rounding
    implementation: str
    dtype: Any
    """Of members."""
    in_page: tuple[int, ...] | None = None
    """The array's shape if it lies in a page, at the tile that the origin's third number says."""


def perturb(
    w: jax.Array,
    terms: Terms | None = None,
    probes: Probes | None = None,
    dtype: Any = None,
    *,
    pair: bits.WordMap = bits.normal_pair,
    rounding: Rounding = bits.round_to_nearest,
    shard: Shard | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The weights after an update, and probes of those weights: (w, members [M, *w.shape] or None).

    w <- w - decay w + sum_k coefs[k] z(keys[k]) for each update of ``terms`` in turn, then
    members[m] = w + sum_k matrix[m, k] z(probes.keys[k]). Sums are formed in float32, small terms first, and rounded
    once an update; every product is exact (see `pallas_kernels.bits.cut12`). So it does not matter, to the bit, whether
    an update is applied with the probes, before them, or together with others, nor how an array is cut into shards.
    MeZO, arXiv 2305.17333, algorithm 1; the fusion is that of ZO2, arXiv 2503.12668.

    Args:
        w: float32, bfloat16 or float16, any shape. Its memory is reused where the caller's program lets go of it.
        terms: the updates, or None.
        probes: the probes, or None.
        dtype: of the members, to which they are rounded; that of ``w`` if None.
        pair: the distribution of z: `bits.normal_pair`, `bits.rademacher_pair`, or another map from words to values.
        rounding: of updates of 16-bit weights: `bits.round_to_nearest` or `bits.round_stochastically`, which takes its
            bits from the update's first key.
        shard: if ``w`` is a part of a larger array.
        implementation: "mosaic" (NVIDIA GPUs of compute capability 9.0); "mosaic_portable" (9.0 and above), the same
            without the GPU's functions, slower with the same results; "xla"; "interpret", which runs the portable
            kernel on the CPU; None for the first of these that applies.

    Raises:
        NotImplementedError: for another dtype, or if the implementation named does not apply, with the reason.
        ValueError: for arguments that do not fit one another.

    >>> key = jnp.zeros((1, 2), jnp.uint32)
    >>> w, members = perturb(jnp.ones(3), probes=Probes(key, jnp.array([[1.0], [-1.0]])), pair=bits.rademacher_pair)
    >>> members.tolist()
    [[2.0, 2.0, 0.0], [0.0, 0.0, 2.0]]
    """
    _check(w, terms, probes)
    where, origin = reference.address(w.shape, shard)
    too_large = where.row_count * where.groups >= 1 << 32
    chosen = choose("perturb", implementation, f"{w.shape} has 2**34 elements or more" if too_large else None)
    plan = _Plan(where, shard is None, pair, rounding, chosen, _checked(dtype, w))
    with _scope(probes):
        if chosen == "xla" or w.size == 0 or (terms is None and probes is None):
            return _xla(plan, origin, w, terms, probes)
        if implementation is not None:
            return _mosaic(plan, origin, w, terms, probes)
        either = {"cuda": partial(_mosaic, plan), "default": partial(_xla, plan)}
        return lax.platform_dependent(origin, w, terms, probes, **either)


def _scope(probes: Probes | None) -> Any:
    """Says in profiles what an operation is for: of one that moves an array and makes probes, these."""
    return jax.named_scope("update" if probes is None else "perturb")


def perturb_in_page(
    page: jax.Array,
    offset: int,
    shape: tuple[int, ...],
    terms: Terms | None = None,
    probes: Probes | None = None,
    dtype: Any = None,
    *,
    pair: bits.WordMap = bits.normal_pair,
    rounding: Rounding = bits.round_to_nearest,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`perturb` for an array that lies in a page: (page with the array moved, members [M, *shape] or None).

    Args:
        page: one axis, a multiple of `ALIGNMENT` long. Its memory is reused where the caller's program lets go of it:
            nothing but the array is read or written.
        offset: of the array's first element, a multiple of `ALIGNMENT`. What lies between its end and the next such
            multiple is unspecified afterwards.
        shape: of the array.
        terms: as in `perturb`, like the rest.
        probes: the probes, or None.
        dtype: of the members.
        pair: the distribution of z.
        rounding: of updates of 16-bit weights.
        implementation: None, or one by name.

    Raises:
        ValueError: for an array that does not lie in the page, or is not aligned.
        NotImplementedError: as in `perturb`.

    >>> key = jnp.zeros((1, 2), jnp.uint32)
    >>> probes = Probes(key, jnp.array([[1.0]]))
    >>> page, members = perturb_in_page(jnp.zeros(4096), 2048, (2, 4), probes=probes, pair=bits.rademacher_pair)
    >>> bool((members == perturb(jnp.zeros((2, 4)), probes=probes, pair=bits.rademacher_pair)[1]).all())
    True
    """
    size = math.prod(shape)
    if page.ndim != 1 or page.size % ALIGNMENT or offset % ALIGNMENT or not 0 <= offset <= page.size - size:
        raise ValueError(
            f"an array {list(shape)} at {offset} of a page {list(page.shape)}: expected multiples of {ALIGNMENT}, "
            "and the array within the page"
        )
    where, origin = reference.address(shape, None)
    options: dict[str, Any] = {"dtype": dtype, "pair": pair, "rounding": rounding, "implementation": implementation}
    ragged = where.groups * bits.GROUP != where.columns
    chosen = choose("perturb", implementation, f"{shape} has 2**34 elements or more" if size >= 1 << 34 else None)
    if chosen == "xla" or ragged or not size or (terms is None and probes is None):
        return _sliced(page, offset, shape, terms, probes, options)
    _check(page, terms, probes)

    def sliced(_: jax.Array, page: jax.Array, terms: Terms | None, probes: Probes | None) -> Any:
        return _sliced(page, offset, shape, terms, probes, options)

    plan = _Plan(where, True, pair, rounding, chosen, _checked(dtype, page), in_page=shape)
    launch = apart(partial(_launch, plan), sliced)
    origin = jnp.append(origin, np.uint32(offset // ALIGNMENT))
    with _scope(probes):
        if implementation is not None:
            return launch(origin, page, terms, probes)
        return lax.platform_dependent(origin, page, terms, probes, cuda=launch, default=sliced)


def _sliced(
    page: jax.Array, offset: int, shape: tuple[int, ...], terms: Terms | None, probes: Probes | None, options: Any
) -> tuple[jax.Array, jax.Array | None]:
    """By way of a copy of the array, where no kernel can work in the page."""
    w = lax.slice(page, (offset,), (offset + math.prod(shape),)).reshape(shape)
    moved, members = perturb(w, terms, probes, **options)
    if terms is None:
        return page, members
    with jax.named_scope("update"):
        # By rows of a tile, since the number of an element may not fit in 32 bits.
        moved = jnp.pad(moved.reshape(-1), (0, -moved.size % ALIGNMENT)).reshape(-1, ALIGNMENT)
        rows = lax.dynamic_update_slice(page.reshape(-1, ALIGNMENT), moved, (offset // ALIGNMENT, 0))
    return rows.reshape(-1), members


def _checked(dtype: Any, w: jax.Array) -> jnp.dtype:
    """The dtype of members."""
    if dtype is not None:
        check_dtype("perturb", dtype)
    return w.dtype if dtype is None else jnp.dtype(dtype)


def _check(w: jax.Array, terms: Terms | None, probes: Probes | None) -> None:
    if w.dtype not in FLOATS:
        raise NotImplementedError(f"perturb of {w.dtype}{list(w.shape)}: expected float32, bfloat16 or float16")
    if terms is not None:
        updates, directions = terms.coefs.shape if terms.coefs.ndim == 2 else (0, 0)
        decay = (updates,) if terms.decay is None else terms.decay.shape
        used = () if terms.used is None else terms.used.shape
        fit = terms.keys.shape == (updates, directions, 2) and decay == (updates,) and used == ()
        if not updates or not directions or not fit:
            raise ValueError(
                f"terms have keys{list(terms.keys.shape)}, coefs{list(terms.coefs.shape)}, decay{list(decay)}, "
                f"used{list(used)}: expected [U, K, 2], [U, K], [U], [], none of them empty"
            )
    if probes is not None:
        check_probes("probes have", probes)


# --- the kernel -------------------------------------------------------------------------------------------------------


def _xla(
    plan: _Plan, origin: jax.Array, w: jax.Array, terms: Terms | None, probes: Probes | None
) -> tuple[jax.Array, jax.Array | None]:
    return reference.perturb(plan.where, origin, w, terms, probes, plan.dtype, pair=plan.pair, rounding=plan.rounding)


def _mosaic(
    plan: _Plan, origin: jax.Array, w: jax.Array, terms: Terms | None, probes: Probes | None
) -> tuple[jax.Array, jax.Array | None]:
    return apart(partial(_launch, plan), partial(_xla, plan))(origin, w, terms, probes)


@partial(jax.jit, static_argnums=0)
def _launch(
    plan: _Plan, origin: jax.Array, w: jax.Array, terms: Terms | None, probes: Probes | None
) -> tuple[jax.Array, jax.Array | None]:
    """Brings the array (or its page) into the form [programs, groups, 4] and launches the kernel.

    That form costs nothing, unless rows are no multiple of four columns or the array none of 512 elements: those are
    padded, which takes a copy. In a page there is room for it.
    """
    rows, columns, before = plan.where.row_count, plan.where.columns, plan.where.lead
    width, groups = plan.where.groups * bits.GROUP, rows * plan.where.groups
    shape = w.shape if plan.in_page is None else plan.in_page
    step = _TILES[-1 if plan.in_page is None else 0]
    padded = -(-groups // step) * step
    tile = next(t for t in _TILES if padded % t == 0 and (padded // t >= _PROGRAMS or t == step))
    tiled = (padded // tile, tile, bits.GROUP)

    def pack(x: jax.Array) -> jax.Array:
        if plan.in_page is not None:
            return x.reshape(-1, *tiled[1:])
        if width != columns:
            x = jnp.pad(x.reshape(rows, columns), ((0, 0), (before, width - columns - before)))
        return jnp.pad(x.reshape(-1), (0, (padded - groups) * bits.GROUP)).reshape(tiled)

    def unpack(x: jax.Array) -> jax.Array:
        lead = x.shape[: -len(tiled)]
        x = x.reshape(*lead, -1)[..., : groups * bits.GROUP]
        if width != columns:
            x = x.reshape(*lead, rows, width)[..., before : before + columns]
        return x.reshape(*lead, *shape)

    if terms is not None and terms.used is not None:
        terms = terms._replace(used=terms.used.reshape(1))
    members = None if probes is None else jax.ShapeDtypeStruct((probes.matrix.shape[0], *tiled), plan.dtype)
    kernel = plgpu.kernel(
        partial(_body, plan),
        out_type=() if members is None else (members,),
        grid=tiled[:1],
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=plan.implementation == "mosaic"),
        interpret=plgpu.InterpretGPUParams() if plan.implementation == "interpret" else None,
    )
    if terms is None:
        (out,) = kernel(pack(w), origin, terms, probes)
        return w, unpack(out)
    w_packed = pack(w)
    if plan.in_page is None:
        # If w is a slice of a larger array, XLA would give the kernel its place there: what the kernel changes would be
        # that array, and what the program goes on with nothing that anybody wrote.
        w_packed = lax.optimization_barrier(w_packed)
    in_place = jax.new_ref(w_packed)
    out = kernel(in_place, origin, terms, probes)
    moved = jax.freeze(in_place)
    moved = unpack(moved) if plan.in_page is None else moved.reshape(w.shape)
    return moved, None if members is None else unpack(out[0])


def _body(plan: _Plan, w_ref: Any, origin: Any, terms: Any, probes: Any, *outputs: Any) -> None:
    """One program: ``tile`` groups. Arrays are (tile, 4); a thread holds whole groups, in the layout ``of_weights``."""
    tile, dtype = w_ref.shape[1], w_ref.dtype
    of_weights = plgpu.Layout.TILED(
        plgpu.Tiling(((_THREADS, bits.GROUP), (32, bits.GROUP))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1
    )
    of_groups = of_weights.reduce(1)
    first = np.zeros(2, np.uint32) if plan.whole else origin
    program = lax.axis_index("program")
    slot = program + origin[2].astype(program.dtype) if plan.in_page is not None else program
    index = plgpu.broadcasted_iota(jnp.uint32, (tile,), 0, layout=of_groups) + (program * tile).astype(jnp.uint32)
    local = index // np.uint32(plan.where.groups)
    group = index - local * np.uint32(plan.where.groups) + first[1]
    row = plan.where.rows(local) + first[0]
    lane = plgpu.broadcasted_iota(jnp.int32, (tile, bits.GROUP), 1, layout=of_weights)

    def spread(x: jax.Array) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (tile, bits.GROUP), (0,)), of_weights)

    def words(key0: jax.Array, key1: jax.Array) -> tuple[jax.Array, jax.Array]:
        return bits.threefry2x32(key0, key1, row, group)

    def values(of: bits.WordMap, words: tuple[jax.Array, jax.Array]) -> jax.Array:
        return by_lane([spread(x) for word in words for x in of(word)], lane)

    def zeros() -> jax.Array:
        return plgpu.layout_cast(jnp.zeros((tile, bits.GROUP), jnp.float32), of_weights)

    pair = word_map(plan.pair, plan.implementation)
    wide = plgpu.load(w_ref.at[slot], layout=of_weights, optimized=False).astype(jnp.float32)
    if terms is not None:
        wide = _updated(wide, terms, dtype, plan.rounding, (words, partial(values, pair), values), zeros)
        w_ref[slot] = wide.astype(dtype)
    if probes is not None:
        write_members(wide, probes, outputs[0], (program,), lambda *key: values(pair, words(*key)), zeros)


def _updated(wide: jax.Array, terms: Any, dtype: Any, rounding: Rounding, draws: Any, zeros: Any) -> jax.Array:
    """A program's weights, float32 values of ``dtype``, after each update.

    ``draws`` are words(key), z(words) and values(map, words).
    """
    keys, coefs, decay, used = terms
    updates, directions = coefs.shape
    words, z, values = draws

    def update(u: Any, x: jax.Array) -> jax.Array:
        first = words(keys[u, 0, 0], keys[u, 0, 1])  # they serve the rounding too

        def term(k: Any) -> jax.Array:
            return coefs[u, k] * z(first if directions == 1 else words(keys[u, k, 0], keys[u, k, 1]))

        delta = term(0) if directions == 1 else lax.fori_loop(0, directions, lambda k, d: d + term(k), zeros())
        x = reference.decayed(x, delta, None if decay is None else decay[u], dtype)
        if dtype == jnp.float32:
            return x
        return rounding(x, dtype, lambda: values(bits.rounding_pair, first)).astype(jnp.float32)

    if used is None and updates == 1:
        return update(0, wide)
    return lax.fori_loop(0, updates if used is None else used[0], update, wide)
