"""What of a stream's blocks stays on the device: leaves that are in no page, and what pages lack that are only read."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from zo2jax.accumulated import Accumulated
from zo2jax.directions import Direction
from zo2jax.listed import Listed
from zo2jax.models.blocks import Params, set_leaf
from zo2jax.pages import Layout, Place, flat
from zo2jax.stores import Keep, Store
from zo2jax.updates import Rounding, Update
from zo2jax.visits import ReadOnly


def sums_of(
    layouts: Mapping[str, Layout],
    direction: Direction,
    rounding: Rounding,
    basis: jax.Array | None,
    directions: int,
    momentum: bool,
) -> Accumulated | Listed | None:
    """What is beside the pages of a stream with these arguments; None if the pages take updates themselves.

    >>> from zo2jax.directions import normal
    >>> from zo2jax.updates import nearest
    >>> sums_of({}, normal, nearest, None, 1, False) is None
    True
    """
    if basis is None:
        return None
    how = layouts, direction, rounding, basis
    return Accumulated(*how, momentum) if direction.rank else Listed(*how, directions)


class Resident:
    """The leaves of all blocks that are in no page, with what is beside pages that are only read.

    Args:
        layouts: by block.
        sums: what is beside the pages, if they are only read, as `sums_of` gives it.
        anchor: whether the same is kept as the period began. Of matrices nothing has to be kept for that.

    >>> resident = Resident({"norm": Layout.of({"scale": jnp.ones(2)})}, None)
    >>> resident.begin({}, "norm", {"scale": jnp.ones(2)}, lambda *matrices: None)
    >>> resident.vectors()["norm"]["scale"].tolist(), resident.saved("norm")
    ([1.0, 1.0], {})
    """

    def __init__(self, layouts: Mapping[str, Layout], sums: Accumulated | Listed | None, *, anchor: bool = False):
        """Knows no leaves yet."""
        self._layouts, self._sums = layouts, sums
        self._now: dict[str, dict[str, Any]] = {}
        self._then: dict[str, dict[str, Any]] | None = {} if anchor else None

    @property
    def read_only(self) -> bool:
        """Whether pages are only read between folds."""
        return self._sums is not None

    @property
    def masters(self) -> Mapping[str, Layout]:
        """How that lies which only folds touch, by block."""
        return {} if self._sums is None else self._sums.masters

    def begin(self, kept: Mapping[str, Params], name: str, leaves: Mapping[str, Any], keep: Keep) -> None:
        """Takes a block's leaves, by dotted name, and goes on with what `saved` gave of it, if that is in ``kept``.

        ``keep`` puts into the block's tier what only folds touch.
        """
        beside = {} if self._sums is None else kept.get(name, {})
        self._now[name] = {leaf: jnp.array(leaves[leaf]) for leaf in self._layouts[name].rest}
        if self._then is not None:
            then = flat(beside.get("anchor", {}))
            self._then[name] = _copied({leaf: then.get(leaf, x) for leaf, x in self._now[name].items()})
        if self._sums is not None:
            self._sums.begin(name, leaves, beside, keep)

    def vectors(self, then: bool = False) -> dict[str, dict[str, Any]]:
        """The leaves that are in no page, by block, for visits to change; ``then`` as the period began."""
        if not then:
            return self._now
        assert self._then is not None, "a stream is told that there is an anchor"
        return self._then

    def beside(self, name: str, tied: Sequence[tuple[str, Place]], then: bool = False) -> ReadOnly | None:
        """What a visit is given beside a block's pages, if those are only read; ``then`` as the period began.

        ``tied`` are the matrices that it shares, with their blocks.
        """
        if self._sums is None:
            return None
        if not then:
            return self._sums.beside(name, tied)
        assert isinstance(self._sums, Accumulated), "anchors are of low-rank directions"
        return self._sums.at_anchor(name, tied)

    def update(self, updates: Update, count: Any) -> None:
        """Takes in what the first ``count`` updates do to all blocks at once."""
        if self._sums is not None:
            self._sums.update(updates, count)

    def take(self, name: str, changed: Any) -> None:
        """Keeps what a visit gave of the matrices of a block whose pages are only read."""
        if self._sums is not None:
            self._sums.take(name, changed)

    def fold(self, name: str, store: Store, ids: jax.Array) -> tuple[int, int]:
        """Takes what is beside a block's pages into them, see `zo2jax.masters.Masters.fold`."""
        assert self._sums is not None, "only pages that are read alone have folds"
        return self._sums.fold(name, store, ids)

    def restart(self, basis: jax.Array) -> None:
        """Begins another period with this key (typed, []), when all blocks have taken the fold."""
        assert self._sums is not None, "only pages that are read alone have folds"
        self._sums.restart(basis)
        if self._then is not None:
            self._then = {name: _copied(leaves) for name, leaves in self._now.items()}

    def copied(self, name: str) -> dict[str, Any]:
        """A copy of a block's leaves that are in no page, by dotted name."""
        return _copied(self._now[name])

    def of_masters(self, name: str) -> dict[str, Any]:
        """Copies of the masters and residuals of a block, by leaf."""
        return {} if self._sums is None else self._sums.of_masters(name)

    def saved(self, name: str) -> Params:
        """A copy of what is beside a block's matrices, as `Accumulated.saved` or `Listed.saved` says, or {}.

        And of its vectors as the period began, if there is an anchor.
        """
        found = {} if self._sums is None else self._sums.saved(name)
        for leaf, x in ({} if self._then is None else self._then[name]).items():
            set_leaf(found.setdefault("anchor", {}), leaf, jnp.array(x))
        return found


def _copied(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {name: jnp.array(leaf) for name, leaf in leaves.items()}
