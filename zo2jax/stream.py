"""The stream: carries go through the blocks of a model, and the blocks through the device.

One loop serves training, evaluation, generation and flush. Before a block is computed, the upload of the next one is
begun (memory that is allocated after a computation was issued waits for it); what a visit changed is written back while
later blocks are computed; and an upload waits until earlier blocks have left the device, so that there are never more
than ``prefetch + 2`` of them there, nor more bytes than `zo2jax.plan.room` says. Nothing else waits within a step. A
training visit applies the last step's update to a block, makes the probes of the new weights from the same read, matrix
by matrix, and takes all members of the population one block further.
"""

import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.directions import Direction, leaf_ids
from zo2jax.models.blocks import Block, Kind, Params, Visit, block_of, kinds, owned_shapes, set_leaf
from zo2jax.models.layers import Batch, Cache
from zo2jax.pages import Layout, Place, flat
from zo2jax.plan import Plan, room
from zo2jax.probes import Matrices, Probe
from zo2jax.stores import Copy, Link, OnDevice, OnDisk, OnHost, Pages, Store, check_host_memory, result
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


@partial(jax.jit, static_argnames=_STATIC, donate_argnames=("pages", "rest"))
def _train(
    stage: Stage, pages: Any, rest: Any, tied: Any, ids: Any, update: Update, probes: Any, carry: Any, batch: Batch,
    direction: Direction, rounding: Rounding,
) -> Any:  # fmt: skip
    """One block of a training sweep: ((pages, rest) after the update, the members' carries [M, ...])."""
    how = {"direction": direction, "rounding": rounding}
    run = lambda block, leaves, carry: block.apply(leaves, carry, batch)  # noqa: E731
    carry, held = _members(stage, (pages, rest, tied), ids, update, probes, run, carry, how)
    return held, carry


@partial(jax.jit, static_argnames=_STATIC, donate_argnames=("pages", "rest"))
def _apply(
    stage: Stage, pages: Any, rest: Any, ids: Any, update: Update, direction: Direction, rounding: Rounding
) -> Any:
    how: dict[str, Any] = {"direction": direction, "rounding": rounding}
    places = [place for _, place in stage.layout.matrices]
    rest, _ = move(rest, ids[1], update, **how)
    return Matrices(places, pages, ids[0], update, (None, None), **how).settle_all(), rest


@partial(jax.jit, static_argnames=("stage",), donate_argnames="cache")
def _plain(stage: Stage, pages: Any, rest: Any, tied: Any, carry: Any, batch: Batch, cache: Cache | None) -> Any:
    """One block without probes: (carry, cache)."""
    return stage.kind.block.extend(stage.leaves(pages, rest, tied), carry, batch, cache)


@partial(jax.jit, static_argnames=_STATIC, donate_argnames="cache")
def _extend(
    stage: Stage, pages: Any, rest: Any, tied: Any, ids: Any, probes: Any, rows: Any, cache: Cache | None,
    direction: Direction, rounding: Rounding,
) -> Any:  # fmt: skip
    """One block of a generating sweep: rows come member by member, [M b, ...], and go so."""
    how = {"direction": direction, "rounding": rounding}
    apart = jax.tree.map(lambda x: x.reshape(len(probes[1]), -1, *x.shape[1:]), (*rows, cache))
    run = lambda block, leaves, row: block.extend(leaves, *row)  # noqa: E731
    done, _ = _members(stage, (pages, rest, tied), ids, None, probes, run, apart, how)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)


