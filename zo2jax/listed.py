"""The dense updates of a period, beside the matrices of all blocks of a stream."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from zo2jax.directions import Direction
from zo2jax.masters import Masters
from zo2jax.models.blocks import Params
from zo2jax.pages import Layout, Place
from zo2jax.pending import SAVED, Pending, Terms, after
from zo2jax.updates import Rounding, Update, in_order


class Listed(Masters):
    """What all blocks of a stream lack: one list of terms; and what only folds touch, in the tier of each block.

    Args:
        layouts: by block.
        direction: a dense one with a refresh.
        rounding: of folds.
        key: typed key [], of the period.
        directions: of a step.

    >>> from zo2jax.directions import dense
    >>> from zo2jax.updates import nearest
    >>> layouts = {"head": Layout.of({"w": jnp.ones((3, 4))})}
    >>> Listed(layouts, dense("normal", refresh=4), nearest, jax.random.key(0), 2).beside("head", ()).coefs.shape
    (8,)
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        direction: Direction,
        rounding: Rounding,
        key: jax.Array,
        directions: int,
    ):
        """Begins with nothing."""
        super().__init__(layouts, direction, rounding)
        assert direction.refresh is not None, "without folds the list would grow for ever"
        self._length = direction.refresh * directions
        self.restart(key)

    def restart(self, key: jax.Array) -> None:
        """Begins anew after a fold."""
        self._pending = Pending.none(self._length, key)

    def go_on(self, name: str, kept: Params) -> None:
        """Goes on with what `saved` gave of a block."""
        found = {part: jnp.asarray(kept[part]) for part in SAVED}
        self._pending = self._pending._replace(**found)

    def beside(self, name: str, tied: Sequence[tuple[str, Place]]) -> Pending:
        """What a visit is given beside a block's pages."""
        return self._pending

    def update(self, updates: Update, count: Any) -> None:
        """Takes in the first ``count`` updates."""
        self._pending = _after_all(self._pending, updates, count)

    def take(self, name: str, changed: tuple[()]) -> None:
        """Nothing: visits change nothing of it."""

    def addends(self, name: str, ids: jax.Array) -> list[Terms]:
        """What a fold takes into each matrix of a block."""
        return self._pending.terms(ids)

    def saved(self, name: str) -> Params:
        """A copy of what is beside a block's matrices: {"keys", "coefs", "used", "gone"}, and "low"; or {}."""
        if not self._layouts[name].matrices:
            return {}
        return {part: jnp.array(getattr(self._pending, part)) for part in SAVED} | super().saved(name)


_after_all = jax.jit(partial(in_order, after))
