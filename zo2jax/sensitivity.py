"""How much a loss depends on each block of a model, by probes of that block alone; and which blocks are to train."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.directions import Direction, check_targets, lowrank, normal, step_keys
from zo2jax.estimators import Estimator, two_point
from zo2jax.leaves import is_trained, plain_name
from zo2jax.models.blocks import Block, block_of, kinds, owned_shapes
from zo2jax.models.model import Model
from zo2jax.pages import flat
from zo2jax.plan import Plan
from zo2jax.plan.liveness import needs_of
from zo2jax.stream import Stream
from zo2jax.updates import nearest
from zo2jax.visits import Stage, branch, for_members, plain, shapes_of

_TOGETHER = 4
"""Blocks whose pairs of members are under way at once: activations of so many carries, twice."""


@dataclass(frozen=True)
class BlockSensitivity:
    """What was measured of a block.

    >>> BlockSensitivity("head", ("head.norm.scale",), 8, 0.0, 4.0, 0.5).square
    4.0
    """

    name: str
    leaves: tuple[str, ...]
    """Dotted names of those that train; () for a block without any, of which nothing is measured."""
    parameters: int
    """In these leaves."""
    operations: float
    """Of products, for one member and a batch of the shape that was measured with."""
    square: float = 0.0
    """The estimate of ||grad_b L||^2."""
    error: float = 0.0
    """Its standard error."""


@dataclass(frozen=True)
class Sensitivity:
    """The table that `sensitivity` measures; with `choose` also which blocks are to train. ``print`` shows it.

    >>> measured = [("embed", 8, 0.0, 1.0), ("mlp", 64, 128.0, 6.0), ("head", 64, 128.0, 9.0)]
    >>> rows = [BlockSensitivity(n, (n + ".w",), size, ops, sq, sq / 4) for n, size, ops, sq in measured]
    >>> chosen = Sensitivity(tuple(rows), draws=8).choose(blocks=1)
    >>> chosen.targets, chosen.share, chosen.work
    (('head.*',), 0.5625, 0.75)
    """

    blocks: tuple[BlockSensitivity, ...]
    draws: int
    """Of z, for each block."""
    narrowed: bool = False
    """Whether only some leaves of blocks would train in any case: those that a direction's targets name."""
    chosen: tuple[str, ...] = ()
    """Names of the blocks that are to train, in order; () before a choice."""

    def choose(self, fraction: float | None = None, *, blocks: int | None = None) -> "Sensitivity":
        """The same with the blocks of the largest ||grad_b L||^2: a fraction of those that can train, or so many.

        Raises:
            ValueError: unless one of both is given, for a fraction outside (0, 1], or no such number of blocks.

        >>> found = Sensitivity(tuple(BlockSensitivity(n, (n + ".w",), 1, 0.0, ord(n), 0.0) for n in "abc"), 8)
        >>> found.choose(0.5).chosen
        ('b', 'c')
        """
        able = [block for block in self.blocks if block.leaves]
        if (fraction is None) == (blocks is None):
            raise ValueError(f"fraction is {fraction} and blocks is {blocks}: expected one of them")
        if fraction is not None:
            if not 0 < fraction <= 1:
                raise ValueError(f"fraction is {fraction}, expected a number above 0 and up to 1, such as 0.5")
            blocks = max(1, math.floor(fraction * len(able) + 0.5))
        assert blocks is not None
        if not 1 <= blocks <= len(able):
            raise ValueError(f"blocks is {blocks}, expected 1 to {len(able)}, as many as can train")
        best = sorted(able, key=lambda block: -block.square)[:blocks]
        return replace(self, chosen=tuple(block.name for block in self.blocks if block in best))

    @property
    def targets(self) -> tuple[str, ...]:
        """Patterns of the chosen blocks' leaves, for the ``targets`` of a direction; () if all train as they would."""
        if not self.chosen or len(self.chosen) == sum(bool(block.leaves) for block in self.blocks):
            return ()
        names: list[str] = []
        for block in self._of_chosen:
            within = block.name + "."
            others = any(other.name.startswith(within) for other in self.blocks)
            if self.narrowed or others or not all(leaf.startswith(within) for leaf in block.leaves):
                names += map(escape, block.leaves)
            else:
                names.append(escape(within) + "*")
        return tuple(names)

    @property
    def share(self) -> float:
        """Of the sum of all ||grad_b L||^2, what the chosen blocks have."""
        return _ratio(sum(b.square for b in self._of_chosen), sum(b.square for b in self.blocks))

    @property
    def parameters(self) -> float:
        """Of the parameters that could train, what the chosen blocks have."""
        return _ratio(sum(b.parameters for b in self._of_chosen), sum(b.parameters for b in self.blocks))

    @property
    def work(self) -> float:
        """Of the products of a step of two members, what is left: blocks before the first chosen one have one member.

        Beside products, a block that is not chosen saves its z, its update and its way back to host memory.
        """
        first = next((i for i, block in enumerate(self.blocks) if block.name in self.chosen), 0)
        both = 2 * sum(block.operations for block in self.blocks)
        return 1 - _ratio(sum(block.operations for block in self.blocks[:first]), both) if both else 1.0

    @property
    def cost(self) -> float:
        """What measuring took, in steps of two members, by products."""
        operations, measured, passes = 0.0, 0, 0.0
        for block in self.blocks:
            measured += bool(block.leaves)
            operations += block.operations
            passes += block.operations * (1 + 2 * measured)
        return self.draws * _ratio(passes, 2 * operations) if operations else float(self.draws * measured)

    @property
    def _of_chosen(self) -> list[BlockSensitivity]:
        return [block for block in self.blocks if block.name in self.chosen]

    def __str__(self) -> str:
        """A table of the blocks, and of a choice what it keeps and saves."""
        width = max(len(block.name) for block in self.blocks)
        whole = sum(block.square for block in self.blocks)
        lines = [f"{'block':<{width}}{'parameters':>14}{'|grad|^2':>12}{'+-':>10}{'share':>8}"]
        for block in self.blocks:
            line = f"{block.name:<{width}}{block.parameters:>14,}"
            if block.leaves:
                line += f"{block.square:>12.3g}{block.error:>10.2g}{_ratio(block.square, whole):>8.1%}"
            lines.append(line + ("  trains" if block.name in self.chosen else ""))
        if self.chosen:
            able = sum(bool(block.leaves) for block in self.blocks)
            lines.append(
                f"{len(self.chosen)} of {able} blocks train: {self.share:.0%} of the squared norm of the gradient, "
                f"{self.parameters:.0%} of the parameters; a step takes {self.work:.0%} of the products"
            )
        return "\n".join([*lines, f"{self.draws} draws for each block, as many products as {self.cost:.0f} steps"])

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Sensitivity":
        """What `as_json` gave.

        Raises:
            TypeError, KeyError: if it is something else.

        >>> found = Sensitivity((BlockSensitivity("a", ("a.w",), 1, 0.0, 2.0, 0.5),), 8)
        >>> Sensitivity.from_json(found.as_json()) == found
        True
        """
        blocks = tuple(BlockSensitivity(**{**one, "leaves": tuple(one["leaves"])}) for one in values["blocks"])
        return cls(**{**values, "blocks": blocks, "chosen": tuple(values["chosen"])})


