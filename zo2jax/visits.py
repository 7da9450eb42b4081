"""The programs of a stream, compiled once for each kind of block: train, apply, forward without probes, generate.

One is of several blocks: it goes through the last ones and back (`backpropagate`).
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from zo2jax.directions import Direction, matrix_shape
from zo2jax.factored import Basis, Beside, Factors, Sum
from zo2jax.leaves import is_trained
from zo2jax.models.blocks import Block, Kind, Params, block_of, kinds, set_leaf
from zo2jax.models.layers import Batch, Cache
from zo2jax.pages import Layout, Place, flat
from zo2jax.pending import Pending
from zo2jax.probes import Matrices
from zo2jax.updates import Rounding, Update, move, repeated

ReadOnly = Beside | Pending
"""What a visit is given beside pages that are only read, of low-rank or of dense directions."""


@dataclass(frozen=True, eq=False)
class Stage:
    """What a compiled visit knows of a block: its kind, its layout, and where its tied matrices lie."""

    kind: Kind
    layout: Layout
    tied: tuple[tuple[str, Place], ...]
    frozen: frozenset[str] = frozenset()
    """Leaves that are not trained, by the names that the block has for them; shared ones among them."""

    @property
    def moves(self) -> bool:
        """Whether the block's own leaves change."""
        return self.moves_matrices or not self.frozen.issuperset(self.layout.rest)

    @property
    def moves_matrices(self) -> bool:
        """Whether any of the block's own matrices changes: its pages, or what is beside them."""
        return not self.frozen.issuperset(name for name, _ in self.layout.matrices)

    @property
    def differs(self) -> bool:
        """Whether the block is another one for each member."""
        return self.moves or not self.frozen.issuperset(name for name, _ in self.tied)

    def only(self, names: Collection[str]) -> "Stage":
        """The same, of whose leaves that are trained only these are, by the names that the block has for them."""
        every = [name for name, _ in (*self.layout.matrices, *self.tied)]
        frozen = self.frozen | frozenset({*every, *self.layout.rest} - set(names))
        return _stage(self.kind, self.layout, self.tied, frozen)

    def numbers(self, matrices: Sequence[tuple[str, Place]]) -> tuple[int, ...]:
        """Which of some matrices are not trained."""
        return tuple(i for i, (name, _) in enumerate(matrices) if name in self.frozen)

    def trained(self, rest: Params) -> list[bool]:
        """Which of the block's other leaves are trained, in the order of their names."""
        return [is_trained(leaf) and name not in self.frozen for name, leaf in sorted(rest.items())]

    def leaves(self, pages: Any, rest: Any, tied: Any) -> Params:
        """The leaves as they are, tied ones filled in; codes as a `Quantized`, or decoded where no weight is taken."""
        leaves = Layout((), (), self.layout.rest).unpack((), rest)
        seen = [(name, place, pages) for name, place in self.layout.matrices]
        seen += [(name, place, lent) for (name, place), lent in zip(self.tied, tied, strict=True)]
        for name, place, there in seen:
            set_leaf(leaves, name, _as_leaf(self.kind.block, place.weight(there)))
        return leaves


@lru_cache(maxsize=256)
def _stage(kind: Kind, layout: Layout, tied: tuple[tuple[str, Place], ...], frozen: frozenset[str]) -> Stage:
    return Stage(kind, layout, tied, frozen)


_STATIC = ("stage", "direction", "rounding")


