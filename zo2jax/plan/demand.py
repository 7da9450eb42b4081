"""What a step demands, wherever blocks live: bytes of each block, and work of the device, from shapes alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.directions import Direction, matrix_shape
from zo2jax.estimators import Estimator
from zo2jax.formats import Format, pieces_of
from zo2jax.models.blocks import Block, Source, block_of, kinds, owned_shapes
from zo2jax.models.model import Model
from zo2jax.models.traced import backend, has_kernels
from zo2jax.pages import Layout, flat, layouts_of
from zo2jax.plan.liveness import Needs, Sums, needs_of
from zo2jax.plan.planned import Budget
from zo2jax.plan.schedule import Work
from zo2jax.stores import STAGING
from zo2jax.updates import Rounding, nearest, residual

_LIBRARIES = 64 * 2**20
"""Workspaces of cuBLAS, on a GPU: 32 MiB for each product that is under way or next (XLA's buffer assignment)."""
_AHEAD = 4
"""Visits that the host issues ahead, of blocks that stay and of parts of a step, each with workspaces and one carry for
all of them: fitted to seven peaks on an H200 (docs/LOG.md)."""
_PROCESS = {"gpu": int(1.75 * 2**30)}
"""Host memory of a program without a model: Python, JAX, and on GPUs CUDA's libraries (measured on an H200's host)."""


class Matrices(NamedTuple):
    """Those of a block: how many weights, bytes of pages, and of these the codes.

    >>> Matrices(8, 16, 0).weights
    8
    """

    weights: int
    nbytes: int
    codes: int
    """Weights that are kept as codes."""


@dataclass(frozen=True)
class Demand:
    """What the blocks of a model take, wherever they live."""

    sizes: dict[str, int]
    """Bytes of pages, by block in order."""
    vectors: int
    """Bytes of leaves that are in no page, and of what stays beside matrices."""
    owners: set[str]
    """Blocks whose leaves another one shares."""
    needs: list[Needs]
    members: int
    at_once: int
    """The most of them that are ever evaluated at once."""
    shared: bool
    """Whether all members share a matrix, as with low-rank directions."""
    prefetch: int
    read_only: bool
    matrices: dict[str, Matrices]
    masters: dict[str, int]
    """Bytes that only folds touch, by block."""
    pieces: dict[str, int]
    """Of matrices, in which a fold goes through a block."""
    refresh: int | None
    estimator: Estimator
    int8: bool
    moved: int
    """Bytes beside the largest matrix while XLA moves it and makes its probes: z in float32, and the new matrix."""
    trained: frozenset[str]
    """Blocks that are others for each member; those before the first one are the same for all."""
    moving: frozenset[str]
    """Blocks whose matrices updates change, or are made into probes."""
    reads: dict[str, int]
    """Bytes of each block as it is read."""
    readers: int
    """Blocks that are read at once."""
    batches: int = 1
    limit: int | None = None
    chunk: int | None = None
    """Members at once; None: all."""

    @classmethod
    def of(
        cls,
        model: Model,
        estimator: Estimator,
        batch: Any,
        prefetch: int = 1,
        *,
        batches: int = 1,
        chunk: int | None = None,
        rounding: Rounding = nearest,
    ) -> "Demand":
        """Looks at each kind of block once."""
        shapes, direction = owned_shapes(model.blocks), estimator.direction
        layouts = layouts_of(model.blocks, model.format)
        vectors = sum(_nbytes(flat(shapes[name])[leaf]) for name, layout in layouts.items() for leaf in layout.rest)
        moving = {name: _moving(name, layout, direction) for name, layout in layouts.items()}
        vectors += _beside(moving, direction)
        vectors *= 1 if estimator.full is None else 2  # an anchor has vectors, and an empty P, of its own
        owners = {block_of(owner, shapes) for block in model.blocks for owner in block.aliases.values()}
        folds = direction.read_only and direction.refresh is not None
        matrices = {name: _matrices(layout) for name, layout in layouts.items()}
        needs, moved = _needs(model, batch, matrices, direction), 0
        if backend() == "gpu" and not has_kernels() and not direction.read_only:
            moved = max(n.weight for n in needs) // model.dtype.itemsize * (4 + model.dtype.itemsize)
        masters = dict.fromkeys(layouts, 0)
        if folds:
            for name, layout in layouts.items():
                trains = partial(_trains, direction, name)
                masters[name] = layout.masters(rounding == residual, trains).nbytes
        return cls(
            sizes={name: layout.nbytes for name, layout in layouts.items()},
            vectors=vectors,
            owners=owners,
            needs=needs,
            members=estimator.members,
            at_once=len(estimator.probes),
            shared=direction.rank > 0,
            prefetch=prefetch,
            read_only=direction.read_only,
            matrices=matrices,
            masters=masters,
            pieces={name: sum(len(pieces_of(*x)) for x in shapes) if folds else 0 for name, shapes in moving.items()},
            refresh=direction.refresh if folds else None,
            estimator=estimator,
            trained=_trained(model, direction),
            moving=frozenset(name for name, shapes in moving.items() if shapes),
            reads={name: layout.nbytes for name, layout in layouts_of(model.blocks).items()},
            readers=STAGING if Source.of(model.source).concurrent else 1,
            moved=moved,
            int8=_sums(model.format, direction) == "int32",
            batches=batches,
            chunk=chunk,
        )

    def fitting(self, stays: Sequence[bool]) -> "Demand":
        """With the members in the fewest parts with which a step fits; in single ones if it never does."""
        for parts in range(1, self.at_once + 1):
            chunk = self.in_parts(parts)
            work = replace(self, chunk=None if parts == 1 else chunk)
            assert self.limit is not None
            if work.budget(stays).peak <= self.limit or chunk == 1:
                break
        return work

    def in_parts(self, count: int) -> int:
        """Members at once with so many parts, or fewer: pairs, which share their directions, stay together."""
        chunk = -(-self.at_once // count)
        return chunk + (chunk % 2 if chunk > 1 and self.at_once % 2 == 0 else 0)

    @property
    def _chunk(self) -> int:
        return min(self.chunk or self.at_once, self.at_once)

    @property
    def _parts(self) -> int:
        """Visits of a block in a step."""
        return -(-self.members // self._chunk) * self.batches

    def budget(self, stays: Sequence[bool]) -> Budget:
        """What a step takes if these blocks stay on the device, with those that own shared leaves or have no pages."""
        pairs = zip(stays, self.sizes.items(), strict=True)
        here = [stay or not size or name in self.owners for stay, (name, size) in pairs]
        streamed = [size for size, stay in zip(self.sizes.values(), here, strict=True) if not stay]
        resident = frozenset(name for stay, name in zip(here, self.sizes, strict=True) if stay)
        chunk, parts, members = self._chunk, self._parts, self.members * self.batches
        waiting = (members - chunk) * max(n.carry for n in self.needs)
        ahead = min(_AHEAD, max(parts * _longest_run(here), parts - 1))
        carries = min(1, ahead) * max(n.carry for n in self.needs)
        return Budget(
            resident=sum(self.sizes[name] + self.masters[name] for name in resident) + self.vectors,
            window=room(streamed, self.prefetch),
            probes=(self._copies if self.shared else chunk) * max(n.weight for n in self.needs) + self.moved,
            activations=chunk * (max(n.activations for n in self.needs) + carries) + waiting,
            libraries=(1 + ahead) * _LIBRARIES if backend() == "gpu" else 0,
            limit=self.limit,
            sizes=self.sizes,
            stays=resident,
            members=members,
            parts=parts,
            works=self.works,
            read_only=self.read_only,
            masters=self.masters,
            pieces=self.pieces,
            refresh=self.refresh,
            process=_PROCESS.get(backend(), 0),
            reads=self.reads,
            readers=self.readers,
            batches=self.batches,
        )

    @cached_property
    def works(self) -> tuple[Work, ...]:
        """Of the blocks in order, wherever they live."""
        first = next((i for i, name in enumerate(self.sizes) if name in self.trained), len(self.sizes))
        probes = sum(len(keys) for keys, _ in self.estimator.chunks(self._chunk)) * self.batches
        pairs = enumerate(zip(self.sizes, self.needs, strict=True))
        return tuple(self._work(name, needs, probes, i < first) for i, (name, needs) in pairs)

    @property
    def _copies(self) -> int:
        """Of a matrix that all members share: the 16-bit numbers that codes become which are not multiplied as such."""
        return int(not self.int8 and any(matrices.codes for matrices in self.matrices.values()))

    def _work(self, name: str, needs: Needs, probes: int, first: bool) -> Work:
        """Of a block, for all members; its matrices are read once for each visit, or for each member's own probe.

        ``probes`` are the directions of all parts, and ``first`` says that it comes before all that is trained.
        """
        weights, nbytes, codes = self.matrices[name]
        moves, multiplied = name in self.moving, needs.operations > 0
        members, parts = (self.batches,) * 2 if first else (self.members * self.batches, self._parts)
        update = self.estimator.probes.shape[1]
        waiting = update * (self.refresh or 0) / 2  # terms since the last fold, on average
        drawn = draws = 0.0
        if not self.read_only and moves:
            drawn = nbytes * (parts + 1 + (members if multiplied else 0))
            draws = weights * (update + (probes if multiplied else 0))
        elif moves and multiplied and not self.shared:  # probes of codes, with all terms since the last fold
            drawn = parts * nbytes + members * 2 * weights
            draws = weights * (probes + parts * waiting)
        plain = nbytes if not codes else weights * (1 if self.int8 else 2)
        decoded = codes * 2 if self.shared and not self.int8 else 0
        return Work(
            name,
            size=self.sizes[name],
            products=members * needs.operations,
            attention=members * needs.attention,
            read=(parts if self.shared or not moves else members) * plain if multiplied else 0,
            traffic=members * needs.traffic + (parts * (nbytes + decoded) if codes and multiplied else 0),
            draws=draws,
            drawn=drawn,
            visits=parts,
            moves=moves,
            int8=self.int8 and codes > 0,
        )


def _trains(direction: Direction, block: str, leaf: str) -> bool:
    return direction.trains(f"{block}.{leaf}")


def _trained(model: Model, direction: Direction) -> frozenset[str]:
    """Blocks that are others for each member: with a leaf that is trained, or that share one."""
    shapes = owned_shapes(model.blocks)
    own = {n for n, x in shapes.items() if any(direction.trains(f"{n}.{k}", len(v.shape)) for k, v in flat(x).items())}
    return frozenset(
        b.name for b in model.blocks if b.name in own or any(block_of(o, shapes) in own for o in b.aliases.values())
    )


def _needs(model: Model, batch: Any, matrices: Mapping[str, Matrices], direction: Direction) -> list[Needs]:
    """Of each block, for one member."""
    shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), batch)
    known: dict[Any, tuple[Needs, Any]] = {}
    needs, carry = [], None
    for block, kind in zip(model.blocks, kinds(model.blocks), strict=True):
        sums = _sums(model.format, direction) if matrices[block.name].codes else ""
        lowrank = _lowrank(block, direction)
        shapes = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(carry)]
        came = (kind, sums, lowrank, jax.tree.structure(carry), *shapes)
        if came not in known:
            known[came] = needs_of(block, carry, shaped, sums=sums, lowrank=lowrank)
        one, carry = known[came]
        needs.append(one)
    return needs


