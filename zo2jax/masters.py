"""What only folds touch, in the tier of each block: float32 masters of codes, and int16 residuals of bfloat16."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.directions import Direction
from zo2jax.folding import Addend, fold
from zo2jax.formats import decoded
from zo2jax.models.blocks import Params, set_leaf
from zo2jax.pages import Layout, codes_in, flat
from zo2jax.pending import Terms
from zo2jax.stores import Edit, Keep, Store
from zo2jax.updates import Rounding, residual

_NOTHING = Layout((), (), ())


def masters_of(block: str, layout: Layout, direction: Direction, rounding: Rounding) -> Layout:
    """That of the masters and residuals of a block's matrices that are trained.

    >>> from zo2jax.directions import lowrank
    >>> layout = Layout.of({"v": jnp.ones((3, 4), jnp.bfloat16), "w": jnp.ones((3, 4), jnp.bfloat16)})
    >>> [name for name, _ in masters_of("head", layout, lowrank(2, targets=("head.w",)), residual).matrices]
    ['w']
    """
    return layout.masters(rounding == residual, lambda leaf: direction.trains(f"{block}.{leaf}"))


class Masters:
    """Masters and residuals of all blocks of a stream.

    Args:
        layouts: by block.
        direction: with a refresh, or there are no folds, and nothing is kept for them.
        rounding: of folds.

    >>> from zo2jax.directions import lowrank
    >>> layouts = {"head": Layout.of({"w": jnp.ones((3, 4), jnp.bfloat16)})}
    >>> Masters(layouts, lowrank(2), residual).masters["head"].pages
    (('int16', 2048),)
    """

    def __init__(self, layouts: Mapping[str, Layout], direction: Direction, rounding: Rounding):
        """Keeps nothing yet."""
        self._layouts, self._direction, self._rounding = layouts, direction, rounding
        folds = direction.refresh is not None
        self.masters = {n: masters_of(n, x, direction, rounding) if folds else _NOTHING for n, x in layouts.items()}
        """How that lies which only folds touch, by block."""
        self._stores: dict[str, Store] = {}

    def begin(self, name: str, leaves: Mapping[str, Any], kept: Params, keep: Keep) -> None:
        """Goes on with what `saved` gave of a block, if there is any; its leaves become masters, by dotted name."""
        layout, masters = self._layouts[name], self.masters[name]
        if kept:
            self.go_on(name, kept)
        if not masters.matrices:
            return
        found, lows = {}, flat(kept.get("low", {}))
        for leaf, place in masters.matrices:
            if dict(layout.matrices)[leaf].scale is None:
                found[leaf] = lows.get(leaf, np.zeros(place.shape, np.int16))
            elif leaf in leaves:
                found[leaf] = leaves[leaf]
            else:  # of a folder of codes
                found[leaf] = decoded(codes_in(leaves, leaf))
        self._stores[name] = keep(f"{name}.masters", masters, found)

    def go_on(self, name: str, kept: Params) -> None:
        """Goes on with what `saved` gave of a block, but for residuals."""

    def addends(self, name: str, ids: jax.Array) -> Sequence[Addend | Terms | None]:
        """What a fold takes into each matrix of a block; ``ids`` uint32 [matrices] are the leaf ids."""
        raise NotImplementedError

    def fold(self, name: str, store: Store, ids: jax.Array) -> tuple[int, int]:
        """Takes what is beside a block's matrices into them and their masters; (bytes up, bytes down) over the link.

        ``ids`` uint32 [matrices] are the leaf ids. What is beside them stays as it is until a new period begins.
        """
        addends, kept = self.addends(name, ids), self.masters[name]
        if not any(addend is not None for addend in addends):
            return 0, 0
        own = self._stores[name].edit() if name in self._stores else nullcontext(Edit())
        with store.edit() as pages, own as masters:
            fold(self._layouts[name], kept, pages, masters, addends, self._direction, self._rounding)
        return pages.up + masters.up, pages.down + masters.down

    def of_masters(self, name: str) -> dict[str, Any]:
        """Copies of the masters and residuals of a block, by leaf."""
        if name not in self._stores:
            return {}
        return {leaf: x.copy() for leaf, x in flat(self.masters[name].unpack(self._stores[name].read(), {})).items()}

    def saved(self, name: str) -> Params:
        """A copy of a block's residuals, {"low": ..}, or {}."""
        found: Params = {}
        for leaf, low in self.of_masters(name).items():
            if low.dtype == jnp.int16:
                set_leaf(found.setdefault("low", {}), leaf, low)
        return found
