"""Hybrid training: backpropagation for leaves of the last blocks, zeroth order for all others, in one step."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zo2jax.directions import Direction
from zo2jax.estimators import Estimator
from zo2jax.leaves import is_trained, leaf_name
from zo2jax.models.blocks import Block, Params, owned_shapes, set_leaf
from zo2jax.models.model import Model
from zo2jax.pages import flat
from zo2jax.plan import Plan
from zo2jax.tail import Tail


@dataclass(frozen=True)
class LastBlocks:
    """What `last_blocks` gives.

    >>> last_blocks(3)
    last_blocks(3)
    """

    count: int

    def __repr__(self) -> str:
        return f"last_blocks({self.count})"


def last_blocks(count: int) -> LastBlocks:
    """All leaves that the last blocks own, for `hybrid`: 1 is the head, 3 the last layer's two blocks as well.

    A matrix that a head shares with the embedding is the embedding's.

    Raises:
        ValueError: if there are none.

    >>> last_blocks(1)
    last_blocks(1)
    """
    if count < 1:
        raise ValueError(f"last_blocks({count}): expected at least 1, which is the head")
    return LastBlocks(count)


@dataclass(frozen=True)
class Hybrid:
    """What `hybrid` gives.

    >>> hybrid(first_order=last_blocks(1), optimizer=optax.sgd(0.1))
    hybrid(first_order=last_blocks(1))
    """

    first_order: LastBlocks | tuple[str, ...]
    optimizer: optax.GradientTransformation

    def __repr__(self) -> str:
        return f"hybrid(first_order={self.first_order})"


def hybrid(*, first_order: LastBlocks | Sequence[str], optimizer: optax.GradientTransformation) -> Hybrid:
    """Backpropagation for some leaves of a run's last blocks, zeroth-order steps for the rest: `zo2jax.Run(hybrid=)`.

    The blocks from the first one with such a leaf on are the *tail*, which stays on the device. A step takes the M
    members of the population through the blocks before it as always, and then, one after the other, through the tail
    and back. Their losses move the zeroth-order leaves, and the gradient of their mean loss,

        1 / M sum_m d loss(theta + sum_k C[m, k] z_k, phi) / d phi

    moves the first-order leaves phi, which no member perturbs. phi is kept in float32, and rounded to the model's dtype
    where it is used. In a tail every leaf that is not first-order is zeroth-order, or stays, as the direction says.

    Args:
        first_order: `last_blocks`, or patterns (`fnmatch`) of the dotted names of leaves, such as
            ``("layers.11.*", "head.norm.*")``. Their matrices stay floats in a model with a format.
        optimizer: an optax transformation that needs no more than gradients and parameters, such as
            ``optax.adamw(1e-4)``.

    Raises:
        ValueError, TypeError: for no patterns, a string in their place, or no optax transformation.

    >>> hybrid(first_order=("head.*",), optimizer=optax.adamw(1e-4))
    hybrid(first_order=('head.*',))
    """
    if not isinstance(first_order, LastBlocks):
        if isinstance(first_order, str) or not all(isinstance(pattern, str) for pattern in first_order):
            raise ValueError(f"first_order is {first_order!r}, expected zo2jax.last_blocks(n) or a tuple of patterns")
        first_order = tuple(first_order)
        if not first_order:
            raise ValueError("first_order is (), expected zo2jax.last_blocks(n) or patterns of leaves")
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer is {optimizer!r}, expected an optax transformation such as optax.adamw(1e-4)")
    return Hybrid(first_order, optimizer)


class FirstOrder(NamedTuple):
    """First-order leaves and the state of their optimizer.

    >>> FirstOrder._fields
    ('leaves', 'opt_state')
    """

    leaves: Params
    """float32, by block."""
    opt_state: Any


@dataclass(frozen=True)
class Split:
    """A model and an estimator, of which some leaves are first-order; made by `split`.

    >>> Split.__dataclass_fields__.keys() == {"model", "estimator", "hybrid", "shapes", "blocks"}
    True
    """

    model: Model
    """Whose first-order matrices are floats, whatever the format."""
    estimator: Estimator
    """Whose direction leaves the first-order leaves alone."""
    hybrid: Hybrid
    shapes: Params
    """Of the first-order leaves, float32, by block."""
    blocks: tuple[str, ...]
    """The tail."""

    @property
    def names(self) -> tuple[str, ...]:
        """Dotted, of the first-order leaves."""
        return tuple(f"{block}.{name}" for block, leaves in self.shapes.items() for name in flat(leaves))

    def resident(self, plan: Plan | None) -> Plan | None:
        """A plan in which the tail lives on the device."""
        return plan and replace(plan, tiers=dict(plan.tiers) | dict.fromkeys(self.blocks, "device"))


class Learner:
    """The first-order leaves of a run: shapes alone, until somebody gives it its `state`.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> from zo2jax.estimators import two_point
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> how = hybrid(first_order=("head.norm.*",), optimizer=optax.sgd(0.1))
    >>> learner = Learner(split(config.init(jax.random.key(0)), two_point(1e-3), how))
    >>> learner.state.leaves["head"]["norm"]["weight"].shape
    (8,)
    """

    def __init__(self, split: Split):
        """Begins nothing."""
        self.split, self._optimizer = split, split.hybrid.optimizer
        self._tail: Tail | None = None
        self.state: FirstOrder = jax.eval_shape(self._begun, split.shapes)
        if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(self.state)):
            raise ValueError(
                "the state of the optimizer of a hybrid run has a typed random key, which checkpoints cannot hold: "
                "expected one without random numbers"
            )

    def read(self, source: Mapping[str, Params]) -> None:
        """Begins with the leaves of a model."""
        leaves: Params = {}
        for block, shapes in self.split.shapes.items():
            named = flat(source[block])
            for name in flat(shapes):
                set_leaf(leaves.setdefault(block, {}), name, jnp.array(named[name], jnp.float32))
        self.state = jax.tree.map(jnp.copy, self._begun(leaves))  # some optimizers keep the leaves themselves

    def begin(self) -> Tail:
        """The tail of a step's sweep."""
        self._tail = Tail(self.state.leaves, self.split.blocks)
        return self._tail

    def conclude(self, counts: jax.Array, skipped: jax.Array) -> Params:
        """The leaves after the step, or as they were if it is skipped; those before it are used up.

        Args:
            counts: of the members, float32 [M].
            skipped: bool [].
        """
        assert self._tail is not None, "a step's sweep was begun"
        self.state = _moved(self._optimizer, self.state, self._tail.gradient, counts, skipped)
        self._tail = None
        return self.state.leaves

    def _begun(self, leaves: Params) -> FirstOrder:
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            return FirstOrder(leaves, self._optimizer.init(leaves))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
@jax.named_scope("update")
def _moved(
    optimizer: optax.GradientTransformation, old: FirstOrder, gradient: Params, counts: jax.Array, skipped: jax.Array
) -> FirstOrder:
    count = jnp.sum(counts)
    mean = jax.tree.map(lambda g: g / jnp.where(count > 0, count, 1), gradient)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        updates, opt_state = optimizer.update(mean, old.opt_state, old.leaves)
        new = FirstOrder(optax.apply_updates(old.leaves, updates), opt_state)
    return jax.tree.map(lambda x, y: jnp.where(skipped, x, y), old, new)


