"""The stream: carries go through the blocks of a model, and the blocks through the device.

One loop serves training, evaluation, generation and flush; `zo2jax.conveyor` brings it the pages of each block, and
`zo2jax.resident` has what of the blocks stays on the device. A training visit applies the last step's update to a
block, makes the probes of the new weights from the same read, matrix by matrix, and takes the members of the population
one block further; where they come in parts, or with several batches, the next ones follow in visits of their own, while
the block is there.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax import visits
from zo2jax.conveyor import Conveyor
from zo2jax.directions import Direction
from zo2jax.factored import merge
from zo2jax.formats import Format
from zo2jax.link import StoreError
from zo2jax.models.blocks import Block, Params, Visit, block_of, owned_shapes, set_leaf
from zo2jax.models.layers import Batch, Cache
from zo2jax.pages import Place, ids_of, layouts_of
from zo2jax.plan import Plan
from zo2jax.resident import Resident, sums_of
from zo2jax.stores import Pages, Store
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
        self._shapes = owned_shapes(self.blocks)
        self.layouts = layouts_of(self.blocks, format, apart=basis is not None or fixed)
        self._ids = ids_of(self.blocks, self.layouts)
        plan.check(self._number)
        self._stages = visits.stages_of(self.blocks, tuple(self.layouts.items()), direction)
        self._first = visits.first_that_differs(self._stages)
        self._homes = [_homes_of(*each, self._shapes) for each in zip(self.blocks, self._stages, strict=True)]
        sums = sums_of(self.layouts, direction, rounding, basis, directions, momentum)
        self._resident = Resident(self.layouts, sums, anchor=anchor)
        owners = {home for homes in self._homes for home, _ in homes}
        self._conveyor = Conveyor(self.layouts, plan, owners, self._resident.masters, directory)
        self.tiers = self._conveyor.tiers
        fixed = fixed or (basis is not None and direction.refresh is None)
        begin = partial(self._resident.begin, {} if kept is None else kept)
        self.in_files = self._conveyor.fill(source, begin, coded=format is not None, fixed=fixed)
        """Blocks of the disk tier that stay in the model's own files; the others have page files."""
        self._compiled: set[Any] = set()  # by the shapes of what a training sweep is given
        self._torn = False  # whether some blocks may lack an update that others have

    @property
    def bytes_up(self) -> int:
        """Bytes that went to the device over the link, so far."""
        return self._conveyor.bytes_up

    @property
    def bytes_down(self) -> int:
        """Bytes that came back, so far."""
        return self._conveyor.bytes_down

    def __getitem__(self, name: str) -> Params:
        """A copy of a block's leaves, with every update: JAX arrays of those on the device, else NumPy arrays."""
        leaves = self._held(name), self.beside(name), self._shapes[name], self.layouts[name]
        return merge(name, *leaves, self._how["direction"])

    def stored(self, name: str) -> Params:
        """A copy of a block's leaves as they are in their tier, without what is beside them.

        Of codes: their float32 masters, if there are any, from which they are made again; or `Codes`.
        """
        leaves = self._held(name)
        for leaf, master in self._resident.of_masters(name).items():
            if dict(self.layouts[name].matrices)[leaf].scale is not None:
                set_leaf(leaves, leaf, master)
        return leaves

    def _held(self, name: str) -> Params:
        i = self._number[name]
        self._check_whole()
        leaves = self.layouts[name].unpack(self._conveyor.read(i), self._resident.copied(name))
        return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, leaves)

    def beside(self, name: str) -> Params:
        """A copy of what is beside a block's pages, as `zo2jax.resident.Resident.saved` says, or {}."""
        self._check_whole()
        return self._resident.saved(name)

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
        self._resident.update(update, np.int32(1))
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
            held = self._given(i)
            for j, batch in enumerate(batches):
                carries[j], _ = visits.plain(stage, *held, carries[j], batch, None, **self._how)
            self._conveyor.release(i, carries)
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
        stage, name, read_only, done = self._stages[i], self.blocks[i].name, self._resident.read_only, []
        pages, tied = self._conveyor.take(i), self._tied(i)
        visit, moves = visits.visit_of(stage, read_only), stage.moves_matrices and not read_only
        for j, (update, probes, batch) in enumerate(given):
            rest = self._resident.vectors(then[j])
            (changed, rest[name]), carries[j], over = visit(
                stage, pages, rest[name], tied, self._beside(i, then[j]), self._ids[i], update, probes, carries[j],
                batch, **self._how,
            )  # fmt: skip
            done.append(over)
            if moves:
                pages = changed
            elif stage.moves_matrices and j == 0:
                self._resident.take(name, changed)
            del changed
        if moves:
            self._conveyor.put(i, pages)
        else:
            self._conveyor.release(i, done)

    def _settled(self, i: int, update: Update) -> Any:
        """What a visit is given of a block that has taken an update first."""
        if self._stages[i].moves:
            self._apply(i, update, np.int32(1))
        return self._given(i)

    def _compile(self, update: Update | None, probes: Members, batch: Batch, tail: Tail | None) -> None:
        """Compiles the visits of a sweep before it begins: XLA tries kernels out, and that memory is free then."""
        given = update, probes, batch
        if (shapes := visits.shapes_of(given)) not in self._compiled:
            rest = [self._resident.vectors()[block.name] for block in self.blocks]
            held = [(x, self._tied(i), self._beside(i), self._ids[i]) for i, x in enumerate(rest)]
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
        self._resident.update(updates, np.int32(count))
        for i, stage in enumerate(self._stages):
            if stage.moves:
                self._apply(i, updates, np.int32(count))
        self._torn = False

    def _apply(self, i: int, *given: Any) -> None:
        """Has a block take updates that what all blocks share has taken already."""
        stage, ids, name, rest = self._stages[i], self._ids[i], self.blocks[i].name, self._resident.vectors()
        if self._resident.read_only or not stage.moves_matrices:
            changed, rest[name] = visits.add(stage, rest[name], self._beside(i), ids, *given, **self._how)
            self._resident.take(name, changed)
        else:
            pages, rest[name] = visits.apply(stage, self._conveyor.take(i), rest[name], ids, *given, **self._how)
            self._conveyor.put(i, pages)

    def replace(self, leaves: Mapping[str, Params]) -> None:
        """Puts float32 leaves, by block, in the place of those there, rounded to nearest; of blocks on the device."""
        self._check_whole()
        for name, changed in leaves.items():
            i, rest = self._number[name], self._resident.vectors()
            pages, rest[name] = visits.replace_leaves(self._stages[i], self._conveyor.take(i), rest[name], changed)
            self._conveyor.put(i, pages)

    def fold(self, basis: jax.Array) -> None:
        """Takes what is beside the pages into them, and begins another period with this key (typed, [])."""
        self._check_whole()
        self._conveyor.wait()
        self._conveyor.forget()  # pages that are about to change
        self._torn = True

        def fold(i: int, store: Store) -> tuple[int, int]:
            return self._resident.fold(self.blocks[i].name, store, self._ids[i][0])

        self._conveyor.edit(fold)
        self._resident.restart(basis)
        self._torn = False

    def _given(self, i: int, then: bool = False) -> tuple[Any, ...]:
        """What programs are given of a block that is taken to the device: (pages, other leaves, tied, beside, ids).

        ``then`` as the period began.
        """
        pages, rest = self._conveyor.take(i), self._resident.vectors(then)[self.blocks[i].name]
        return pages, rest, self._tied(i), self._beside(i, then), self._ids[i]

    def _beside(self, i: int, then: bool = False) -> ReadOnly | None:
        """What a visit is given beside the pages, if those are only read; ``then`` as the period began."""
        return self._resident.beside(self.blocks[i].name, self._homes[i], then)

    def _check_whole(self) -> None:
        """Raises StoreError after a sweep that broke off, or a page that was not kept."""
        if self._torn or self._conveyor.lost:
            raise StoreError("an update did not reach all blocks: the run goes on from its last checkpoint and journal")

    def visits(self, blocks: Sequence[Block] | None = None) -> Visit:
        """Visits of the weights as they are, for evaluation and generation."""
        self._check_whole()
        stages = self._stages if blocks is None else visits.stages_of(tuple(blocks), tuple(self.layouts.items()))

        def visit(block: Block, carry: Any, batch: Batch, cache: Cache | None) -> tuple[Any, Cache | None]:
            i = self._number[block.name]
            out = visits.plain(stages[i], *self._given(i), carry, batch, cache, **self._how)
            self._conveyor.release(i, [out])
            return out

        return visit

    def look(self, name: str, see: Callable[[Stage, Any], Sequence[Any]]) -> None:
        """Has ``see`` look at a block while it is on the device; nothing of the block changes.

        It is given the block's stage, and (pages, other leaves, pages that it shares, ids) as programs are given them.
        It returns what it made of them: the block stays until that is there.
        """
        self._check_whole()
        i = self._number[name]
        held = self._conveyor.take(i), self._resident.vectors()[name], self._tied(i), self._ids[i]
        self._conveyor.release(i, see(self._stages[i], held))

    def probe_visits(self, probes: Members, then: bool = False) -> Visit:
        """Visits of the probes, for generation; rows stand member by member, [M b, ...].

        With ``then`` they are those of the weights as the period began.
        """
        self._check_whole()

        def visit(block: Block, carry: Any, batch: Batch, cache: Cache | None) -> tuple[Any, Cache | None]:
            i = self._number[block.name]
            out = visits.extend(self._stages[i], *self._given(i, then), probes, (carry, batch), cache, **self._how)
            self._conveyor.release(i, [out])
            return out

        return visit

    def wait(self) -> None:
        """Returns when every block is in its tier."""
        self._conveyor.wait()

    def arrive(self) -> None:
        """Returns when the blocks that are uploaded ahead are on the device."""
        self._conveyor.arrive()

    def close(self) -> None:
        """Waits, and lets go of host memory and page files. Closing twice does nothing more."""
        self._conveyor.close(wait=not (self._torn or self._conveyor.lost))

    def _tied(self, i: int) -> tuple[Pages, ...]:
        """The pages of the blocks with whose matrices this one shares."""
        return tuple(self._conveyor.here(self._number[home]) for home, _ in self._homes[i])


def _homes_of(block: Block, stage: Stage, blocks: Collection[str]) -> list[tuple[str, Place]]:
    """The matrices that a block shares, with the blocks that own them."""
    owners = zip(block.aliases.values(), stage.tied, strict=True)
    return [(block_of(owner, blocks), place) for owner, (_, place) in owners]


def _joined(parts: Sequence[Any]) -> Any:
    """The members of all parts, one after the other."""
    return parts[0] if len(parts) == 1 else _concatenated(parts)


_concatenated = jax.jit(lambda parts: jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts))