def _matrices(
    stage: Stage,
    held: tuple[Any, Any, Any, ReadOnly | None],
    ids: tuple[Any, Any, Any],
    update: Update | None,
    probes: Any,
    how: dict[str, Any],
) -> tuple[Matrices | Factors, list[tuple[str, Matrices | Factors, int]]]:
    """A block's own matrices, and all that it sees: (name, where it is, its index there)."""
    pages, _, tied, beside = held
    places = [place for _, place in stage.layout.matrices]
    lent: list[Matrices | Factors]
    own: Matrices | Factors
    if beside is None:
        own = Matrices(places, pages, ids[0], update, probes, **how, frozen=stage.numbers(stage.layout.matrices))
        lent = [
            Matrices([place], lent_pages, ids[2][i : i + 1], None, probes, **how, frozen=stage.numbers([(name, place)]))
            for i, ((name, place), lent_pages) in enumerate(zip(stage.tied, tied, strict=True))
        ]
    else:
        direction = how["direction"]
        own = beside.matrices(places, pages, ids[0], update, probes, direction)
        lent = [
            beside.matrices([place], lent_pages, ids[2][i : i + 1], None, probes, direction, tied=i)
            for i, ((_, place), lent_pages) in enumerate(zip(stage.tied, tied, strict=True))
        ]
    seen = [(name, own, i) for i, (name, _) in enumerate(stage.layout.matrices)]
    return own, seen + [(name, m, 0) for (name, _), m in zip(stage.tied, lent, strict=True)]


def _members(
    stage: Stage,
    held: tuple[Any, Any, Any, ReadOnly | None],
    ids: tuple[Any, Any, Any],
    update: Update | None,
    probes: tuple[jax.Array, jax.Array],
    run: Any,
    carried: Any,
    how: dict[str, Any],
) -> tuple[Any, tuple[Any, Any]]:
    """``run(block, leaves, carried)`` for every member; what is carried comes and goes as [M, ...].

    With it come the pages, or the `Sum` of each matrix if those are only read, and the other leaves, after the update;
    () for the matrices if none of them moves.
    """
    rest, small = move(held[1], ids[1], update, *probes, trained=stage.trained(held[1]), **how)
    own, matrices = _matrices(stage, held, ids, update, probes, how)
    block = stage.kind.block

    def one(member: jax.Array, small: Any, carried: Any) -> Any:
        leaves: Params = {}
        for name, leaf in small.items():
            set_leaf(leaves, name, leaf)
        for name, of, i in matrices:
            set_leaf(leaves, name, _as_leaf(block, of.weight(i, member)))
        return run(block, leaves, carried), own.settle_all() if stage.moves_matrices else ()

    count = len(probes[1])
    out, changed = jax.vmap(one, in_axes=(0, 0, 0), out_axes=(0, None), axis_size=count)(
        jnp.arange(count), small, carried
    )
    return out, (changed, rest)


def _as_leaf(block: Block, weight: Any) -> Any:
    return weight if block.takes_weights or isinstance(weight, jax.Array) else weight.array()


def _train(
    stage: Stage, pages: Any, rest: Any, tied: Any, beside: ReadOnly | None, ids: Any, update: Update | None,
    probes: Any, carry: Any, batch: Batch, direction: Direction, rounding: Rounding,
) -> Any:  # fmt: skip
    """One block of a training sweep: ((pages or what is kept of them, rest) after the update, carries [M, ...], done).

    The update is None in the visits that follow the first of a block.

    ``done`` is a number that is there when the visit is over, and that no later visit is given.
    """
    how = {"direction": direction, "rounding": rounding}
    run = lambda block, leaves, carry: block.apply(leaves, carry, batch)  # noqa: E731
    carry, held = _members(stage, (pages, rest, tied, beside), ids, update, probes, run, carry, how)
    return held, carry, jnp.int32(0)


train = jax.jit(_train, static_argnames=_STATIC, donate_argnames=("pages", "rest", "carry"))
"""Of blocks whose pages take the update."""
read = jax.jit(_train, static_argnames=_STATIC, donate_argnames=("rest", "carry"))
"""Of blocks whose pages are only read."""


def visit_of(stage: Stage, read_only: bool) -> Any:
    """The program of a training visit, in a stream whose pages are only read or not.

    >>> visit_of(Stage(None, Layout((), (), ()), ()), False) is read
    True
    """
    return train if stage.moves_matrices and not read_only else read