class Stream(Mapping[str, Params]):
    """The blocks of a model in their tiers; a mapping from names to leaves, which are copied when asked for.

    Args:
        blocks: the model's.
        source: their leaves, read once, block by block.
        direction: the distribution of z.
        rounding: of the updates of 16-bit leaves.
        plan: where the blocks live.
        directory: for page files, if there are any.

    Raises:
        StoreError: if there is too little host memory, or no room on the disk.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> from zo2jax.directions import normal
    >>> from zo2jax.updates import stochastic
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=2, heads=2, kv_heads=1, head_size=4, context=16)
    >>> model = config.init(jax.random.key(0))
    >>> stream = Stream(model.blocks, model.source, normal, stochastic, Plan({"layers.0.mlp": "host"}))
    >>> bool((stream["embed"]["weight"] == model.params["embed"]["weight"]).all())
    True
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        source: Mapping[str, Params],
        direction: Direction,
        rounding: Rounding,
        plan: Plan,
        directory: Path | None = None,
    ):
        """Reads the source into the stores."""
        self.blocks, self.plan = tuple(blocks), plan
        self._how: dict[str, Any] = {"direction": direction, "rounding": rounding}
        self._number = {block.name: i for i, block in enumerate(self.blocks)}
        shapes = owned_shapes(self.blocks)
        self.leaf_ids = leaf_ids(shapes)
        named = jax.tree.unflatten(jax.tree.structure(shapes), list(self.leaf_ids))
        self._names = {f"{block}.{name}": i for block, leaves in named.items() for name, i in flat(leaves).items()}
        self._layouts = {name: Layout.of(leaves) for name, leaves in shapes.items()}
        owners = {block_of(owner, shapes) for block in self.blocks for owner in block.aliases.values()}
        stay = {name for name, layout in self._layouts.items() if not layout.nbytes} | owners
        self.tiers = {b.name: "device" if b.name in stay else plan.tiers.get(b.name, "device") for b in self.blocks}
        self._sizes = [0 if t == "device" else self._layouts[name].nbytes for name, t in self.tiers.items()]
        self._room = room([size for size in self._sizes if size], plan.prefetch)
        check_host_memory([self._layouts[name].nbytes for name, tier in self.tiers.items() if tier == "host"])
        self._link = Link(pinned=plan.pinned)
        self._workers = ThreadPoolExecutor(4, "zo2jax-stream")  # for files
        self._directory = directory
        self._staging: queue.Queue[np.ndarray] = queue.Queue()
        on_disk = [self._layouts[name].nbytes for name, tier in self.tiers.items() if tier == "disk"]
        for _ in range(4 if on_disk else 0):
            self._staging.put(self._link.memory(max(on_disk)))
        self._stores, self._rest = self._read(source)
        self._stages = _stages(self.blocks, tuple(self._layouts.items()))
        self._ids = [self._leaf_ids(block) for block in self.blocks]
        self.bytes_up = self.bytes_down = 0  # over the link, so far
        self._coming: dict[int, Any] = {}
        self._leaving: dict[int, Copy | Future[None]] = {}
        self._last: dict[int, Any] = {}

    def __getitem__(self, name: str) -> Params:
        """A copy of a block's leaves: JAX arrays of those on the device, else NumPy arrays."""
        i = self._number[name]
        self._left(i)
        pages, layout = self._stores[i].read(), self._layouts[name]
        leaves = layout.unpack(pages, {name: jnp.array(leaf) for name, leaf in self._rest[i].items()})
        return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, leaves)

    def __iter__(self) -> Any:
        """The names of the blocks, in order."""
        return iter(self._number)

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    def train(self, update: Update, probes: tuple[jax.Array, jax.Array], batch: Batch) -> Any:
        """Applies ``update`` and evaluates the probes of the result: what the last block returns, [M, ...].

        ``probes`` are (keys typed [K], matrix float32 [M, K]) as in `zo2jax.updates.move`. If a visit fails, the update
        is applied to the rest of the blocks all the same.
        """
        carry = None
        for i, block in enumerate(self.blocks):
            held, tied = self._take(i), self._tied(block)
            try:
                held, carry = _train(
                    self._stages[i], *held, tied, self._ids[i], update, probes, carry, batch, **self._how
                )
            except BaseException:  # a batch that does not fit the model, or an interrupt: no block may lack the update
                if any(page.is_deleted() for page in held[0]):
                    raise
                self._coming[i] = held[0]
                self.apply(update, first=i)
                raise
            self._put(i, held, carry)
        return carry

    def apply(self, update: Update, first: int = 0) -> None:
        """Applies ``update`` to all blocks, or those from ``first`` on."""
        for i in range(first, len(self.blocks)):
            pages, rest = self._take(i)
            self._put(i, _apply(self._stages[i], pages, rest, self._ids[i], update, **self._how), None)

    def visits(self, blocks: Sequence[Block] | None = None) -> Visit:
        """Visits of the weights as they are, for evaluation and generation."""
        stages = self._stages if blocks is None else _stages(tuple(blocks), tuple(self._layouts.items()))

        def visit(block: Block, carry: Any, batch: Batch, cache: Cache | None) -> tuple[Any, Cache | None]:
            i = self._number[block.name]
            pages, rest = self._take(i)
            out = _plain(stages[i], pages, rest, self._tied(block), carry, batch, cache)
            self._put(i, None, out)
            return out

        return visit

    def probe_visits(self, probes: tuple[jax.Array, jax.Array]) -> Visit:
        """Visits of the probes, for generation; rows stand member by member, [M b, ...]."""

        def visit(block: Block, carry: Any, batch: Batch, cache: Cache | None) -> tuple[Any, Cache | None]:
            i = self._number[block.name]
            pages, rest = self._take(i)
            tied = self._tied(block)
            out = _extend(self._stages[i], pages, rest, tied, self._ids[i], probes, (carry, batch), cache, **self._how)
            self._put(i, None, out)
            return out

        return visit

    def wait(self) -> None:
        """Returns when every block is in its tier."""
        for i in list(self._leaving):
            self._left(i)

    def close(self) -> None:
        """Waits, and lets go of host memory and page files."""
        try:
            self.wait()
        finally:
            self._coming.clear()
            self._let_go(self._stores)

    def _let_go(self, stores: Sequence[Store]) -> None:
        self._workers.shutdown(cancel_futures=True)
        self._link.close()
        for store in stores:
            if isinstance(store, OnDisk):
                store.close()

    def _leaf_ids(self, block: Block) -> Any:
        layout = self._layouts[block.name]
        parts = [name for name, _ in layout.matrices], sorted(layout.rest)
        own = [[self._names[f"{block.name}.{name}"] for name in part] for part in parts]
        ids = (*own, [self._names[owner] for owner in block.aliases.values()])
        return tuple(jnp.array(part, jnp.uint32) for part in ids)  # on the device: an upload would wait for pages

    def _tied(self, block: Block) -> Any:
        pages = []
        for owner in block.aliases.values():
            name = block_of(owner, self._number)
            place = dict(self._layouts[name].matrices)[owner[len(name) + 1 :]]
            held = self._stores[self._number[name]].upload()
            assert not isinstance(held, Future), "blocks that share a leaf stay on the device"
            pages.append(held[place.page])
        return tuple(pages)

    def _read(self, source: Mapping[str, Params]) -> tuple[list[Store], list[dict[str, Any]]]:
        """The blocks in their tiers: the largest first, while there is room for what reading takes."""
        found: dict[int, tuple[Store, dict[str, Any]]] = {}

        def read(i: int) -> None:
            name = self.blocks[i].name
            leaves, layout = source[name], self._layouts[name]
            named = flat(leaves)
            found[i] = self._store(name, layout, leaves), {name: jnp.array(named[name]) for name in layout.rest}

        order = sorted(range(len(self.blocks)), key=lambda i: -self._layouts[self.blocks[i].name].nbytes)
        try:
            if getattr(source, "concurrent", False):
                list(self._workers.map(read, order))
            else:
                for i in order:
                    read(i)
        except BaseException:
            self._let_go([store for store, _ in found.values()])
            raise
        stores, rest = zip(*(found[i] for i in range(len(order))), strict=True)
        return list(stores), list(rest)

    def _store(self, name: str, layout: Layout, leaves: Params) -> Store:
        tier = self.tiers[name]
        if tier == "disk":
            assert self._directory is not None
            self._directory.mkdir(parents=True, exist_ok=True)
            store = OnDisk(self._link, self._workers, self._staging, self._directory / f"{name}.page", layout)
            try:
                store.fill(partial(layout.pack, leaves))
            except BaseException:
                store.close()
                raise
            return store
        if tier == "host":
            held = self._link.memory(layout.nbytes, lambda m: layout.pack(leaves, layout.views(m)))
            return OnHost(self._link, layout.views(held))
        staged = layout.views(np.zeros(layout.nbytes, np.uint8))
        layout.pack(leaves, staged)
        return OnDevice(tuple(jnp.array(page) for page in staged))

    # --- the loop's parts ---

    def _take(self, i: int) -> tuple[Pages, dict[str, Any]]:
        """A block on the device; the uploads of the next ones begin first."""
        if i not in self._coming:
            self._begin(i)
        for j in range(i + 1, i + 1 + self.plan.prefetch):
            self._begin(j % len(self.blocks))
        return result(self._coming.pop(i)), self._rest[i]

    def _begin(self, i: int) -> None:
        """Begins the upload of a block; waits until there is room for it on the device."""
        if i in self._coming:
            return
        self._left(i)
        if self._sizes[i]:
            there = [j for j in self._coming if self._sizes[j]]
            while self._last and (
                len(self._last) + len(there) >= self.plan.prefetch + 2
                or sum(self._sizes[j] for j in (*self._last, *there, i)) > self._room
            ):
                self._left(next(iter(self._last)))
            self.bytes_up += self._sizes[i]
        self._coming[i] = self._stores[i].upload()

    def _put(self, i: int, held: Any, out: Any) -> None:
        """Ends a visit: what changed goes back to its tier."""
        if held is not None:
            pages, self._rest[i] = held
            if (leaving := self._stores[i].commit(pages)) is not None:
                self._leaving[i] = leaving
                self.bytes_down += self._sizes[i]
                if not self.plan.overlap:
                    leaving.result()
        if self._sizes[i]:
            self._last[i] = out if held is None else None  # else the write-back waits for the visit

    def _left(self, i: int) -> None:
        """Waits until a block has left the device."""
        if (leaving := self._leaving.pop(i, None)) is not None:
            leaving.result()
        out = self._last.pop(i, None)
        jax.block_until_ready([x for x in jax.tree.leaves(out) if not x.is_deleted()])


@lru_cache(maxsize=64)
def _stages(blocks: tuple[Block, ...], layouts: tuple[tuple[str, Layout], ...]) -> tuple[Stage, ...]:
    by_name = dict(layouts)
    stages = []
    for block, kind in zip(blocks, kinds(blocks), strict=True):
        tied = []
        for name, owner in block.aliases.items():
            home = block_of(owner, by_name)
            tied.append((name, dict(by_name[home].matrices)[owner[len(home) + 1 :]]))
        stages.append(_stage(kind, by_name[block.name], tuple(tied)))
    return tuple(stages)
