"""What low-rank updates add up to between two folds, beside the matrices of all blocks of a stream."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bits
from pallas_kernels.quantized import decode
from zo2jax.directions import Direction, matrix_shape
from zo2jax.factored import Basis, Beside, after, basis_of
from zo2jax.folding import Addend, fold
from zo2jax.models.blocks import Params, set_leaf
from zo2jax.pages import Layout, Place, codes_in, flat
from zo2jax.stores import Edit, Store
from zo2jax.updates import Rounding, Update, residual


class Accumulated:
    """P of every matrix, on the device; and in the tier of each block what only folds touch: masters and residuals.

    Args:
        layouts: by block.
        direction: one with a rank.
        rounding: of folds.
        basis: typed key [], of V.

    >>> from zo2jax.directions import lowrank
    >>> from zo2jax.updates import nearest
    >>> layouts = {"head": Layout.of({"w": np.ones((3, 4), np.float32)})}
    >>> beside = Accumulated(layouts, lowrank(2), nearest, jax.random.key(0)).beside("head", ())
    >>> beside.own[0].shape, beside.tied
    ((3, 2), ())
    """

    def __init__(self, layouts: Mapping[str, Layout], direction: Direction, rounding: Rounding, basis: jax.Array):
        """Begins with nothing."""
        self._layouts, self._direction, self._rounding = layouts, direction, rounding
        folds = direction.refresh is not None
        self.masters = {n: x.masters(rounding == residual) if folds else Layout((), (), ()) for n, x in layouts.items()}
        """How that lies which only folds touch, by block."""
        self._stores: dict[str, Store] = {}
        self._places = {name: {p: i for i, (_, p) in enumerate(x.matrices)} for name, x in layouts.items()}
        self.restart(basis)

    def restart(self, basis: jax.Array) -> None:
        """Begins anew, with another V."""
        self._basis = Basis(basis, jnp.float32(0))
        self.sums = {name: tuple(self._zeros(p) for _, p in x.matrices) for name, x in self._layouts.items()}
        """By block, P of its matrices."""

    def _zeros(self, place: Place) -> jax.Array:
        return jnp.zeros((matrix_shape(place.shape)[0], self._direction.rank))

    def begin(
        self, name: str, leaves: Mapping[str, Any], kept: Params, keep: Callable[[str, Layout, Params], Store]
    ) -> None:
        """Goes on with what `saved` gave of a block, if there is any; its leaves become masters, by dotted name."""
        layout, masters = self._layouts[name], self.masters[name]
        if kept:
            self.sums[name] = tuple(jnp.asarray(flat(kept["p"])[leaf]) for leaf, _ in layout.matrices)
            self._basis = self._basis._replace(gone=jnp.asarray(kept["gone"]))
        if not masters.matrices:
            return
        found, lows = {}, flat(kept.get("low", {}))
        for leaf, place in masters.matrices:
            if dict(layout.matrices)[leaf].scale is None:
                found[leaf] = lows.get(leaf, np.zeros(place.shape, np.int16))
            elif leaf in leaves:
                found[leaf] = leaves[leaf]
            else:  # of a folder of codes
                found[leaf] = decode(jax.tree.map(jnp.asarray, codes_in(leaves, leaf)), jnp.float32)
        self._stores[name] = keep(f"{name}.masters", masters, found)

    def beside(self, name: str, tied: Sequence[tuple[str, Place]]) -> Beside:
        """What a visit is given beside a block's pages; ``tied`` are the matrices that it shares, with their blocks."""
        shared = tuple(self.sums[home][self._places[home][place]] for home, place in tied)
        return Beside(self.sums[name], shared, self._basis)

    def update(self, update: Update) -> None:
        """Takes in what an update lets go of all matrices; P itself changes in visits."""
        self._basis = after(self._basis, update)

    def fold(self, name: str, store: Store, ids: jax.Array) -> tuple[int, int]:
        """Takes what is beside a block's matrices into them and their masters; (bytes up, bytes down) over the link.

        ``ids`` uint32 [matrices] are the leaf ids. P stays as it is until `restart`.
        """
        layout, basis = self._layouts[name], self._basis
        addends = []
        for (_, place), p, ident in zip(layout.matrices, self.sums[name], ids, strict=True):
            v = basis_of(basis, ident, place.shape, self._direction)
            addends.append(Addend(p, v, basis.gone, bits.fold(jax.random.key_data(basis.key), ident)))
        kept = self._stores[name].edit() if name in self._stores else nullcontext(Edit())
        with store.edit() as pages, kept as masters:
            fold(layout, self.masters[name], pages, masters, addends, self._rounding)
        return pages.up + masters.up, pages.down + masters.down

    def of_masters(self, name: str) -> dict[str, Any]:
        """Copies of the masters and residuals of a block, by leaf."""
        if name not in self._stores:
            return {}
        return {leaf: x.copy() for leaf, x in flat(self.masters[name].unpack(self._stores[name].read(), {})).items()}

    def saved(self, name: str, ids: jax.Array) -> Params:
        """A copy of what is beside a block's matrices: {"p": .., "v": .., "gone": float32 []}, and "low"; or {}.

        ``ids`` uint32 [matrices] are the leaf ids.
        """
        matrices = self._layouts[name].matrices
        if not matrices:
            return {}
        found: Params = {"p": {}, "v": {}, "gone": jnp.array(self._basis.gone)}
        for (leaf, place), p, ident in zip(matrices, self.sums[name], ids, strict=True):
            set_leaf(found["p"], leaf, jnp.array(p))
            set_leaf(found["v"], leaf, basis_of(self._basis, ident, place.shape, self._direction))
        for leaf, low in self.of_masters(name).items():
            if low.dtype == jnp.int16:
                set_leaf(found.setdefault("low", {}), leaf, low)
        return found