def first_that_differs(stages: Sequence[Stage]) -> int:
    """How many blocks come before the first one that is another for each member.

    >>> first_that_differs([])
    0
    """
    return next((i for i, stage in enumerate(stages) if stage.differs), len(stages))


@partial(jax.jit, static_argnames="count")
def for_members(carry: Any, count: int) -> Any:
    """A carry that is the same for all members so far, for each of them: [M, ...].

    >>> for_members(jnp.ones(3), 2).shape
    (2, 3)
    """
    return jax.tree.map(lambda x: repeated(x, count), carry)


def precompile(stages: Sequence[Stage], held: Sequence[Any], given: Any, how: dict[str, Any]) -> Any:
    """Compiles a training sweep's visits, each kind once, without visiting; gives the shapes of what they end with.

    Args:
        stages: of the blocks.
        held: (rest, tied, beside, ids) of each block.
        given: (update, probes, batch).
        how: direction and rounding.
    """
    known: dict[Any, Any] = {}
    carry, (update, probes, batch), first = None, given, first_that_differs(stages)
    for i, (stage, (rest, tied, beside, ids)) in enumerate(zip(stages, held, strict=True)):
        if i == first > 0:
            carry = jax.eval_shape(lambda x: for_members(x, len(probes[1])), carry)
        if (came := (i < first, stage, shapes_of((carry, beside)))) not in known:
            pages = tuple(jax.ShapeDtypeStruct((n,), dtype) for dtype, n in stage.layout.pages)
            rest = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rest)
            with warnings.catch_warnings():  # that a head's result cannot lie where its carry was
                warnings.filterwarnings("ignore", "Some donated buffers were not usable")
                if i < first:
                    lowered = plain.lower(stage, pages, rest, tied, beside, ids, carry, batch, None, **how)
                else:
                    given = stage, pages, rest, tied, beside, ids, update, probes, carry, batch
                    lowered = visit_of(stage, beside is not None).lower(*given, **how)
                lowered.compile()
            out = lowered.out_info[0 if i < first else 1]
            known[came] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out)
        carry = known[came]
    return carry


@partial(jax.jit, static_argnames=("stages", "direction", "rounding"), donate_argnames="gradient")
def backpropagate(
    stages: tuple[Stage, ...], held: Sequence[Any], leaves: Sequence[Params], probes: Any, carry: Any, batch: Batch,
    gradient: Sequence[Params], direction: Direction, rounding: Rounding,
) -> tuple[Any, Sequence[Params]]:  # fmt: skip
    """The last blocks of a training sweep: ((loss sums, counts), float32 [M] both, the gradient).

    The gradient is that of the sum of all members' losses, added to what is given. Members go one after the other, and
    of a block only what goes into it is kept until the way back, where it is computed again (Chen et al., arXiv
    1604.06174); but for the last one. So there are never more activations than those of one member in one block.

    Args:
        stages: of the blocks.
        held: of each block (pages, rest, tied, beside, ids), with every update.
        leaves: of each block the float32 leaves that the gradient is of; they stand for those in its pages.
        probes: keys [K] and matrix [M, K], which all other leaves are perturbed by, as their stages say.
        carry: [M, ...].
        batch: as the head is given it.
        gradient: like ``leaves``.
        direction: of the probes.
        rounding: of updates, of which there are none.

    Raises:
        ValueError: for a batch without targets.
    """
    how: dict[str, Any] = {"direction": direction, "rounding": rounding}
    (keys, matrix), last = probes, len(stages) - 1

    def through(i: int, row: jax.Array, own: Params, carry: Any) -> Any:
        stage, (*parts, ids) = stages[i], held[i]

        def run(block: Block, found: Params, carry: Any) -> Any:
            shapes = flat(block.shapes)
            for name, leaf in flat(own).items():
                set_leaf(found, name, leaf.astype(shapes[name].dtype))
            return block.apply(found, carry, batch)

        return _members(stage, (parts[0], parts[1], parts[2], parts[3]), ids, None, (keys, row), run, carry, how)[0]

    def loss(leaves: Sequence[Params], row: jax.Array, carry: Any) -> tuple[jax.Array, jax.Array]:
        for i, own in enumerate(leaves):
            visit = partial(through, i, row)
            carry = (visit if i == last else jax.checkpoint(visit))(own, carry)
        if not isinstance(carry, tuple):
            raise ValueError(f"a batch of {sorted(batch)} has no loss: expected 'ids' and 'targets'")
        return carry[0][0], carry[1][0]

    def member(gradient: Any, given: Any) -> tuple[Any, Any]:
        sums, found = jax.value_and_grad(loss, has_aux=True)(leaves, *jax.tree.map(lambda x: x[None], given))
        return jax.tree.map(jnp.add, gradient, found), sums

    gradient, sums = jax.lax.scan(member, gradient, (matrix, carry))
    return sums, gradient


