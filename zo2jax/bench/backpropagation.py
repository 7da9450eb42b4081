"""Steps by backpropagation, to compare with: block by block, each block's activations made again on the way back.

That is what ``jax.checkpoint`` around each block computes, in programs that are compiled once for each kind of block. A
block moves as soon as its gradient is there, so that there are never gradients of more than one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zo2jax.directions import Direction
from zo2jax.models.blocks import Block, Kind, Params, kinds, set_leaf
from zo2jax.models.layers import product
from zo2jax.models.model import Model
from zo2jax.pages import flat


class Learner(Protocol):
    """What trains, and how it moves.

    >>> Whole.__mro__[1] is object
    True
    """

    first: str
    """The first block in which something trains."""

    def leaves(self, block: str) -> tuple[Any, Params]:
        """(What trains of a block, what stays): pytrees of arrays on the device."""

    def merged(self, trained: Any, stays: Params) -> Params:
        """The leaves of a block of the two; a pure function, always the same object."""

    def take(self, block: str, gradient: Any) -> None:
        """Moves what trains of a block."""


@partial(jax.jit, static_argnums=(0, 1))
def _forward(kind: Kind, merged: Callable[..., Params], trained: Any, stays: Params, carry: Any, batch: Any) -> Any:
    out = kind.block.apply(merged(trained, stays), carry, batch)
    return out[0] / out[1] if isinstance(out, tuple) else out


@partial(jax.jit, static_argnums=(0, 1))
def _pulled_back(
    kind: Kind, merged: Callable[..., Params], trained: Any, stays: Params, carry: Any, batch: Any, given: Any
) -> tuple[Any, Any]:
    """(gradient of what trains, of the carry): the block is computed again."""
    _, pull = jax.vjp(lambda trained, carry: _forward(kind, merged, trained, stays, carry, batch), trained, carry)
    return pull(given)


def backpropagate(blocks: Sequence[Block], learner: Learner, batch: Any) -> jax.Array:
    """One step: the mean loss, float32 []; what trains has been moved by its gradient.

    Raises:
        ValueError: for blocks that share leaves.

    >>> from zo2jax.bench.shapes import Work, random_model
    >>> model = random_model("opt-tiny", 1)
    >>> batch, learner = Work(tokens=8).batch(256), Whole(model, optax.adam(1e-3))
    >>> float(backpropagate(model.blocks, learner, batch)) > float(backpropagate(model.blocks, learner, batch))
    True
    """
    if tied := [block.name for block in blocks if block.aliases]:
        raise ValueError(f"{', '.join(tied)} shares leaves with another block: expected a model without, as an OPT's")
    own, merged = kinds(blocks), learner.merged
    carries: list[Any] = [None]
    for block, kind in zip(blocks, own, strict=True):
        carries.append(_forward(kind, merged, *learner.leaves(block.name), carries[-1], batch))
    loss = carries.pop()
    given = jnp.ones((), jnp.float32)
    for block, kind in zip(reversed(blocks), reversed(own), strict=True):
        gradient, given = _pulled_back(kind, merged, *learner.leaves(block.name), carries.pop(), batch, given)
        learner.take(block.name, gradient)
        if block.name == learner.first:
            break
    return loss


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _moved(optimizer: optax.GradientTransformation, old: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
    """(what trains, the optimizer's state) after a step in float32, rounded once to the dtypes that it had."""
    wide, slope = _float32(old), _float32(gradient)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        change, state = optimizer.update(slope, state, wide)
        wide = optax.apply_updates(wide, change)
    return jax.tree.map(lambda new, was: new.astype(was.dtype), wide, old), state


@jax.jit
def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _begun(optimizer: optax.GradientTransformation, trained: Any) -> Any:
    """The optimizer's state, in float32, on the device."""
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        return jax.jit(lambda tree: optimizer.init(_float32(tree)))(trained)


def _first(model: Model) -> str:
    return model.blocks[0].name


class Whole:
    """All weights of a model in their own dtypes, and the optimizer's float32 state, on the device.

    >>> from zo2jax.bench.shapes import random_model
    >>> Whole(random_model("opt-tiny", 1), optax.adam(1e-3)).first
    'embed'
    """

    def __init__(self, model: Model, optimizer: optax.GradientTransformation):
        """Reads the model block by block."""
        self._optimizer, self.first = optimizer, _first(model)
        self.weights = {block.name: _on_device(model, block.name) for block in model.blocks}
        self._states = {name: _begun(optimizer, own) for name, own in self.weights.items()}

    def leaves(self, block: str) -> tuple[Any, Params]:
        """All of them train."""
        return self.weights[block], {}

    merged = staticmethod(lambda trained, stays: trained)

    def take(self, block: str, gradient: Any) -> None:
        """Moves a block."""
        moved = _moved(self._optimizer, self.weights[block], self._states[block], gradient)
        self.weights[block], self._states[block] = moved


class Offloaded:
    """The weights on the device; float32 masters and the optimizer's state in ``pinned_host`` memory.

    As in ZeRO-Offload (arXiv 2101.06840) the device holds 16-bit weights, and of one block more than these. There
    gradients go to host memory, where the CPU moves the masters. Here masters and state come to the device, a block
    at a time, are moved there, and go back: 24 bytes a weight at the rate of page-locked memory. JAX's arithmetic on
    ``pinned_host`` arrays has another form in each version, and none on CPUs. With arrays of JAX's CPU device 4 bytes
    a weight would cross the link at the rate of pageable memory, a tenth of the other, before anything is computed.

    >>> from zo2jax.bench.shapes import random_model
    >>> kept = Offloaded(random_model("opt-tiny", 1), optax.adam(1e-3)).kept["head"]
    >>> {x.sharding.memory_kind for x in jax.tree.leaves(kept)}
    {'pinned_host'}
    """

    def __init__(self, model: Model, optimizer: optax.GradientTransformation):
        """Reads the model block by block."""
        self._optimizer, self.first = optimizer, _first(model)
        device = jax.devices()[0]
        self._host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        self._device = jax.sharding.SingleDeviceSharding(device)
        self.weights: dict[str, Params] = {}
        self.kept: dict[str, Any] = {}
        """By block, (masters, state)."""
        for block in model.blocks:
            own = _on_device(model, block.name)
            masters = jax.tree.map(jnp.copy, _float32(own))
            self.kept[block.name] = self._away((masters, _begun(self._optimizer, masters)))
            self.weights[block.name] = own
            jax.block_until_ready(self.kept[block.name])
        names = [block.name for block in model.blocks]
        self._next = dict(zip(names[1:], names, strict=False))
        self._coming: dict[str, Any] = {}
        self._leaving: Any = None

    def leaves(self, block: str) -> tuple[Any, Params]:
        """All of them train."""
        return self.weights[block], {}

    merged = staticmethod(lambda trained, stays: trained)

    def take(self, block: str, gradient: Any) -> None:
        """Moves a block's masters on the device, and rounds them to its weights; the next one's come meanwhile."""
        jax.block_until_ready(self._leaving)  # Python would upload far ahead of the device
        came = self._coming.pop(block, None) or self._here(block)
        masters, state = _moved(self._optimizer, *came, gradient)
        self.weights[block] = _rounded(masters, self.weights[block])
        self.kept[block] = self._leaving = self._away((masters, state))
        if block in self._next:  # before the device is asked for that one's gradient, which transfers would wait for
            self._coming[self._next[block]] = self._here(self._next[block])

    def _here(self, block: str) -> Any:
        return jax.device_put(self.kept[block], self._device)

    def _away(self, kept: Any) -> Any:
        return jax.device_put(kept, self._host)


@partial(jax.jit, donate_argnums=1)
def _rounded(masters: Any, weights: Any) -> Any:
    return jax.tree.map(lambda new, was: new.astype(was.dtype), masters, weights)


class Adapters:
    """LoRA (arXiv 2106.09685): W + scale B A, of which float32 B [n_out, rank] and A [rank, n_in] train.

    Those of matrices that ``direction``, a `zo2jax.lora`, names; all others stay. B begins at 0.

    >>> from zo2jax.bench.shapes import random_model
    >>> from zo2jax.directions import lora
    >>> learner = Adapters(random_model("opt-tiny", 1), optax.adam(1e-3), lora(2, targets=("*.q.*",)))
    >>> learner.first, [name for name, adapter in learner.adapters.items() if adapter]
    ('layers.0.attn', ['layers.0.attn'])
    """

    def __init__(self, model: Model, optimizer: optax.GradientTransformation, direction: Direction):
        """Reads the model block by block."""
        assert direction.adapter is not None
        self._optimizer, self._weights = optimizer, {b.name: _on_device(model, b.name) for b in model.blocks}
        self.adapters: dict[str, dict[str, tuple[jax.Array, jax.Array]]] = {name: {} for name in self._weights}
        """By block and matrix, (B, A)."""
        rng = np.random.default_rng(0)
        for block, leaves in self._weights.items():
            for name, leaf in flat(leaves).items():
                if leaf.ndim == 2 and block != _first(model) and direction.trains(f"{block}.{name}"):
                    a = rng.normal(size=(direction.rank, leaf.shape[1])) / math.sqrt(3 * leaf.shape[1])
                    self.adapters[block][name] = jnp.zeros((leaf.shape[0], direction.rank)), jnp.asarray(a, jnp.float32)
        self._states = {name: _begun(optimizer, own) for name, own in self.adapters.items()}
        self.first = next(name for name, own in self.adapters.items() if own)
        self.merged = partial(_adapted, direction.adapter)

    def leaves(self, block: str) -> tuple[Any, Params]:
        """The adapters train."""
        return self.adapters[block], self._weights[block]

    def take(self, block: str, gradient: Any) -> None:
        """Moves a block's adapters."""
        moved = _moved(self._optimizer, self.adapters[block], self._states[block], gradient)
        self.adapters[block], self._states[block] = moved


def _adapted(scale: float, adapters: Mapping[str, tuple[jax.Array, jax.Array]], leaves: Params) -> Params:
    held = jax.tree.map(lambda x: x, leaves)
    for name, (b, a) in adapters.items():
        set_leaf(held, name, _Adapted(flat(leaves)[name], b, a, scale))
    return held


class _Adapted:
    """W + s B A, a `zo2jax.models.layers.Weight` that can be differentiated with respect to A and B."""

    def __init__(self, w: jax.Array, b: jax.Array, a: jax.Array, scale: float):
        self._w, self._b, self._a, self._scale = w, b, a, scale
        self.shape, self.dtype = w.shape, w.dtype

    def __getitem__(self, key: Any) -> "_Adapted":
        return self

    def product(self, x: jax.Array, dtype: Any) -> jax.Array:
        y, thin = product(x, self._w, dtype), product(x, self._a.astype(x.dtype), x.dtype)
        return (y.astype(jnp.float32) + self._scale * product(thin, self._b.astype(x.dtype), jnp.float32)).astype(dtype)


def _on_device(model: Model, block: str) -> Params:
    return jax.block_until_ready(jax.tree.map(jnp.array, model.source[block]))
