"""What a run keeps of a model, block by block: in a stream, and in the same form in its checkpoints."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from zo2jax.directions import Direction, check_targets, matrix_shape, trained_leaves
from zo2jax.estimators import Estimator
from zo2jax.formats import coded_shapes
from zo2jax.masters import masters_of
from zo2jax.models.blocks import Params, owned_shapes, set_leaf
from zo2jax.models.model import Model
from zo2jax.optimizers import Optimizer
from zo2jax.pages import Layout, flat, layouts_of
from zo2jax.pending import shapes_pending
from zo2jax.stream import Stream
from zo2jax.updates import Rounding, residual

BESIDE = ".beside"
"""What a checkpoint adds to the name of a block, for what is beside its matrices."""


@dataclass(frozen=True)
class Kept:
    """How a run keeps a model: the form of each block in its stream and in its checkpoints. Made by `Kept.of`.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> from zo2jax import lowrank, sgd, two_point
    >>> from zo2jax.updates import nearest
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> model, estimator = config.init(jax.random.key(0)), two_point(1e-3, direction=lowrank(2))
    >>> Kept.of(model, estimator, sgd(1e-3), nearest).beside("embed")["p"]["weight"].shape
    (8, 2)
    """

    shapes: Mapping[str, Params]
    """Of the leaves, by block, as ``jax.ShapeDtypeStruct``."""
    layouts: Mapping[str, Layout]
    direction: Direction
    directions: int
    """Of a step."""
    rounding: Rounding
    momentum: bool
    anchor: bool = False
    """Whether there is an anchor (`zo2jax.svrg`), whose vectors are beside those of the weights."""

    @classmethod
    def of(cls, model: Model, estimator: Estimator, optimizer: Optimizer, rounding: Rounding) -> "Kept":
        """How a run with these keeps the model.

        Raises:
            ValueError: for what does not go together.
        """
        direction, format = estimator.direction, model.format
        layouts = layouts_of(model.blocks, format)
        of_run = direction, estimator.directions, rounding, optimizer.momentum > 0, estimator.full is not None
        kept = cls(owned_shapes(model.blocks), layouts, *of_run)
        coded = None if kept.fixed else format
        for what, given in (("the format", coded), ("rounding", rounding if rounding == residual else None)):
            if given is not None and not direction.read_only:
                raise ValueError(
                    f"{what} is {given}, with the direction {direction}: expected zo2jax.lowrank, or zo2jax.dense with "
                    "a refresh"
                )
        if coded is not None and coded.compute == "int8" and not direction.rank:
            raise ValueError(f"the format is {format}: products by codes are for zo2jax.lowrank, drop its compute")
        if optimizer.momentum and not direction.rank:
            raise ValueError(
                f"the optimizer is {optimizer.name}: momentum is in factors, expected zo2jax.lowrank with it"
            )
        check_targets(owned_shapes(model.blocks), direction)
        return kept

    @property
    def fixed(self) -> bool:
        """Whether no matrix ever changes, nor what is beside one: of directions for other leaves alone."""
        names = (f"{block}.{name}" for block, layout in self.layouts.items() for name, _ in layout.matrices)
        return not any(map(self.direction.trains, names))

    def moves(self, block: str) -> bool:
        """Whether anything of a block is trained."""
        return any(trained_leaves({block: self.shapes[block]}, self.direction))

    def stored(self, block: str) -> Params:
        """What `zo2jax.stream.Stream.stored` gives of a block, as ``jax.ShapeDtypeStruct``."""
        out = jax.tree.map(lambda x: x, self.shapes[block])
        for name, place in self.layouts[block].matrices:
            if place.scale is None:
                continue
            master = jax.ShapeDtypeStruct(place.shape, jnp.float32)
            both = coded_shapes(place.shape, place.bits, place.group)
            folds = self.direction.refresh is not None and self.direction.trains(f"{block}.{name}")
            set_leaf(out, name, master if folds else both)
        return out

    def beside(self, block: str) -> Params:
        """What `zo2jax.stream.Stream.beside` gives of a block, as ``jax.ShapeDtypeStruct``."""
        vectors: Params = {}
        for name in self.layouts[block].rest if self.anchor else ():
            set_leaf(vectors.setdefault("anchor", {}), name, flat(self.shapes[block])[name])
        return self._beside_matrices(block) | vectors

    def _beside_matrices(self, block: str) -> Params:
        layout, direction = self.layouts[block], self.direction
        if not layout.matrices or not direction.read_only:
            return {}
        found: Params = {"gone": jax.ShapeDtypeStruct((), jnp.float32)}
        if not direction.rank:
            found = shapes_pending((direction.refresh or 1) * self.directions)
        for name, place in layout.matrices if direction.rank else ():
            if not direction.trains(f"{block}.{name}"):
                continue
            rows, columns = matrix_shape(place.shape)
            moving = rows if direction.adapter is None else rows + columns
            for part, n in {"p": rows, "v": columns, **({"n": moving} if self.momentum else {})}.items():
                like = jax.ShapeDtypeStruct((n, direction.rank), jnp.float32)
                set_leaf(found.setdefault(part, {}), name, like)
        if direction.rank and "p" not in found:
            return {}
        folds = direction.refresh is not None
        masters = masters_of(block, layout, direction, self.rounding).matrices if folds else ()
        for name, place in masters:
            if dict(layout.matrices)[name].scale is None:
                set_leaf(found.setdefault("low", {}), name, jax.ShapeDtypeStruct(place.shape, jnp.int16))
        return found

    def entries(self, stream: Stream) -> Iterator[tuple[str, Params]]:
        """What a checkpoint holds of a run's stream, by name, made when it is asked for."""
        for name in stream:
            yield from self.entries_of(stream, name)

    def entries_of(self, stream: Stream, block: str) -> Iterator[tuple[str, Params]]:
        """What a checkpoint holds of one block."""
        yield block, stream.stored(block)
        if self.direction.read_only:
            yield block + BESIDE, stream.beside(block)
