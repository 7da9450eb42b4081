"""Folds: what is beside the matrices of a block goes into them, some rows at a time, wherever they are kept.

Nothing but a few pieces is on the device at a time: not a block, nor its masters.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
from jax import lax

from pallas_kernels.quantized import quantize
from zo2jax.directions import Direction, matrix_shape
from zo2jax.formats import pieces_of
from zo2jax.pages import Layout, Place
from zo2jax.pending import Terms
from zo2jax.stores import Edit
from zo2jax.updates import Rounding, folded, joined, nearest, split


class Addend(NamedTuple):
    """What is beside a matrix: W <- W - gone W + P V^T.

    >>> Addend._fields
    ('p', 'v', 'gone', 'key')
    """

    p: jax.Array
    """float32 [n_out, rank]."""
    v: jax.Array
    """float32 [n_in, rank], of 8 significant bits."""
    gone: jax.Array
    """float32 []."""
    key: jax.Array
    """uint32 [2], of the noise of stochastic rounding."""

    def folded(self, w: jax.Array, start: jax.Array, direction: Direction, rounding: Rounding = nearest) -> jax.Array:
        """Rows of the matrix, from ``start`` on, with what was beside them, rounded once to their dtype.

        >>> import jax.numpy as jnp
        >>> from zo2jax.directions import lowrank
        >>> addend = Addend(jnp.ones((2, 1)), jnp.ones((3, 1)), jnp.float32(0), jnp.zeros(2, jnp.uint32))
        >>> addend.folded(jnp.ones((1, 3)), jnp.int32(1), lowrank(1)).tolist()
        [[2.0, 2.0, 2.0]]
        """
        p = lax.dynamic_slice_in_dim(self.p, start, w.shape[0])
        return folded(w, p, self.v, self.gone, rounding, self.key, start)


class _Piece(NamedTuple):
    """Some rows of a matrix, and where its master lies."""

    place: Place
    master: Place | None
    addend: Addend | Terms
    start: int
    rows: int

    def span(self, place: Place) -> tuple[int, int, int]:
        """(page, first element, elements) of these rows."""
        width = place.size // matrix_shape(place.shape)[0]
        return place.page, place.offset + self.start * width, self.rows * width


def fold(
    layout: Layout,
    kept: Layout,
    pages: Edit,
    masters: Edit,
    addends: Sequence[Addend | Terms | None],
    direction: Direction,
    rounding: Rounding,
) -> None:
    """Takes addends into the matrices of a block.

    Of codes the float32 masters change, and the codes are made anew; of bfloat16 with residuals, both.

    Args:
        layout: of the block.
        kept: of its masters and residuals, `zo2jax.pages.Layout.masters`.
        pages: of the block.
        masters: its masters' pages.
        addends: one for each matrix; None for one that stays as it is.
        direction: of what they are made of.
        rounding: of 16-bit matrices.

    >>> import jax.numpy as jnp
    >>> from zo2jax.directions import lowrank
    >>> layout, zero = Layout.of({"w": jnp.zeros((2, 3))}), jnp.zeros(2, jnp.uint32)
    >>> pages = Edit([jnp.zeros(n) for _, n in layout.pages])
    >>> addend = Addend(jnp.array([[1.0], [2.0]]), jnp.ones((3, 1)), jnp.float32(0), zero)
    >>> fold(layout, layout.masters(False), pages, Edit(), [addend], lowrank(1), nearest)
    >>> pages.read(0, 0, 6).tolist()
    [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    """
    held = dict(kept.matrices)
    pieces = [
        _Piece(place, held.get(name), addend, start, rows)
        for (name, place), addend in zip(layout.matrices, addends, strict=True)
        if addend is not None
        for start, rows in pieces_of(*matrix_shape(place.shape))
    ]

    def begin(piece: _Piece) -> tuple[jax.Array | None, jax.Array | None]:
        w = pages.read(*piece.span(piece.place)) if piece.place.scale is None else None
        return w, None if piece.master is None else masters.read(*piece.span(piece.master))

    coming = begin(pieces[0]) if pieces else (None, None)
    for i, piece in enumerate(pieces):
        # Uploads begin before the computation: memory that is allocated after it waits for it.
        here, coming = coming, begin(pieces[i + 1]) if i + 1 < len(pieces) else (None, None)
        how = {"columns": piece.place.shape[-1], "direction": direction, "rounding": rounding}
        if piece.place.scale is not None:
            how |= {"bits": piece.place.bits, "group": piece.place.group}
        w, scale, master = _folded(*here, piece.addend, piece.start, **how)
        del here
        pages.write(*piece.span(piece.place)[:2], w)
        if piece.place.scale is not None:
            pages.write(*piece.span(piece.place.scale)[:2], scale)
        if piece.master is not None:
            masters.write(*piece.span(piece.master)[:2], master)


@partial(jax.jit, static_argnames=("columns", "direction", "rounding", "bits", "group"))
@jax.named_scope("update")
def _folded(
    w: jax.Array | None, master: jax.Array | None, addend: Addend | Terms, start: jax.Array, *,
    columns: int, direction: Direction, rounding: Rounding, bits: int = 8, group: int = 1,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:  # fmt: skip
    """(matrix or codes, scales, master) of some rows, as flat arrays like ``w`` and ``master``; see `fold`."""
    scale: jax.Array | None = None
    take = partial(addend.folded, start=start, direction=direction)
    if master is None:
        assert w is not None, "codes have a master"
        new = take(w.reshape(-1, columns), rounding=rounding)
    elif w is not None:
        new, master = split(take(joined(w.reshape(-1, columns), master.reshape(-1, columns))))
    else:
        master = lax.optimization_barrier(take(master.reshape(-1, columns)))
        new, scale = quantize(master, bits, group)
    flat = [None if x is None else x.reshape(-1) for x in (new, scale, master)]
    assert flat[0] is not None
    return flat[0], flat[1], flat[2]
