"""What low-rank updates add up to between two folds, and their momentum, beside the matrices of a stream's blocks."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bits
from zo2jax.directions import Direction, matrix_shape
from zo2jax.factored import Basis, Beside, Sum, after, basis_of, projected
from zo2jax.folding import Addend
from zo2jax.leaves import leaf_id
from zo2jax.masters import Masters
from zo2jax.models.blocks import Params, set_leaf
from zo2jax.pages import Layout, Place, flat
from zo2jax.updates import Rounding, Update, in_order


class Accumulated(Masters):
    """The `Sum` of every matrix, on the device; in the tier of each block what only folds touch: masters, residuals.

    Args:
        layouts: by block.
        direction: one with a rank.
        rounding: of folds.
        basis: typed key [], of V.
        momentum: whether updates have it.

    >>> from zo2jax.directions import lowrank
    >>> from zo2jax.updates import nearest
    >>> layouts = {"head": Layout.of({"w": jnp.ones((3, 4))})}
    >>> beside = Accumulated(layouts, lowrank(2), nearest, jax.random.key(0)).beside("head", ())
    >>> beside.own[0].p.shape, beside.tied
    ((3, 2), ())
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        direction: Direction,
        rounding: Rounding,
        basis: jax.Array,
        momentum: bool = False,
    ):
        """Begins with nothing."""
        super().__init__(layouts, direction, rounding)
        self._places = {name: {p: i for i, (_, p) in enumerate(x.matrices)} for name, x in layouts.items()}
        self._nothing_gone = jnp.float32(0)
        self._basis = Basis(basis, self._nothing_gone)
        self._none: dict[tuple[int, ...], Sum] = {}  # of an anchor, by shape
        self.sums = {
            name: tuple(self._start(name, *matrix, momentum) for matrix in x.matrices) for name, x in layouts.items()
        }
        """By block, those of its matrices."""

    def _start(self, name: str, leaf: str, place: Place, momentum: bool) -> Sum | None:
        if not self._direction.trains(f"{name}.{leaf}"):
            return None
        p = jnp.zeros((matrix_shape(place.shape)[0], self._direction.rank))
        if self._direction.adapter is not None:
            p = jnp.concatenate([p, self._v(self._basis, name, leaf, place)])
        return Sum(p, jnp.zeros_like(p) if momentum else None)

    def restart(self, basis: jax.Array) -> None:
        """Begins anew after a fold, with another V, which momentum is taken along to."""
        old = self._basis
        gone, zeros = _nothing((old.gone, {name: [own and own.p for own in sums] for name, sums in self.sums.items()}))
        self._basis = Basis(basis, gone)
        for name, layout in self._layouts.items():
            kept: list[Sum | None] = []
            for (leaf, place), own, p in zip(layout.matrices, self.sums[name], zeros[name], strict=True):
                if own is None:
                    kept.append(None)
                    continue
                n = own.n
                if n is not None:
                    n = projected(n, *(self._v(x, name, leaf, place) for x in (old, self._basis)))
                kept.append(Sum(p, n))
            self.sums[name] = tuple(kept)

    def _v(self, basis: Basis, name: str, leaf: str, place: Place) -> jax.Array:
        return basis_of(basis, jnp.uint32(leaf_id(f"{name}.{leaf}")), place.shape, self._direction)

    def go_on(self, name: str, kept: Params) -> None:
        """Goes on with what `saved` gave of a block."""
        p, v, n = (flat(kept.get(part, {})) for part in "pvn")
        if self._direction.adapter is not None:
            p = {leaf: np.concatenate([p[leaf], v[leaf]]) for leaf in p}
        sums = [Sum(p[leaf], n.get(leaf)) if leaf in p else None for leaf, _ in self._layouts[name].matrices]
        self.sums[name] = tuple(jax.tree.map(jnp.asarray, sums))
        if "gone" in kept:
            self._basis = self._basis._replace(gone=jnp.asarray(kept["gone"]))

    def beside(self, name: str, tied: Sequence[tuple[str, Place]]) -> Beside:
        """What a visit is given beside a block's pages; ``tied`` are the matrices that it shares, with their blocks."""
        shared = tuple(self.sums[home][self._places[home][place]] for home, place in tied)
        return Beside(self.sums[name], shared, self._basis)

    def at_anchor(self, name: str, tied: Sequence[tuple[str, Place]]) -> Beside:
        """The same of the matrices as they were when the period began: nothing, shared by those of one shape."""

        def none(own: Sum | None) -> Sum | None:
            if own is not None and own.p.shape not in self._none:
                self._none[own.p.shape] = jax.tree.map(jnp.zeros_like, own)
            return own and self._none[own.p.shape]

        beside = self.beside(name, tied)
        own, shared = (tuple(map(none, sums)) for sums in beside[:2])
        return Beside(own, shared, Basis(beside.basis.key, self._nothing_gone))

    def update(self, updates: Update, count: Any) -> None:
        """Takes in what the first ``count`` updates let go of all matrices; P changes in visits, as adapters do."""
        if self._direction.adapter is None:
            self._basis = _after_all(self._basis, updates, count)

    def take(self, name: str, changed: tuple[Sum | None, ...]) -> None:
        """Keeps what a visit gave of a block's matrices."""
        self.sums[name] = changed

    def addends(self, name: str, ids: jax.Array) -> list[Addend | None]:
        """What a fold takes into each matrix of a block; None for one that is not trained."""
        shapes = tuple(place.shape for _, place in self._layouts[name].matrices)
        rests = _rest_of(self._basis, ids, shapes, self._direction)
        both = zip(self.sums[name], rests, strict=True)
        return [None if own is None else Addend(own.p, *rest) for own, rest in both]

    def saved(self, name: str) -> Params:
        """A copy of what is beside a block's matrices, or {} if none of them is trained.

        {"p": .., "v": .., "gone": float32 []}; with momentum "n", and with `residual` rounding "low".
        """
        matrices = self._layouts[name].matrices
        if not any(self.sums[name]):
            return {}
        found: Params = {"gone": jnp.array(self._basis.gone)}
        for (leaf, place), own in zip(matrices, self.sums[name], strict=True):
            if own is None:
                continue
            rows = matrix_shape(place.shape)[0]
            trained = self._direction.adapter is not None
            v = own.p[rows:] if trained else self._v(self._basis, name, leaf, place)
            parts = {"p": jnp.array(own.p[:rows]), "v": jnp.array(v)}
            for part, x in (parts if own.n is None else parts | {"n": jnp.array(own.n)}).items():
                set_leaf(found.setdefault(part, {}), leaf, x)
        return found | super().saved(name)


_nothing = jax.jit(partial(jax.tree.map, jnp.zeros_like))  # one program: they are many
_after_all = jax.jit(partial(in_order, after))


@partial(jax.jit, static_argnames=("shapes", "direction"))
@jax.named_scope("update")
def _rest_of(
    basis: Basis, ids: jax.Array, shapes: tuple[tuple[int, ...], ...], direction: Direction
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """(V, gone, key of the rounding) of matrices of these shapes, by one program: there are many of them in a fold."""
    seed = jax.random.key_data(basis.key)
    return [
        (basis_of(basis, ids[i], shape, direction), basis.gone, bits.fold(seed, ids[i]))
        for i, shape in enumerate(shapes)
    ]
