"""Prefix tuning: learned keys and values before a row's own, in each attention block, begun from real tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zo2jax.models.blocks import Params, Source, Stream, visits
from zo2jax.models.model import Model


class Prefix(nnx.Module):
    """Keys and values of n tokens: float32 [n * heads * size] each, small leaves that stay on the device.

    >>> [x.shape for x in Prefix(5, 2, 8)()]
    [(5, 2, 8), (5, 2, 8)]
    """

    def __init__(self, tokens: int, heads: int, size: int):
        """All of zeros."""
        self.shape = tokens, heads, size
        self.k, self.v = (nnx.Param(jnp.zeros(math.prod(self.shape), jnp.float32)) for _ in "kv")

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """(keys, values), float32 [n, heads, size] both."""
        return self.k[...].reshape(self.shape), self.v[...].reshape(self.shape)


def with_prefix(model: Model, tokens: int | Sequence[int] = 5, *, key: jax.Array | None = None) -> Model:
    """The same model with n learned keys and values before those of a row's own tokens, in each attention block.

    Attention is softmax(q [K_prefix; K]^T / sqrt(size)) [V_prefix; V] (prefix tuning, Li and Liang, arXiv 2101.00190,
    section 4.2, without its reparametrization). The leaves are ``layers.*.attn.prefix.k`` and ``.v``, float32
    [n * kv_heads * head_size], which `zo2jax.Run` trains alone with ``direction=zo.dense(targets=("*.prefix.*",))``,
    whatever the format of the matrices. They begin with the keys and values that the model has for n real tokens at
    positions 0 to n - 1 (MeZO, arXiv 2305.17333, appendix E: this matters); rows begin at position n, as PEFT has it,
    so that there is room for n tokens less. So an untrained prefix changes as much as these tokens before each row.

    The tokens are read when the prefix is first asked for, one block at a time, whatever the size of the model; by its
    matrices as they are, where a run will keep them as codes.

    Args:
        model: from `zo2jax.load`, or any other that has a configuration.
        tokens: the ids of the n tokens; or n, for ids that are drawn.
        key: typed, that they are drawn with.

    Raises:
        ValueError: for a model of `zo2jax.blocks`, or one that has a prefix; for ids that the vocabulary lacks, none,
            or too many; for a number without a key.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> model = config.init(jax.random.key(0))
    >>> longer = with_prefix(model, [1, 2])
    >>> longer.params["layers.0.attn"]["prefix"]["k"].shape
    (8,)
    >>> whole = model.logits(jnp.array([[1, 2, 3, 4, 5]]))[:, 2:]
    >>> bool(jnp.allclose(longer.logits(jnp.array([[3, 4, 5]])), whole, atol=1e-6))
    True
    """
    if isinstance(tokens, int):
        if key is None:
            raise ValueError(f"tokens is {tokens} without a key: expected key=jax.random.key(seed), or the tokens' ids")
        return prefixed(model, tokens, lambda: _drawn(model, tokens, key))
    ids = [int(token) for token in tokens]
    if model.config is not None and not all(0 <= token < model.config.vocabulary for token in ids):
        raise ValueError(f"tokens are {ids}, expected ids from 0 to {model.config.vocabulary - 1}")
    return prefixed(model, len(ids), lambda: ids)


def _drawn(model: Model, count: int, key: jax.Array) -> list[int]:
    return jax.random.randint(key, (count,), 0, model.config.vocabulary).tolist()


def prefixed(model: Model, count: int, ids: Callable[[], Sequence[int]]) -> Model:
    """`with_prefix`, of so many tokens, whose ids are asked for when the prefix is read.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> prefixed(config.init(jax.random.key(0)), 3, lambda: [1, 2, 3]).config.context
    13
    """
    config = model.config
    if config is None:
        raise ValueError(
            "a model of zo2jax.blocks has no attention blocks that take a prefix: expected one of zo2jax.load"
        )
    if config.prefix:
        raise ValueError(f"the model has a prefix of {config.prefix} tokens: expected one without")
    if not 0 < count < config.context:
        raise ValueError(f"a prefix of {count} tokens: expected 1 to {config.context - 1}, of the model's context")
    config = replace(config, prefix=count, context=config.context - count)
    blocks = tuple(
        replace(old, structure=new.structure, shapes=new.shapes)
        for old, new in zip(model.blocks, config.blocks(model.dtype), strict=True)
    )
    found = _Found(model, ids)
    more = {block.name: partial(found, block.name) for block in blocks if block.caches}
    return replace(model, config=config, blocks=blocks, source=Source.of(model.source).having(more))


class _Found:
    """The leaves of a model's prefix, all of them made when one is asked for, from one sweep over the blocks."""

    def __init__(self, model: Model, ids: Callable[[], Sequence[int]]):
        """Reads nothing."""
        self._model, self._ids = model, ids
        self._lock = Lock()  # several blocks may be read at once
        self._leaves: dict[str, Params] = {}

    def __call__(self, block: str) -> Params:
        """Those of one block."""
        with self._lock:
            if not self._leaves:
                self._leaves = keys_and_values(self._model, self._ids())
        return self._leaves[block]


def keys_and_values(model: Model, ids: Sequence[int]) -> dict[str, Params]:
    """What attention blocks keep of tokens at positions 0 and on: {block: {"prefix.k": .., "prefix.v": ..}}, NumPy.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> keys_and_values(config.init(jax.random.key(0)), [1, 2, 3])["layers.0.attn"]["prefix.v"].shape
    (12,)
    """
    source, found, carry = model.source, {}, None
    visit = source.visits(model.blocks) if isinstance(source, Stream) else visits(model.blocks, source)
    batch = {"ids": jnp.asarray([ids], jnp.int32)}
    for block in model.blocks[:-1]:
        carry, kept = visit(block, carry, batch, {} if block.caches else None)
        if kept is not None:
            found[block.name] = {f"prefix.{x}": np.asarray(kept[x], np.float32).reshape(-1) for x in "kv"}
    return found