@jax.jit
def only_finite(sums: tuple[jax.Array, jax.Array], gradient: Params) -> tuple[jax.Array, jax.Array]:
    """(loss sums, counts) of a step; losses are NaN where the gradient is not finite, so that nothing moves by it.

    >>> only_finite((jnp.ones(2), jnp.ones(2)), {"w": jnp.array([jnp.inf])})[0].tolist()
    [nan, nan]
    """
    finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)]).all()
    return jnp.where(finite, sums[0], jnp.nan), sums[1]


def split(model: Model, estimator: Estimator, hybrid: Hybrid) -> Split:
    """What a hybrid run trains by zeroth order, and what by backpropagation.

    Raises:
        ValueError: for patterns that name no leaf, leaves that other blocks share, too many blocks; if no leaf before
            the tail is left to zeroth-order steps; for what cannot be backpropagated through.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> from zo2jax.estimators import two_point
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> how = hybrid(first_order=("head.*",), optimizer=optax.sgd(0.1))
    >>> made = split(config.init(jax.random.key(0)), two_point(1e-3), how)
    >>> made.blocks, made.estimator.direction.targets
    (('head',), ('embed.*', 'layers.0.attn.*', 'layers.0.mlp.*'))
    """
    direction, leaves = estimator.direction, _leaves(model.blocks)
    if direction.refresh is not None and not direction.rank:
        raise ValueError(f"the direction is {direction}, in a hybrid run: expected one without a refresh, or lowrank")
    if estimator.full is not None:
        raise ValueError(f"the estimator is {estimator}, in a hybrid run: expected one without an anchor")
    chosen, order = _chosen(model.blocks, leaves, hybrid.first_order), [block.name for block in model.blocks]
    shapes: Params = {}
    for leaf in chosen:
        set_leaf(shapes.setdefault(leaf.block, {}), leaf.name, jax.ShapeDtypeStruct(leaf.shape.shape, jnp.float32))
    tail = order[min(map(order.index, shapes)) :]
    others = [x for x in leaves if x not in chosen and is_trained(x.shape) and direction.trains(x.path, x.shape.ndim)]
    if all(leaf.block in tail for leaf in others):
        raise ValueError(
            f"first_order={hybrid.first_order} begins at block {tail[0]}, and before it {direction} trains nothing: "
            "expected a leaf there for zeroth-order steps"
        )
    zeroth = replace(estimator, direction=replace(direction, targets=_targets(leaves, others, direction)))
    return Split(_with_floats(model, leaves, chosen, tail), zeroth, hybrid, shapes, tuple(tail))