def sensitivity(
    model: Model,
    batches: Iterable[Any],
    *,
    key: jax.Array,
    eps: float = 1e-3,
    directions: int = 1,
    direction: Direction = normal,
    rank: int = 8,
    plan: Plan | None = None,
    pages: Path | None = None,
) -> Sensitivity:
    """Measures ||grad_b L||^2 of each block b by pairs of probes of that block alone, as a table.

    With z_b for the leaves of block b, of mean 0 and covariance I, g_b = (L(theta + eps z_b) - L(theta - eps z_b)) /
    (2 eps) has E[g_b^2] = ||grad_b L||^2, up to O(eps^2): the mean over all draws, one or more for each batch, is the
    estimate, and their standard deviation over sqrt(draws) its standard error (each g_b^2 varies by 1.4 times its
    mean at least, so that 8 draws are good to about half, 100 to 14 %). L is a batch's loss: its noise is in it.

    z is low-rank for matrices, whatever the direction of the run is, so that matrices are only read: any tier, any
    format. A pair goes with the model as it is up to its block, which is computed once for all of them, and on alone
    from there on; `Sensitivity.cost` says what that takes. A leaf that another block shares is its owner's.

    Args:
        model: from `zo2jax.load`, with the loss that is to be trained on.
        batches: as for `zo2jax.Run.step`, lists of batches among them.
        key: ``jax.random.key(seed)``, of z.
        eps: the perturbation scale.
        directions: draws for each batch.
        direction: of the run: its targets (of `zo2jax.lora` the matrices) are what is measured.
        rank: of z; larger ones vary less.
        plan: where the blocks live meanwhile; on the device if None.
        pages: a folder for page files, for blocks on the disk that cannot stay in the model's own files.

    Raises:
        ValueError: for no batches, targets that name no leaf, or a loss that is not finite.

    >>> import zo2jax as zo
    >>> times = lambda p, x: x * p["w"]
    >>> stages = {"a": (times, {"w": jnp.ones(2)}), "b": (times, {"w": jnp.zeros(2)})}
    >>> model = zo.blocks(stages, loss=lambda y, batch: (y + 1).sum(1))
    >>> found = sensitivity(model, [jnp.ones((1, 2))] * 8, key=jax.random.key(0))
    >>> [block.square > 0.1 for block in found.blocks]  # the loss is sum(a b + 1) with b = 0
    [False, True]
    """
    check_targets(owned_shapes(model.blocks), direction)
    given = [batch if isinstance(batch, list) else [batch] for batch in batches]
    if not given or not all(given) or directions < 1:
        raise ValueError(f"{len(given)} batches and {directions} directions: expected one of each at least")
    estimator = two_point(eps, direction=lowrank(rank, None))
    plan = Plan() if plan is None else plan
    stream = Stream(model.blocks, model.source, direction, nearest, plan, pages, format=model.format, fixed=True)
    try:
        probing = _Probing(stream, model.blocks, direction, estimator)
        keys = [jax.random.fold_in(key, i) for i in range(len(given) * directions)]
        found = [
            probing.draw([jax.device_put(part) for part in given[i // directions]], keys[i]) for i in range(len(keys))
        ]
    finally:
        stream.close()
    squares = np.square(np.array(found, np.float64))
    for name, values in zip(probing.measured, squares.T, strict=True):
        if not np.isfinite(values).all():
            raise ValueError(f"the loss is not finite with probes of block {name}: try a smaller eps than {eps}")
    draws, means = len(squares), squares.mean(axis=0)
    deviations = squares.std(axis=0, ddof=1) if draws > 1 else math.sqrt(2) * means  # of one draw, as of normal g
    errors = (deviations / math.sqrt(draws)).tolist()
    both = dict(zip(probing.measured, zip(means.tolist(), errors, strict=True), strict=True))
    operations = _operations(model.blocks, given[0])
    rows = [
        BlockSensitivity(block.name, *probing.leaves[block.name], ops, *both.get(block.name, ()))
        for block, ops in zip(model.blocks, operations, strict=True)
    ]
    return Sensitivity(tuple(rows), draws, bool(direction.targets) or direction.adapter is not None)


class _Probing:
    """Draws of one z for each block of a stream, and what they make of the loss."""

    def __init__(self, stream: Stream, blocks: Sequence[Block], direction: Direction, estimator: Estimator):
        """Finds out which blocks have leaves that train, and where pairs of members part from the others."""
        self._stream, self._estimator = stream, estimator
        self._how: dict[str, Any] = {"direction": estimator.direction, "rounding": nearest}
        self._names, shapes = [block.name for block in blocks], owned_shapes(blocks)
        self._own: dict[str, set[str]] = {}
        self.leaves: dict[str, tuple[tuple[str, ...], int]] = {}
        """By block: the names of the leaves that train, and how many parameters these have."""
        for name in self._names:
            trained = {
                plain_name(f"{name}.{leaf}"): x.size
                for leaf, x in flat(shapes[name]).items()
                if is_trained(x) and direction.trains(f"{name}.{leaf}", x.ndim)
            }
            self.leaves[name] = tuple(trained), sum(trained.values())
            self._own[name] = set(flat(shapes[name]))
        self.measured = [name for name in self._names if self.leaves[name][0]]
        """In the order of the model."""
        self._lent = [{leaf: block_of(owner, shapes) for leaf, owner in b.aliases.items()} for b in blocks]
        uses = {
            name: [i for i, other in enumerate(self._names) if name == other or name in self._lent[i].values()]
            for name in self.measured
        }
        self._begins = {name: min(at) for name, at in uses.items()}

    def draw(self, parts: Sequence[Any], key: jax.Array) -> list[float]:
        """g of each measured block, for one z of each; the batches of ``parts`` are one batch."""
        probes = step_keys(key, jnp.uint32(0), 1, self._estimator.direction), jnp.asarray(self._estimator.probes)
        order = sorted(self.measured, key=lambda name: self._begins[name])
        carries: list[Any] = [None] * len(parts)  # of the model as it is
        found: dict[str, float] = {}
        start = 0
        for at in range(0, len(order), _TOGETHER):
            group = order[at : at + _TOGETHER]
            start, losses = self._sweep(group, start, carries, parts, probes)
            for name, loss in losses.items():
                found[name] = float(self._estimator.coefficients(loss)[0])
        return [found[name] for name in self.measured]

    def _sweep(
        self, group: Sequence[str], start: int, carries: list[Any], parts: Sequence[Any], probes: Any
    ) -> tuple[int, dict[str, jax.Array]]:
        """(where the carries are now, losses [2] of the pair of each block of a group); ``carries`` are at ``start``.

        They go no further than the group needs, so that the next one goes on from there.
        """
        last = max(self._begins[name] for name in group)
        pairs: dict[str, list[Any]] = {}
        for i in range(start, len(self._names)):

            def see(stage: Stage, held: Any, i: int = i) -> list[Any]:
                for name in group:
                    if i >= self._begins[name]:
                        came = pairs.get(name) or [for_members(carry, 2) for carry in carries]
                        own = stage.only(self._perturbed(i, name))
                        pairs[name] = [
                            branch(own, *held, probes, carry, part, **self._how)
                            for carry, part in zip(came, parts, strict=True)
                        ]
                if i < last:
                    pages, rest, tied, ids = held
                    for j, part in enumerate(parts):
                        how = pages, rest, tied, None, ids, carries[j], part, None
                        carries[j], _ = plain(stage, *how, **self._how)
                return [*pairs.values(), *(carries if i < last else [])]

            self._stream.look(self._names[i], see)
        return last, {name: _loss(ends, parts) for name, ends in pairs.items()}

    def _perturbed(self, i: int, name: str) -> set[str]:
        """The leaves of block i, by its own names for them, that a probe of the block ``name`` moves."""
        shared = {leaf for leaf, home in self._lent[i].items() if home == name}
        return shared | self._own[name] if self._names[i] == name else shared  # of which its stage knows what trains


def _loss(ends: Sequence[Any], parts: Sequence[Any]) -> jax.Array:
    """Of a pair, from what the last block gives for each part of a batch: float32 [2]."""
    for end, part in zip(ends, parts, strict=True):
        if not isinstance(end, tuple):
            raise ValueError(f"a batch of {sorted(part)} has no loss: expected 'ids' and 'targets'")
    totals, counts = (sum(of[1:], of[0]) for of in zip(*ends, strict=True))
    return totals / jnp.where(counts > 0, counts, 1)


def _operations(blocks: Sequence[Block], parts: Sequence[Any]) -> list[float]:
    """Of products, of each block for one member and all parts of a batch, read off shapes."""
    totals = [0.0] * len(blocks)
    for part in parts:
        carry, shapes = None, jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), part)
        known: dict[Any, Any] = {}
        for i, (block, kind) in enumerate(zip(blocks, kinds(blocks), strict=True)):
            if (came := (kind, shapes_of(carry))) not in known:
                known[came] = needs_of(block, carry, shapes)
            needs, carry = known[came]
            totals[i] += needs.operations
    return totals


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
