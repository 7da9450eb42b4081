"""Generation: prompts in one batch, token by token, with a cache of keys and values; greedy or sampled."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.models.blocks import Block, Visit
from zo2jax.models.layers import Batch, Cache

Choose = Callable[[jax.Array, int], jax.Array]
"""Picks tokens: (logits float32 [rows, vocabulary], how many were picked before) -> int32 [rows]."""


@jax.jit
def greedy(logits: jax.Array, step: int) -> jax.Array:
    """The most probable token of each row, int32 [rows]; the first one among equals.

    >>> greedy(jnp.array([[0.0, 2.0, 1.0]]), 0).tolist()
    [1]
    """
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sampling(key: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Choose:
    """Draws tokens from softmax(logits / temperature), cut to the most probable ones.

    Args:
        key: ``jax.random.key(seed)``; each row and each step draws from an address of its own.
        temperature: positive.
        top_k: the number of tokens that may be drawn; 0 for all.
        top_p: the fewest tokens whose probabilities add up to it may be drawn (nucleus, arXiv 1904.09751).

    Raises:
        ValueError: for values out of range.

    >>> sampling(jax.random.key(0), top_k=1)(jnp.array([[0.0, 2.0, 1.0]]), 0).tolist()
    [1]
    """
    if not (temperature > 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected a positive number, an integer of at "
            "least 0, and a number in (0, 1]"
        )

    @jax.jit
    def choose(logits: jax.Array, step: int) -> jax.Array:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, step)))(jnp.arange(len(logits)))
        kept = nucleus(logits / np.float32(temperature), top_k, top_p)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    return choose


def nucleus(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """The logits with -inf in the place of all but the ``top_k`` highest, and of what lies beyond ``top_p``.

    >>> jnp.isfinite(nucleus(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), 0, 0.6)).tolist()
    [[True, True, False]]
    """
    if 0 < top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    if top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)
    return logits


@partial(jax.jit, static_argnums=1)
def _grown(cache: Cache, tokens: int) -> Cache:
    return {name: jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, 0))) for name, x in cache.items()}


def continuations(
    visit: Visit,
    blocks: Sequence[Block],
    prompts: tuple[np.ndarray, np.ndarray],
    tokens: int,
    finished: Callable[[int, list[int]], bool],
    *,
    choose: Choose = greedy,
    cache: bool = True,
) -> list[list[int]]:
    """Up to ``tokens`` new tokens for each prompt, all rows together.

    One pass reads the prompts and fills the caches, then each pass takes one token a row through the blocks. Without
    caches every pass reads everything again: the same tokens, slower.

    Args:
        visit: carries a batch through a block; see `zo2jax.models.blocks.visits`.
        blocks: those of a language model.
        prompts: (ids int32 [rows, t], right-padded; lengths int32 [rows]).
        tokens: the most that a row is continued by.
        finished: ``(row, its new tokens) -> whether the row ends there``; called after each token.
        choose: picks the tokens: `greedy`, or `sampling`.
        cache: whether keys and values are kept.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=2, heads=2, kv_heads=1, head_size=4, context=16)
    >>> model, prompts = config.init(jax.random.key(0)), (np.array([[1, 2, 3], [4, 5, 0]]), np.array([3, 2]))
    >>> rows = continuations(model.visits(), model.blocks, prompts, 4, lambda row, written: len(written) > row)
    >>> [len(row) for row in rows]
    [1, 2]
    """
    ids, lengths = prompts
    written: list[list[int]] = [[] for _ in ids]
    live = np.ones(len(ids), bool)
    padded = np.pad(ids, ((0, 0), (0, tokens)))
    caches: list[Cache | None] = [{} if cache and block.caches else None for block in blocks]
    batch: Batch = _whole(ids if cache else padded, lengths)
    for step in range(tokens):
        carry: Any = None
        for i, block in enumerate(blocks):
            carry, caches[i] = visit(block, carry, batch, caches[i])
        chosen = np.asarray(choose(carry[:, -1], step))
        for row in np.flatnonzero(live):
            written[row].append(int(chosen[row]))
            live[row] = not finished(int(row), written[row])
        if not live.any():
            break
        if cache:
            batch = _arrays(ids=chosen[:, None], start=lengths + step)
            if step == 0:
                caches = [_grown(kept, tokens) if kept else kept for kept in caches]
        else:
            padded[np.arange(len(ids)), lengths + step] = chosen
            batch = _whole(padded, lengths + step + 1)
    return written


def _whole(ids: np.ndarray, lengths: np.ndarray) -> Batch:
    return _arrays(ids=ids, lengths=lengths, positions=lengths[:, None] - 1)


def _arrays(**batch: np.ndarray) -> Batch:
    return {name: jax.device_put(array.astype(np.int32)) for name, array in batch.items()}