class _Leaf(NamedTuple):
    block: str
    name: str
    """In the block."""
    path: str
    """The dotted name, by which directions know it."""
    shape: Any

    @property
    def full(self) -> str:
        return f"{self.block}.{self.name}"


def _leaves(blocks: Sequence[Block]) -> list[_Leaf]:
    """All leaves, each where it is owned."""
    found = []
    for block, leaves in owned_shapes(blocks).items():
        paths = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path({block: leaves})]
        found += [_Leaf(block, name, path, x) for path, (name, x) in zip(paths, flat(leaves).items(), strict=True)]
    return found


def _chosen(blocks: Sequence[Block], leaves: list[_Leaf], first_order: LastBlocks | tuple[str, ...]) -> list[_Leaf]:
    """The first-order leaves."""
    if isinstance(first_order, LastBlocks):
        last = [block.name for block in blocks[-first_order.count :]]
        found = [leaf for leaf in leaves if leaf.block in last]
    else:
        found = [leaf for leaf in leaves if any(fnmatchcase(leaf.path, pattern) for pattern in first_order)]
        known = ", ".join(leaf.path for leaf in leaves[-9:])
        if unknown := [x for x in first_order if not any(fnmatchcase(leaf.path, x) for leaf in leaves)]:
            raise ValueError(f"first_order {unknown} name no leaf that a block owns, such as {known}")
    found = [leaf for leaf in found if is_trained(leaf.shape)]
    if not found:
        raise ValueError(f"first_order={first_order}: these blocks own no leaf that can be trained")
    owners = {owner for block in blocks for owner in block.aliases.values()}
    if shared := [leaf.path for leaf in found if leaf.full in owners]:
        raise ValueError(f"first_order names {', '.join(shared)}, which another block shares: it is zeroth-order")
    return found


def _targets(leaves: list[_Leaf], trained: list[_Leaf], direction: Direction) -> tuple[str, ...]:
    """Patterns of the leaves that a direction trains: of whole blocks where that says it, or of each leaf."""
    found: list[str] = []
    for block in dict.fromkeys(leaf.block for leaf in trained):
        own, whole = [x for x in leaves if x.block == block], f"{glob.escape(block)}.*"
        mine = [x for x in trained if x.block == block]
        possible = [x for x in own if is_trained(x.shape) and direction.everywhere.trains(x.path, x.shape.ndim)]
        same = len(mine) == len(possible) and all(fnmatchcase(x.path, whole) for x in mine)
        found += [whole] if same else [glob.escape(x.path) for x in mine]
    return tuple(found)


def _with_floats(model: Model, leaves: list[_Leaf], chosen: list[_Leaf], tail: list[str]) -> Model:
    """The model, whose first-order matrices are floats, whatever its format."""
    if model.format is None:
        return model
    coded = [x for x in leaves if model.format.group_of(x.full, x.shape.shape) is not None]
    floats = [x.full for x in chosen if x in coded]
    model = model.with_format(model.format.keeping(floats)) if floats else model
    assert model.format is not None
    owners = {owner for block in model.blocks if block.name in tail for owner in block.aliases.values()}
    used = [x.path for x in coded if x not in chosen and (x.block in tail or x.full in owners)]
    if used and model.format.compute == "int8":
        raise ValueError(
            f"the format is {model.format}, and {used[0]} is used in the tail: activations that become int8 codes have "
            "no derivative, expected another compute, or keep= with this leaf"
        )
    return model
