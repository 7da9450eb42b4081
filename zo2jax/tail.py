"""The last blocks of a hybrid run in one training sweep: losses, and the gradient of some of their leaves."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from zo2jax import visits
from zo2jax.models.blocks import Params
from zo2jax.models.layers import Batch
from zo2jax.visits import Stage


class Tail:
    """The blocks from the first one with a first-order leaf on, which are backpropagated through.

    Of one step: to ``gradient`` is added what each batch and each part of the population finds.

    Args:
        leaves: the first-order leaves, float32, by block.
        blocks: names of the tail's, in order.

    >>> Tail({"head": {}}, ("layers.1.mlp", "head")).begins({"embed": 0, "layers.1.mlp": 1, "head": 2})
    1
    """

    def __init__(self, leaves: Mapping[str, Params], blocks: tuple[str, ...]):
        """Knows no gradient yet."""
        self._leaves, self._names = leaves, blocks
        self._gradient: tuple[Params, ...] | None = None

    def begins(self, numbers: Mapping[str, int]) -> int:
        """The number of its first block, among those that all blocks have by name, in order."""
        return numbers[self._names[0]]

    @property
    def gradient(self) -> Params:
        """Of the sum of all losses so far, float32, like the leaves."""
        assert self._gradient is not None, "a gradient is known after a visit"
        found = dict(zip(self._names, self._gradient, strict=True))
        return {name: found[name] for name in self._leaves}

    def compile(self, stages: Sequence[Stage], held: Any, probes: Any, carry: Any, batch: Batch, how: Any) -> Any:
        """Compiles a visit; ``held`` lacks the pages of each block, and ``carry`` has shapes alone.

        Raises:
            ValueError: for a batch without targets.
        """
        pages = [tuple(jax.ShapeDtypeStruct((n,), dtype) for dtype, n in stage.layout.pages) for stage in stages]
        whole = [(mine, *others) for mine, others in zip(pages, held, strict=True)]
        own = self._own()
        return visits.backpropagate.lower(tuple(stages), whole, own, probes, carry, batch, own, **how).compile()

    def visit(self, stages: Sequence[Stage], held: Any, probes: Any, carry: Any, batch: Batch, how: Any) -> Any:
        """The members' (loss sums, counts), float32 [M] both; see `zo2jax.visits.backpropagate`."""
        own = self._own()
        before = _zeros(own) if self._gradient is None else self._gradient
        given = tuple(stages), held, own, probes, carry, batch, before
        sums, self._gradient = visits.backpropagate(*given, **how)
        return sums

    def _own(self) -> tuple[Params, ...]:
        return tuple(self._leaves.get(name, {}) for name in self._names)


@jax.jit
def _zeros(leaves: tuple[Params, ...]) -> tuple[Params, ...]:
    return jax.tree.map(jnp.zeros_like, leaves)
