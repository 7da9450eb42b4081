"""The stream: carries go through the blocks of a model, and the blocks through the device.

One loop serves training, evaluation, generation and flush. Before a block is computed, the upload of the next one is
begun (memory that is allocated after a computation was issued waits for it); what a visit changed is written back while
later blocks are computed; and an upload waits until earlier blocks have left the device, so that there are never more
than ``prefetch + 2`` of them there, nor more bytes than `zo2jax.plan.room` says. Nothing else waits within a step. A
training visit applies the last step's update to a block, makes the probes of the new weights from the same read, matrix
by matrix, and takes the members of the population one block further; where they come in parts, or with several batches,
the next ones follow in visits of their own, while the block is there.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax import visits
from zo2jax.accumulated import Accumulated
from zo2jax.directions import Direction
from zo2jax.factored import merge
from zo2jax.formats import Format
from zo2jax.leaves import leaf_ids
from zo2jax.link import Copy, StoreError
from zo2jax.listed import Listed
from zo2jax.marks import mark
from zo2jax.models.blocks import Block, Params, Source, Visit, block_of, owned_shapes, set_leaf
from zo2jax.models.layers import Batch, Cache
from zo2jax.pages import flat, layouts_of
from zo2jax.plan import Plan, following, room
from zo2jax.stores import FOLDS_OF_FILES, Pages, Store, Tiers, result
from zo2jax.tail import Tail
from zo2jax.updates import Rounding, Update
from zo2jax.visits import ReadOnly, Stage

Members = tuple[jax.Array, jax.Array]
"""Keys of directions, typed [K], and rows of a probe matrix, float32 [M, K]."""


class Stream(Mapping[str, Params]):
    """The blocks of a model in their tiers; a mapping from names to leaves, which are copied when asked for.

    Args:
        blocks: the model's.
        source: their leaves, read once, block by block.
        direction: the distribution of z.
        rounding: of the updates of 16-bit leaves.
        plan: where the blocks live.
        directory: for page files, if there are any.
        basis: typed key [], of the first period of a direction with which pages are only read between folds
            (`zo2jax.directions.period_key`); None for another direction, or if there are no updates to come.
        kept: what `beside` gave of each block, of a stream with the same basis; nothing if None.
        format: of the matrices; as they are if None. With a basis, or for matrices that are not trained.
        directions: of a step.
        fixed: whether the matrices never change, as of a stream that is not trained, or of which only other leaves are.
            Then, and where V never changes, blocks of the disk tier are read from the model's own files, where these
            have them as pages need them.
        momentum: whether updates of a low-rank direction have momentum.
        anchor: whether probes may be those of the weights as the period began too, with a low-rank direction.

    Raises:
        StoreError: if there is too little host memory, or no room on the disk; if the model's files have changed.

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
        basis: jax.Array | None = None,
        kept: Mapping[str, Params] | None = None,
        format: Format | None = None,
        directions: int = 1,
        *,
        fixed: bool = False,
        momentum: bool = False,
        anchor: bool = False,
    ):
        """Reads the source into the stores."""
        self.blocks, self.plan = tuple(blocks), plan
        self._how: dict[str, Any] = {"direction": direction.everywhere, "rounding": rounding}
        self._number = {block.name: i for i, block in enumerate(self.blocks)}
        shapes = owned_shapes(self.blocks)
        self.leaf_ids = leaf_ids(shapes)
        named = jax.tree.unflatten(jax.tree.structure(shapes), list(self.leaf_ids))
        self._names = {f"{block}.{name}": i for block, leaves in named.items() for name, i in flat(leaves).items()}
        self.layouts = layouts_of(self.blocks, format, apart=basis is not None or fixed)
        self._shapes = shapes
        owners = {block_of(owner, shapes) for block in self.blocks for owner in block.aliases.values()}
        stay = {name for name, layout in self.layouts.items() if not layout.nbytes} | owners
        plan.check(self._number)
        self.tiers = {b.name: "device" if b.name in stay else plan.tiers.get(b.name, "device") for b in self.blocks}
        self._sizes = [0 if t == "device" else self.layouts[name].nbytes for name, t in self.tiers.items()]
        self._room = room([size for size in self._sizes if size], plan.prefetch)
        self._next = following([size > 0 for size in self._sizes], plan.prefetch)
        self._sums: Accumulated | Listed | None = None
        if basis is not None:
            how = self.layouts, direction, rounding, basis
            self._sums = Accumulated(*how, momentum) if direction.rank else Listed(*how, directions)
        layouts = [*self.layouts.items(), *(() if self._sums is None else self._sums.masters.items())]
        host, disk = ([x.nbytes for name, x in layouts if self.tiers[name] == tier] for tier in ("host", "disk"))
        self._kept = Tiers(host, disk, directory, pinned=plan.pinned)
        self._stores: dict[int, Store] = {}
        self._rest: dict[int, dict[str, Any]] = {}
        self._anchor: dict[int, dict[str, Any]] | None = {} if anchor else None
        """The same as the period began: of matrices nothing has to be kept for that."""
        self.in_files: list[str] = []
        """Blocks of the disk tier that stay in the model's own files; the others have page files."""
        fixed = fixed or (basis is not None and direction.refresh is None)
        try:
            self._read(source, {} if kept is None else kept, coded=format is not None, fixed=fixed)
        except BaseException:
            self._kept.close()
            raise
        self._stages = visits.stages_of(self.blocks, tuple(self.layouts.items()), direction)
        self._first = visits.first_that_differs(self._stages)
        self._ids = [self._leaf_ids(block) for block in self.blocks]
        self._homes = [[self._number[block_of(owner, shapes)] for owner in b.aliases.values()] for b in self.blocks]
        self.bytes_up = self.bytes_down = 0  # over the link, so far
        self._coming: dict[int, Any] = {}
        self._leaving: dict[int, Copy | Future[None]] = {}
        self._last: dict[int, Any] = {}
        self._compiled: set[Any] = set()  # by the shapes of what a training sweep is given
        self._torn = False  # whether some blocks may lack an update that others have

    def __getitem__(self, name: str) -> Params:
        """A copy of a block's leaves, with every update: JAX arrays of those on the device, else NumPy arrays."""
        leaves = self._held(name), self.beside(name), self._shapes[name], self.layouts[name]
        return merge(name, *leaves, self._how["direction"])

    def stored(self, name: str) -> Params:
        """A copy of a block's leaves as they are in their tier, without what is beside them.

        Of codes: their float32 masters, if there are any, from which they are made again; or `Codes`.
        """
        leaves = self._held(name)
        for leaf, master in () if self._sums is None else self._sums.of_masters(name).items():
            if dict(self.layouts[name].matrices)[leaf].scale is not None:
                set_leaf(leaves, leaf, master)
        return leaves

    def _held(self, name: str) -> Params:
        i = self._number[name]
        self._check_whole()
        self._left(i)
        pages, layout = self._stores[i].read(), self.layouts[name]
        leaves = layout.unpack(pages, _copied(self._rest[i]))
        return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, leaves)

    def beside(self, name: str) -> Params:
        """A copy of what is beside a block's matrices, as `Accumulated.saved` or `Listed.saved` says, or {}.

        And of its vectors as the period began, if there is an anchor.
        """
        self._check_whole()
        found = {} if self._sums is None else self._sums.saved(name)
        for leaf, x in ({} if self._anchor is None else self._anchor[self._number[name]]).items():
            set_leaf(found.setdefault("anchor", {}), leaf, jnp.array(x))
        return found

    def __iter__(self) -> Any:
        """The names of the blocks, in order."""
        return iter(self._number)

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    def train(
        self,
        update: Update,
        probes: Sequence[Members],
        batches: Sequence[Batch],
        anchored: Sequence[Members] = (),
        tail: Tail | None = None,
    ) -> list[Any]:
        """Applies ``update`` and evaluates the probes of the result: for each batch what the last block returns.

        Arrays have the members in front, [M, ...]. ``probes`` are parts of the population, (keys typed [K], matrix
        float32 [M, K]) as in `zo2jax.updates.move`: while a block is on the device, they are taken through it one after
        the other, with one batch after the other; but a batch goes once through the blocks that come before all that
        is trained. The update is applied even if the model cannot take a batch. Through the blocks of a ``tail``, which
        live on the device, it goes its own way.

        The parts ``anchored`` are probes of the weights as the period began, in visits of the same programs; they come
        last among the members.
        """
        self._check_whole()
        every = [*probes, *anchored]
        parts = [(part, batch) for batch in batches for part in every]
        assert probes and parts, "the update is in the visits of the first part"
        given = [(None if j else update, *part) for j, part in enumerate(parts)]
        then = [j % len(every) >= len(probes) for j in range(len(parts))]
        try:
            for one in given:
                self._compile(*one, tail)
            before = self._before(batches)
        except BaseException:  # a batch that does not fit the model, say: no block may lack the update
            self.apply(update)
            raise
        self._torn = True
        carries = [visits.for_members(x, len(p[1])) if self._first else None for x in before for p in every]
        del before
        if self._sums is not None:
            self._sums.update(update, np.int32(1))
        end = len(self.blocks) if tail is None else tail.begins(self._number)
        for i in range(self._first, end):
            self._visit(i, given, then, carries)
        if tail is not None:
            held = [self._settled(i, update) for i in range(end, len(self.blocks))]
            for j, (_, part, batch) in enumerate(given):
                carries[j] = tail.visit(self._stages[end:], held, part, carries[j], batch, self._how)
        self._torn = False
        count = len(every)
        return [_joined(carries[j : j + count]) for j in range(0, len(carries), count)]

    def _before(self, batches: Sequence[Batch]) -> list[Any]:
        """Each batch after the blocks that come before all that is trained, which are the same for all members."""
        carries: list[Any] = [None] * len(batches)
        for i, stage in enumerate(self._stages[: self._first]):
            held = *self._take(i), self._tied(i), self._beside(i), self._ids[i]
            for j, batch in enumerate(batches):
                carries[j], _ = visits.plain(stage, *held, carries[j], batch, None, **self._how)
            self._put(i, None, carries)
            del held
        return carries

    def _visit(
        self,
        i: int,
        given: Sequence[tuple[Update | None, Members, Batch]],
        then: Sequence[bool],
        carries: list[Any],
    ) -> None:
        """Takes all members a block further, with the update in the first visit; ``carries`` change.

        ``then`` says of which visits the weights are those of the anchor.
        """
        stage, done = self._stages[i], []
        (pages, _), tied, read_only = self._take(i), self._tied(i), self._sums is not None
        visit, moves = visits.visit_of(stage, read_only), stage.moves_matrices and not read_only
        for j, (update, probes, batch) in enumerate(given):
            rest = self._vectors(then[j])
            (changed, rest[i]), carries[j], over = visit(
                stage, pages, rest[i], tied, self._beside(i, then[j]), self._ids[i], update, probes, carries[j], batch,
                **self._how,
            )  # fmt: skip
            done.append(over)
            if moves:
                pages = changed
            elif stage.moves_matrices and j == 0 and self._sums is not None:
                self._sums.take(self.blocks[i].name, changed)
            del changed
        self._put(i, pages if moves else None, done)

    def _settled(self, i: int, update: Update) -> Any:
        """What a visit is given of a block that has taken an update first."""
        if self._stages[i].moves:
            self._apply(i, update, np.int32(1))
        return *self._take(i), self._tied(i), self._beside(i), self._ids[i]

    def _compile(self, update: Update | None, probes: Members, batch: Batch, tail: Tail | None) -> None:
        """Compiles the visits of a sweep before it begins: XLA tries kernels out, and that memory is free then."""
        given = update, probes, batch
        if (shapes := visits.shapes_of(given)) not in self._compiled:
            held = [(self._rest[i], self._tied(i), self._beside(i), ids) for i, ids in enumerate(self._ids)]
            end = len(held) if tail is None else tail.begins(self._number)
            carry = visits.precompile(self._stages[:end], held[:end], given, self._how)
            if tail is not None:
                tail.compile(self._stages[end:], held[end:], probes, carry, batch, self._how)
            self._compiled.add(shapes)

    def apply(self, update: Update) -> None:
        """Applies ``update`` to all blocks."""
        self.replay(update, 1)

    def replay(self, updates: Update, count: int) -> None:
        """Applies updates, each block taking all of them in one visit.

        Args:
            updates: arrays with another axis in front, each length of which is compiled once; or one as it is.
            count: of those that are applied, from the first on.
        """
        self._check_whole()
        self._torn = True
        if self._sums is not None:
            self._sums.update(updates, np.int32(count))
        for i, stage in enumerate(self._stages):
            if stage.moves:
                self._apply(i, updates, np.int32(count))
        self._torn = False

    def _apply(self, i: int, *given: Any) -> None:
        """Has a block take updates that what all blocks share has taken already."""
        stage, ids, how = self._stages[i], self._ids[i], self._how
        if self._sums is not None or not stage.moves_matrices:
            changed, self._rest[i] = visits.add(stage, self._rest[i], self._beside(i), ids, *given, **how)
            if self._sums is not None:
                self._sums.take(self.blocks[i].name, changed)
        else:
            pages, self._rest[i] = visits.apply(stage, *self._take(i), ids, *given, **how)
            self._put(i, pages, ())

    def replace(self, leaves: Mapping[str, Params]) -> None:
        """Puts float32 leaves, by block, in the place of those there, rounded to nearest; of blocks on the device."""
        self._check_whole()
        for name, changed in leaves.items():
            i = self._number[name]
            pages, self._rest[i] = visits.replace_leaves(self._stages[i], *self._take(i), changed)
            self._put(i, pages, ())

    def fold(self, basis: jax.Array) -> None:
        """Takes what is beside the pages into them, and begins another period with this key (typed, [])."""
        assert self._sums is not None, "only pages that are read alone have folds"
        self._check_whole()
        self.wait()
        self._drop_coming()  # pages that are about to change
        self._torn, sums = True, self._sums

        def fold(i: int) -> tuple[int, int]:
            return sums.fold(self.blocks[i].name, self._stores[i], self._ids[i][0])

        files = [i for i, tier in enumerate(self.tiers.values()) if tier == "disk"]
        with ThreadPoolExecutor(FOLDS_OF_FILES) as pool:
            moved = [*pool.map(fold, files), *map(fold, set(range(len(self.blocks))) - set(files))]
        self.bytes_up, self.bytes_down = map(sum, zip((self.bytes_up, self.bytes_down), *moved, strict=True))
        self._sums.restart(basis)
        if self._anchor is not None:
            self._anchor = {i: _copied(rest) for i, rest in self._rest.items()}
        self._torn = False

    def _beside(self, i: int, then: bool = False) -> ReadOnly | None:
        """What a visit is given beside the pages, if those are only read; ``then`` as the period began."""
        if self._sums is None:
            return None
        homes = [self.blocks[home].name for home in self._homes[i]]
        tied = [(home, place) for home, (_, place) in zip(homes, self._stages[i].tied, strict=True)]
        if not then:
            return self._sums.beside(self.blocks[i].name, tied)
        assert isinstance(self._sums, Accumulated), "anchors are of low-rank directions"
        return self._sums.at_anchor(self.blocks[i].name, tied)

    def _vectors(self, then: bool) -> dict[int, dict[str, Any]]:
        """The leaves that are in no page, by block; ``then`` as the period began."""
        if not then:
            return self._rest
        assert self._anchor is not None, "a stream is told that there is an anchor"
        return self._anchor

    def _check_whole(self) -> None:
        """Raises StoreError after a sweep that broke off, or a page that was not kept."""
        if self._torn:
            raise StoreError("an update did not reach all blocks: the run goes on from its last checkpoint and journal")

    def visits(self, blocks: Sequence[Block] | None = None) -> Visit:
        """Visits of the weights as they are, for evaluation and generation."""
        self._check_whole()
        stages = self._stages if blocks is None else visits.stages_of(tuple(blocks), tuple(self.layouts.items()))

        def visit(block: Block, carry: Any, batch: Batch, cache: Cache | None) -> tuple[Any, Cache | None]:
            i = self._number[block.name]
            held, tied = self._take(i), self._tied(i)
            out = visits.plain(stages[i], *held, tied, self._beside(i), self._ids[i], carry, batch, cache, **self._how)
            self._put(i, None, [out])
            return out

        return visit

    def look(self, name: str, see: Callable[[Stage, Any], Sequence[Any]]) -> None:
        """Has ``see`` look at a block while it is on the device; nothing of the block changes.

        It is given the block's stage, and (pages, other leaves, pages that it shares, ids) as programs are given them.
        It returns what it made of them: the block stays until that is there.
        """
        self._check_whole()
        i = self._number[name]
        self._put(i, None, see(self._stages[i], (*self._take(i), self._tied(i), self._ids[i])))

    def probe_visits(self, probes: Members, then: bool = False) -> Visit:
        """Visits of the probes, for generation; rows stand member by member, [M b, ...].

        With ``then`` they are those of the weights as the period began.
        """
        self._check_whole()

        def visit(block: Block, carry: Any, batch: Batch, cache: Cache | None) -> tuple[Any, Cache | None]:
            i = self._number[block.name]
            (pages, _), tied, beside = self._take(i), self._tied(i), self._beside(i, then)
            held = pages, self._vectors(then)[i]
            out = visits.extend(
                self._stages[i], *held, tied, beside, self._ids[i], probes, (carry, batch), cache, **self._how
            )
            self._put(i, None, [out])
            return out

        return visit

    def wait(self) -> None:
        """Returns when every block is in its tier."""
        for i in list(self._leaving):
            self._left(i)

    def close(self) -> None:
        """Waits, and lets go of host memory and page files. Closing twice does nothing more."""
        try:
            if not self._torn:
                self.wait()
            self._drop_coming()
        finally:
            self._coming.clear()
            self._kept.close()

    def _drop_coming(self) -> None:
        """Forgets what was uploaded ahead, once it is there; or is not, which is an error for who asks for it."""
        for pages in self._coming.values():
            with suppress(StoreError):
                jax.block_until_ready(result(pages))
        self._coming.clear()

    def _leaf_ids(self, block: Block) -> Any:
        layout = self.layouts[block.name]
        parts = [name for name, _ in layout.matrices], sorted(layout.rest)
        own = [[self._names[f"{block.name}.{name}"] for name in part] for part in parts]
        ids = (*own, [self._names[owner] for owner in block.aliases.values()])
        return tuple(jnp.array(part, jnp.uint32) for part in ids)  # on the device: an upload would wait for pages

    def _tied(self, i: int) -> tuple[Pages, ...]:
        """The pages of the blocks with whose matrices this one shares."""
        pages = []
        for home in self._homes[i]:
            held = self._stores[home].upload()
            assert not isinstance(held, Future), "blocks that share a leaf stay on the device"
            pages.append(held)
        return tuple(pages)

    def _read(self, source: Mapping[str, Params], kept: Mapping[str, Params], *, coded: bool, fixed: bool) -> None:
        """Puts the blocks into their tiers: the largest first, while there is room for what reading takes."""
        made = Source.of(source)

        def read(i: int) -> None:
            name = self.blocks[i].name
            layout, keep = self.layouts[name], partial(self._kept.keep, self.tiers[name])
            pieces = layout.pieces(made.extents(name)) if fixed and self.tiers[name] == "disk" else None
            if pieces is None:
                leaves = made.coded(name) if coded else made[name]
                self._stores[i] = keep(name, layout, leaves)
            else:
                self._stores[i] = self._kept.find(layout, pieces)
                leaves = made.others(name)
                self.in_files.append(name)
            named = flat(leaves)
            self._rest[i] = {name: jnp.array(named[name]) for name in layout.rest}
            beside = {} if self._sums is None else kept.get(name, {})
            if self._anchor is not None:
                then = flat(beside.get("anchor", {}))
                self._anchor[i] = _copied({name: then.get(name, x) for name, x in self._rest[i].items()})
            if self._sums is not None:
                self._sums.begin(name, named, beside, keep)

        order = sorted(range(len(self.blocks)), key=lambda i: -self.layouts[self.blocks[i].name].nbytes)
        if made.concurrent:
            list(self._kept.workers.map(read, order))
        else:
            for i in order:
                read(i)

    # --- the loop's parts ---

    def _take(self, i: int) -> tuple[Pages, dict[str, Any]]:
        """A block on the device; the uploads of the next ones begin first."""
        for j in set(self._coming) - {i, *self._next[i]}:  # of a sweep that broke off
            del self._coming[j]
        for j in (i, *self._next[i]):
            self._begin(j)
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

    def _put(self, i: int, pages: Pages | None, outs: Sequence[Any]) -> None:
        """Ends the visits of a block, with their results: pages that changed go back to their tier."""
        if pages is None:
            if self._sizes[i]:  # the smallest result of a visit says when it is over
                self._last[i] = [min(jax.tree.leaves(out), key=lambda x: x.nbytes) for out in outs]
            return
        if (leaving := self._stores[i].commit(pages)) is not None:
            self._leaving[i], self._last[i] = leaving, []
            self.bytes_down += self._sizes[i]
            if not self.plan.overlap:
                self._left(i)

    def _left(self, i: int) -> None:
        """Waits until a block has left the device."""
        if i in self._leaving:
            try:
                with mark("wait"):
                    self._leaving[i].result()
            except BaseException:
                self._torn = True
                raise
            del self._leaving[i]
        with mark("wait"):
            jax.block_until_ready([x for x in self._last.pop(i, []) if not x.is_deleted()])


def _copied(leaves: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.array(leaf) for name, leaf in leaves.items()}


def _joined(parts: Sequence[Any]) -> Any:
    """The members of all parts, one after the other."""
    return parts[0] if len(parts) == 1 else _concatenated(parts)


_concatenated = jax.jit(lambda parts: jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts))