@partial(jax.jit, static_argnames="stage", donate_argnames=("pages", "rest"))
def replace_leaves(stage: Stage, pages: Any, rest: Any, leaves: Params) -> Any:
    """A block's (pages, rest) with other values of some leaves, each rounded to nearest."""
    places, pages, rest = dict(stage.layout.matrices), list(pages), dict(rest)
    for name, leaf in flat(leaves).items():
        if name in rest:
            rest[name] = leaf.astype(rest[name].dtype)
            continue
        place = places[name]
        page = pages[place.page]
        flattened = leaf.astype(page.dtype).reshape(-1)
        pages[place.page] = jax.lax.dynamic_update_slice(page, flattened, (place.offset,))
    return tuple(pages), rest


def shapes_of(tree: Any) -> Any:
    """Structure, shapes and dtypes; hashable.

    >>> shapes_of({"x": jnp.ones(2)}) == shapes_of({"x": jnp.zeros(2)})
    True
    """
    return jax.tree.structure(tree), tuple((x.shape, x.dtype) for x in jax.tree.leaves(tree))


@partial(jax.jit, static_argnames=_STATIC, donate_argnames=("pages", "rest"))
def apply(
    stage: Stage, pages: Any, rest: Any, ids: Any, updates: Update, count: jax.Array, direction: Direction,
    rounding: Rounding,
) -> Any:  # fmt: skip
    """A block after the first ``count`` of updates, whose arrays have another axis in front: (pages, rest)."""
    how: dict[str, Any] = {"count": count, "direction": direction, "rounding": rounding}
    rest, _ = move(rest, ids[1], updates, trained=stage.trained(rest), **how)
    places, frozen = [place for _, place in stage.layout.matrices], stage.numbers(stage.layout.matrices)
    return Matrices(places, pages, ids[0], updates, (None, None), **how, frozen=frozen).settle_all(), rest


@partial(jax.jit, static_argnames=_STATIC, donate_argnames="rest")
def add(
    stage: Stage, rest: Any, beside: ReadOnly | None, ids: Any, updates: Update, count: jax.Array, direction: Direction,
    rounding: Rounding,
) -> Any:  # fmt: skip
    """What changes of a block whose pages stay, as `apply` does: (what is kept of its matrices, rest)."""
    how: dict[str, Any] = {"count": count, "direction": direction, "rounding": rounding}
    rest, _ = move(rest, ids[1], updates, trained=stage.trained(rest), **how)
    if beside is None or isinstance(beside, Pending):  # what changes of matrices is known to all blocks
        return (), rest
    places = [place for _, place in stage.layout.matrices]
    return beside.matrices(places, (), ids[0], updates, (None, None), direction, count=count).settle_all(), rest