def _lowrank(block: Block, direction: Direction) -> frozenset[str]:
    """The matrices of a block, its own or shared ones, with a low-rank part beside them."""
    if not direction.rank:
        return frozenset()
    matrices = [name for name, x in flat(block.shapes).items() if len(x.shape) > 1]
    return frozenset(x for x in matrices if direction.trains(block.aliases.get(x, f"{block.name}.{x}")))


def _sums(format: Format | None, direction: Direction) -> Sums:
    """What products by codes are made as; by those that are decoded first, as any others."""
    if format is None:
        return ""
    if format.compute == "int8":
        return "int32"
    return "float32" if direction.rank and format.bits == 8 and format.group is None else ""


def _matrices(layout: Layout) -> Matrices:
    weights = [(math.prod(place.shape), place.scale is not None) for _, place in layout.matrices]
    return Matrices(sum(n for n, _ in weights), layout.nbytes, sum(n for n, coded in weights if coded))


def _moving(block: str, layout: Layout, direction: Direction) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices of a block that updates change."""
    return [matrix_shape(place.shape) for name, place in layout.matrices if _trains(direction, block, name)]


def _beside(moving: Mapping[str, Sequence[tuple[int, int]]], direction: Direction) -> int:
    """Bytes of what low-rank updates add up to, P or an adapter, which stays on the device; without momentum."""
    shapes = [shape for of_block in moving.values() for shape in of_block]
    numbers = sum(rows if direction.adapter is None else rows + columns for rows, columns in shapes)
    return 4 * direction.rank * numbers


def _nbytes(shape: Any) -> int:
    return math.prod(shape.shape) * jnp.dtype(shape.dtype).itemsize


def room(sizes: Sequence[int], prefetch: int) -> int:
    """Bytes of streamed blocks that may be on the device at once, for blocks of these sizes, visited in a cycle.

    Enough for any block that is computed and those that are uploaded meanwhile, and for one more that is written back
    where most blocks are; beside the largest (an embedding, a head) that one has to be gone.

    >>> room([50, 4, 8, 4, 8, 4, 8, 50], 1), room([4, 8, 4, 8], 1), room([5, 1], 1)
    (104, 20, 6)
    """

    def sums(count: int) -> list[int]:
        return sorted(sum(sizes[(i + j) % len(sizes)] for j in range(count)) for i in range(len(sizes)))

    if len(sizes) <= prefetch + 2:
        return sum(sizes)
    return max(sums(prefetch + 1)[-1], sums(prefetch + 2)[len(sizes) * 3 // 4])


def following(streamed: Sequence[bool], count: int) -> list[tuple[int, ...]]:
    """For each block the next ``count`` others that are streamed, in a cycle.

    >>> following([True, False, True, True], 1)
    [(2,), (2,), (3,), (0,)]
    """
    total = len(streamed)
    return [tuple([j % total for j in range(i + 1, i + total) if streamed[j % total]][:count]) for i in range(total)]


def spread(sizes: Sequence[int], fraction: float) -> list[bool]:
    """Which of blocks of these sizes stay, so that this fraction of the bytes does, evenly spread.

    >>> spread([2, 2, 2, 2], 0.5)
    [True, False, True, False]
    """
    stays, owed = [], 0.0
    for size in sizes:
        owed += fraction * size
        stays.append(owed >= size / 2)
        owed -= size if stays[-1] else 0
    return stays


def _longest_run(stays: Sequence[bool]) -> int:
    """The most blocks in a row that stay, in a cycle; 0 without any.

    >>> _longest_run([True, False, True, True]), _longest_run([True, True])
    (3, 2)
    """
    longest = run = 0
    for here in [*stays, *stays]:
        run = run + 1 if here else 0
        longest = max(longest, run)
    return min(longest, len(stays))
