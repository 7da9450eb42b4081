"""The programs of a stream, compiled once for each kind of block: train, apply, forward without probes, generate."""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from zo2jax.directions import Direction
from zo2jax.models.blocks import Block, Kind, Params, block_of, kinds, set_leaf
from zo2jax.models.layers import Batch, Cache
from zo2jax.pages import Layout, Place
from zo2jax.probes import Matrices, Probe
from zo2jax.updates import Rounding, Update, move


@dataclass(frozen=True, eq=False)
class Stage:
    """What a compiled visit knows of a block: its kind, its layout, and where its tied matrices lie."""

    kind: Kind
    layout: Layout
    tied: tuple[tuple[str, Place], ...]

    def leaves(self, pages: Any, rest: Any, tied: Any) -> Params:
        """The leaves as they are, tied ones filled in."""
        leaves = self.layout.unpack(pages, rest)
        for (name, place), page in zip(self.tied, tied, strict=True):
            set_leaf(leaves, name, page[place.offset : place.offset + place.size].reshape(place.shape))
        return leaves


@lru_cache(maxsize=256)
def _stage(kind: Kind, layout: Layout, tied: tuple[tuple[str, Place], ...]) -> Stage:
    return Stage(kind, layout, tied)


_STATIC = ("stage", "direction", "rounding")


def _members(
    stage: Stage,
    held: tuple[Any, Any, Any],
    ids: tuple[Any, Any, Any],
    update: Update | None,
    probes: tuple[jax.Array, jax.Array],
    run: Any,
    carried: Any,
    how: dict[str, Any],
) -> tuple[Any, tuple[Any, Any]]:
    """``run(block, leaves, carried)`` for every member; what is carried comes and goes as [M, ...]."""
    pages, rest, tied = held
    rest, small = move(rest, ids[1], update, *probes, **how)
    own = Matrices([place for _, place in stage.layout.matrices], pages, ids[0], update, probes, **how)
    lent = [
        Matrices([replace(place, page=0)], [page], ids[2][i : i + 1], None, probes, **how)
        for i, ((_, place), page) in enumerate(zip(stage.tied, tied, strict=True))
    ]
    block = stage.kind.block

    def one(member: jax.Array, small: Any, carried: Any) -> Any:
        leaves: Params = {}
        for name, leaf in small.items():
            set_leaf(leaves, name, leaf)
        weights = [(name, Probe(own, i, member)) for i, (name, _) in enumerate(stage.layout.matrices)]
        weights += [(name, Probe(m, 0, member)) for (name, _), m in zip(stage.tied, lent, strict=True)]
        for name, weight in weights:
            set_leaf(leaves, name, weight if block.takes_weights else weight.array())
        return run(block, leaves, carried), own.settle_all()

    count = len(probes[1])
    out, pages = jax.vmap(one, in_axes=(0, 0, 0), out_axes=(0, None), axis_size=count)(
        jnp.arange(count), small, carried
    )
    return out, (pages, rest)


@partial(jax.jit, static_argnames=_STATIC, donate_argnames=("pages", "rest", "carry"))
def train(
    stage: Stage, pages: Any, rest: Any, tied: Any, ids: Any, update: Update, probes: Any, carry: Any, batch: Batch,
    direction: Direction, rounding: Rounding,
) -> Any:  # fmt: skip
    """One block of a training sweep: ((pages, rest) after the update, the members' carries [M, ...])."""
    how = {"direction": direction, "rounding": rounding}
    run = lambda block, leaves, carry: block.apply(leaves, carry, batch)  # noqa: E731
    carry, held = _members(stage, (pages, rest, tied), ids, update, probes, run, carry, how)
    return held, carry


@partial(jax.jit, static_argnames=_STATIC, donate_argnames=("pages", "rest"))
def apply(
    stage: Stage, pages: Any, rest: Any, ids: Any, update: Update, direction: Direction, rounding: Rounding
) -> Any:
    """A block after an update: (pages, rest)."""
    how: dict[str, Any] = {"direction": direction, "rounding": rounding}
    places = [place for _, place in stage.layout.matrices]
    rest, _ = move(rest, ids[1], update, **how)
    return Matrices(places, pages, ids[0], update, (None, None), **how).settle_all(), rest


@partial(jax.jit, static_argnames=("stage",), donate_argnames="cache")
def plain(stage: Stage, pages: Any, rest: Any, tied: Any, carry: Any, batch: Batch, cache: Cache | None) -> Any:
    """One block without probes: (carry, cache)."""
    return stage.kind.block.extend(stage.leaves(pages, rest, tied), carry, batch, cache)


@partial(jax.jit, static_argnames=_STATIC, donate_argnames="cache")
def extend(
    stage: Stage, pages: Any, rest: Any, tied: Any, ids: Any, probes: Any, rows: Any, cache: Cache | None,
    direction: Direction, rounding: Rounding,
) -> Any:  # fmt: skip
    """One block of a generating sweep: rows come member by member, [M b, ...], and go so."""
    how = {"direction": direction, "rounding": rounding}
    apart = jax.tree.map(lambda x: x.reshape(len(probes[1]), -1, *x.shape[1:]), (*rows, cache))
    run = lambda block, leaves, row: block.extend(leaves, *row)  # noqa: E731
    done, _ = _members(stage, (pages, rest, tied), ids, None, probes, run, apart, how)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)


@lru_cache(maxsize=64)
def stages_of(blocks: tuple[Block, ...], layouts: tuple[tuple[str, Layout], ...]) -> tuple[Stage, ...]:
    """What compiled visits know of each block; ``layouts`` are those of all blocks that own leaves, by name."""
    by_name = dict(layouts)
    stages = []
    for block, kind in zip(blocks, kinds(blocks), strict=True):
        tied = []
        for name, owner in block.aliases.items():
            home = block_of(owner, by_name)
            tied.append((name, dict(by_name[home].matrices)[owner[len(home) + 1 :]]))
        stages.append(_stage(kind, by_name[block.name], tuple(tied)))
    return tuple(stages)