@partial(jax.jit, static_argnames=_STATIC, donate_argnames="cache")
def plain(
    stage: Stage, pages: Any, rest: Any, tied: Any, beside: ReadOnly | None, ids: Any, carry: Any, batch: Batch,
    cache: Cache | None, direction: Direction, rounding: Rounding,
) -> Any:  # fmt: skip
    """One block without probes: (carry, cache)."""
    block, leaves = stage.kind.block, stage.leaves(pages, rest, tied)
    if beside is not None:
        how = {"direction": direction, "rounding": rounding}
        for name, of, i in _matrices(stage, (pages, rest, tied, beside), ids, None, (None, None), how)[1]:
            set_leaf(leaves, name, _as_leaf(block, of.weight(i, None)))
    return block.extend(leaves, carry, batch, cache)


@partial(jax.jit, static_argnames=_STATIC)
def branch(
    stage: Stage, pages: Any, rest: Any, tied: Any, ids: Any, probes: Any, carry: Any, batch: Batch,
    direction: Direction, rounding: Rounding,
) -> Any:  # fmt: skip
    """One block for members along low-rank directions of the weights as they are: carries [M, ...].

    Pages are only read, whatever a run trains with; all keys of the probes have one V.
    """

    def beside(matrices: Sequence[tuple[str, Place]]) -> tuple[Sum | None, ...]:
        rows = [None if name in stage.frozen else matrix_shape(place.shape)[0] for name, place in matrices]
        return tuple(None if n is None else Sum(jnp.zeros((n, direction.rank))) for n in rows)

    basis = Basis(probes[0][0, 1], jnp.float32(0))
    held = pages, rest, tied, Beside(beside(stage.layout.matrices), beside(stage.tied), basis)
    run = lambda block, leaves, carry: block.apply(leaves, carry, batch)  # noqa: E731
    how = {"direction": direction, "rounding": rounding}
    return _members(stage, held, ids, None, probes, run, carry, how)[0]


@partial(jax.jit, static_argnames=_STATIC, donate_argnames="cache")
def extend(
    stage: Stage, pages: Any, rest: Any, tied: Any, beside: ReadOnly | None, ids: Any, probes: Any, rows: Any,
    cache: Cache | None, direction: Direction, rounding: Rounding,
) -> Any:  # fmt: skip
    """One block of a generating sweep: rows come member by member, [M b, ...], and go so."""
    how = {"direction": direction, "rounding": rounding}
    apart = jax.tree.map(lambda x: x.reshape(len(probes[1]), -1, *x.shape[1:]), (*rows, cache))
    run = lambda block, leaves, row: block.extend(leaves, *row)  # noqa: E731
    done, _ = _members(stage, (pages, rest, tied, beside), ids, None, probes, run, apart, how)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)


@lru_cache(maxsize=64)
def stages_of(
    blocks: tuple[Block, ...], layouts: tuple[tuple[str, Layout], ...], direction: Direction | None = None
) -> tuple[Stage, ...]:
    """What compiled visits know of each block; ``layouts`` are those of all blocks that own leaves, by name.

    All leaves are trained if there is no direction that says which.
    """
    by_name = dict(layouts)
    stages = []
    for block, kind in zip(blocks, kinds(blocks), strict=True):
        tied = []
        for name, owner in block.aliases.items():
            home = block_of(owner, by_name)
            tied.append((name, dict(by_name[home].matrices)[owner[len(home) + 1 :]]))
        frozen = frozenset() if direction is None else _frozen(block, by_name[block.name], direction)
        stages.append(_stage(kind, by_name[block.name], tuple(tied), frozen))
    return tuple(stages)


def _frozen(block: Block, layout: Layout, direction: Direction) -> frozenset[str]:
    """Leaves of a block, and those that it shares, that a direction does not train, by the block's names for them."""
    named = [(f"{block.name}.{name}", name, 2) for name, _ in layout.matrices]
    named += [(f"{block.name}.{name}", name, 1) for name in layout.rest]
    named += [(owner, name, 2) for name, owner in block.aliases.items()]
    return frozenset(name for full, name, ndim in named if not direction.trains(full, ndim))
