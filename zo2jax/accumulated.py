"""What low-rank updates add up to between two folds, beside the matrices of all blocks of a stream."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import bits
from zo2jax.directions import Direction, matrix_shape
from zo2jax.factored import Basis, Beside, after, basis_of
from zo2jax.folding import Addend
from zo2jax.masters import Masters
from zo2jax.models.blocks import Params, set_leaf
from zo2jax.pages import Layout, Place, flat
from zo2jax.updates import Rounding, Update


class Accumulated(Masters):
    """P of every matrix, on the device; and in the tier of each block what only folds touch: masters and residuals.

    Args:
        layouts: by block.
        direction: one with a rank.
        rounding: of folds.
        basis: typed key [], of V.

    >>> from zo2jax.directions import lowrank
    >>> from zo2jax.updates import nearest
    >>> layouts = {"head": Layout.of({"w": jnp.ones((3, 4))})}
    >>> beside = Accumulated(layouts, lowrank(2), nearest, jax.random.key(0)).beside("head", ())
    >>> beside.own[0].shape, beside.tied
    ((3, 2), ())
    """

    def __init__(self, layouts: Mapping[str, Layout], direction: Direction, rounding: Rounding, basis: jax.Array):
        """Begins with nothing."""
        super().__init__(layouts, direction, rounding)
        self._places = {name: {p: i for i, (_, p) in enumerate(x.matrices)} for name, x in layouts.items()}
        self.restart(basis)

    def restart(self, basis: jax.Array) -> None:
        """Begins anew, with another V."""
        self._basis = Basis(basis, jnp.float32(0))
        self.sums = {name: tuple(self._zeros(p) for _, p in x.matrices) for name, x in self._layouts.items()}
        """By block, P of its matrices."""

    def _zeros(self, place: Place) -> jax.Array:
        return jnp.zeros((matrix_shape(place.shape)[0], self._direction.rank))

    def go_on(self, name: str, kept: Params) -> None:
        """Goes on with what `saved` gave of a block."""
        self.sums[name] = tuple(jnp.asarray(flat(kept["p"])[leaf]) for leaf, _ in self._layouts[name].matrices)
        self._basis = self._basis._replace(gone=jnp.asarray(kept["gone"]))

    def beside(self, name: str, tied: Sequence[tuple[str, Place]]) -> Beside:
        """What a visit is given beside a block's pages; ``tied`` are the matrices that it shares, with their blocks."""
        shared = tuple(self.sums[home][self._places[home][place]] for home, place in tied)
        return Beside(self.sums[name], shared, self._basis)

    def update(self, update: Update) -> None:
        """Takes in what an update lets go of all matrices; P itself changes in visits."""
        self._basis = after(self._basis, update)

    def take(self, name: str, changed: tuple[jax.Array, ...]) -> None:
        """Keeps the P of a block's matrices that a visit gave."""
        self.sums[name] = changed

    def addends(self, name: str, ids: jax.Array) -> list[Addend]:
        """What a fold takes into each matrix of a block."""
        shapes = tuple(place.shape for _, place in self._layouts[name].matrices)
        return [
            Addend(p, *rest)
            for p, rest in zip(self.sums[name], _rest_of(self._basis, ids, shapes, self._direction), strict=True)
        ]

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
        return found | super().saved(name, ids)


@partial(jax.jit, static_argnames=("shapes", "direction"))
def _rest_of(
    basis: Basis, ids: jax.Array, shapes: tuple[tuple[int, ...], ...], direction: Direction
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """(V, gone, key of the rounding) of matrices of these shapes, by one program: there are many of them in a fold."""
    seed = jax.random.key_data(basis.key)
    return [
        (basis_of(basis, ids[i], shape, direction), basis.gone, bits.fold(seed, ids[i]))
        for i, shape in enumerate(shapes)
    ]
