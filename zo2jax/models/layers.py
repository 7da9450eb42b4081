"""Layers shared by the models. Matrices are kept (n_out, n_in), as in Hugging Face files, and used as x W^T."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from zo2jax.models.traced import backend, fused_attention, is_traced

Batch = Mapping[str, jax.Array]
Cache = dict[str, jax.Array]


@runtime_checkable
class Weight(Protocol):
    """A matrix [n_out, n_in] that is not there as an array: a probe that is made while it is used, say.

    It stands in the place of an array among a block's leaves; `linear`, `lookup` and `vocabulary_losses` take either.

    >>> isinstance(jnp.ones((2, 2)), Weight)
    False
    """

    shape: tuple[int, ...]
    dtype: Any

    def __getitem__(self, key: Any) -> "Weight":
        """Itself; what a Flax variable is asked for."""

    def product(self, x: jax.Array, dtype: Any) -> jax.Array:
        """X [..., n_in] -> x W^T [..., n_out] in ``dtype``, accumulated in float32."""

    def rows(self, ids: jax.Array) -> jax.Array:
        """The rows of these indices, [*ids.shape, n_in]."""

    def slabs(self, x: jax.Array) -> Callable[[jax.Array, int], "Weight"]:
        """A function that gives ``count`` rows from ``start``, which may be traced, as a matrix to multiply x by."""


def product(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """x W^T for an array: x [..., n_in], weight [n_out, n_in] -> [..., n_out] in ``dtype``, accumulated in float32.

    Float32 operands are multiplied in full float32 on every device (no TF32): the two losses of a
    zeroth-order step differ by less than TF32 resolves.

    >>> product(jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.float32).shape
    (2, 4)
    """
    y = lax.dot_general(
        x,
        weight.astype(x.dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype if dtype == x.dtype else jnp.float32,  # sums are float32 all the same
    )
    return y.astype(dtype)


def linear(
    x: jax.Array, weight: jax.Array | Weight, bias: jax.Array | None = None, *, dtype: jnp.dtype | None = None
) -> jax.Array:
    """x W^T + b, accumulated in float32: x [..., n_in], weight [n_out, n_in] -> [..., n_out] in ``dtype`` or x's.

    With 16-bit results the product is rounded before the bias is added, so that it takes half the memory.

    >>> linear(jnp.ones((2, 3)), jnp.ones((4, 3))).tolist()[0]
    [3.0, 3.0, 3.0, 3.0]
    """
    dtype = dtype or x.dtype
    y = product(x, weight, dtype) if isinstance(weight, jax.Array) else weight.product(x, dtype)
    return y if bias is None else (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(dtype)


def lookup(weight: jax.Array | Weight, ids: jax.Array) -> jax.Array:
    """Rows of a matrix [n, size] as float32 [*ids.shape, size].

    >>> lookup(jnp.eye(3), jnp.array([[2, 0]])).tolist()
    [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    """
    return (weight[ids] if isinstance(weight, jax.Array) else weight.rows(ids)).astype(jnp.float32)


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of products with a matrix of ``dtype``: its own on accelerators, float32 on CPUs.

    CPUs gain no speed from 16-bit products, and float32 activations make the difference of two losses exacter.

    >>> compute_dtype(jnp.dtype("float32"))
    dtype('float32')
    """
    return jnp.dtype(jnp.float32) if backend() == "cpu" else jnp.dtype(dtype)


class Linear(nnx.Module):
    """A matrix ``weight`` [n_out, n_in] and, if asked for, a ``bias`` [n_out] (float32)."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Draws the matrix from N(0, 0.02^2); the bias is zero."""
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (n_out, n_in)).astype(dtype))
        self.bias = nnx.Param(jnp.zeros(n_out, jnp.float32)) if bias else None

    def __call__(self, x: jax.Array, *, dtype: jnp.dtype | None = None) -> jax.Array:
        """X [..., n_in] -> [..., n_out], in ``dtype`` or that of the product (`compute_dtype`)."""
        weight, bias = self.weight[...], None if self.bias is None else self.bias[...]
        return linear(x.astype(compute_dtype(weight.dtype)), weight, bias, dtype=dtype)


class Embed(nnx.Module):
    """Token embedding: the rows of ``weight`` [vocabulary, size]."""

    def __init__(self, vocabulary: int, size: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Draws from N(0, 0.02^2)."""
        self.weight = Linear(size, vocabulary, bias=False, dtype=dtype, rngs=rngs).weight

    def __call__(self, carry: None, batch: Batch) -> jax.Array:
        """Ids [b, t] -> float32 [b, t, size]: the residual stream, which 16-bit matrices read and add to.

        In 16 bits its rounding would drown the difference of two losses.
        """
        return lookup(self.weight[...], batch["ids"])


class PositionEmbed(nnx.Module):
    """Token embedding ``weight`` [vocabulary, token_size] plus learned ``positions`` [context + offset, size].

    Where the widths differ, tokens are projected to ``size`` first. The first ``offset`` positions are never used.
    """

    def __init__(
        self, tokens: tuple[int, int], positions: tuple[int, int], dtype: jnp.dtype, rngs: nnx.Rngs, *, offset: int = 0
    ):
        """Draws from N(0, 0.02^2); ``tokens`` and ``positions`` are (rows, width)."""
        self.offset, (count, width), (context, size) = offset, tokens, positions
        make = partial(Linear, bias=False, dtype=dtype, rngs=rngs)
        self.weight, self.positions = make(width, count).weight, make(size, context + offset).weight
        self.project = make(width, size) if width != size else None

    def __call__(self, carry: None, batch: Batch) -> jax.Array:
        """Ids [b, t] -> float32 [b, t, size]."""
        x = lookup(self.weight[...], batch["ids"])
        x = x if self.project is None else self.project(x, dtype=x.dtype)
        return x + lookup(self.positions[...], positions_of(batch) + self.offset)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang and Sennrich, arXiv 1910.07467, equation 4)."""

    def __init__(self, size: int, eps: float):
        """A weight of ones, float32 [size]."""
        self.weight = nnx.Param(jnp.ones(size, jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [..., size] -> the same shape and dtype."""
        x32 = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale * self.weight[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32 (arXiv 1607.06450, equation 4)."""

    def __init__(self, size: int, eps: float = 1e-5, *, affine: bool = True):
        """A weight of ones and a bias of zeros, float32 [size]; neither if not ``affine``."""
        self.weight = nnx.Param(jnp.ones(size, jnp.float32)) if affine else None
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32)) if affine else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [..., size] -> the same shape and dtype."""
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = centred * lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight[...] + self.bias[...]
        return y.astype(x.dtype)


def positions_of(batch: Batch, first: int = 0) -> jax.Array:
    """The position of every token of ``ids`` [b, t] in its row: int32 [b, t], or [1, t] if all rows begin alike.

    Rows begin at ``first``. Those that go on where a cache ends say so by ``start`` int32 [b], how many of their tokens
    came before.

    >>> positions_of({"ids": jnp.zeros((2, 3)), "start": jnp.array([0, 5])}).tolist()
    [[0, 1, 2], [5, 6, 7]]
    """
    offsets = jnp.arange(first, first + batch["ids"].shape[1], dtype=jnp.int32)[None, :]
    return batch["start"][:, None] + offsets if "start" in batch else offsets


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotary position embedding (RoFormer, arXiv 2104.09864, equation 34), halves paired as in Hugging Face.

    x [batch, time, heads, size], positions [batch or 1, time], frequencies float32 [size / 2] in radians a position.

    >>> x = jnp.ones((1, 2, 1, 4))
    >>> bool((rotate(x, jnp.arange(2)[None], jnp.ones(2))[0, 0] == x[0, 0]).all())
    True
    """
    angle = positions.astype(jnp.float32)[:, :, None] * frequencies
    cos, sin = jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def cudnn_applies(dtype: jnp.dtype, head_size: int) -> bool:
    """Whether cuDNN's fused attention takes this dtype and head size on the default device.

    It takes bfloat16 and float16, head sizes that are multiples of 8 up to 128 (256 on Hopper), from compute
    capability 8.0 on.

    >>> cudnn_applies(jnp.float32, 64)
    False
    """
    if backend() != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    capability = 9.0 if jax.default_backend() != "gpu" else float(jax.devices()[0].compute_capability)
    return capability >= 8.0 and head_size % 8 == 0 and head_size <= (256 if 9.0 <= capability < 10.0 else 128)


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array | None, implementation: str | None = None
) -> jax.Array:
    """Causal attention, softmax(q k^T / sqrt(size)) v: q [b, t, heads, size], k and v [b, t, kv_heads, size].

    ``lengths`` int32 [b] counts the real tokens of right-padded rows; outputs beyond them are unspecified.
    ``implementation`` None takes "cudnn" where it applies, else "xla".

    Raises:
        NotImplementedError: if "cudnn" is asked for by name where it does not apply.

    >>> q = jnp.ones((1, 3, 2, 8))
    >>> attention(q, q, q, None).shape
    (1, 3, 2, 8)
    """
    applies = cudnn_applies(query.dtype, query.shape[-1])
    if implementation == "cudnn" and not applies:
        raise NotImplementedError(
            f"cuDNN attention does not take {query.dtype} with head size {query.shape[-1]} on {jax.default_backend()}"
        )
    fused = implementation == "cudnn" or (implementation is None and applies)
    # Causal rows that are padded on the right never see their padding: lengths save work in cuDNN and change nothing.
    lengths = lengths if fused else None
    dtype = query.dtype
    key, value = key.astype(dtype), value.astype(dtype)  # of probes in another dtype than what stays beside them
    if fused and is_traced():
        return cast(jax.Array, fused_attention.bind(query, key, value))
    if dtype == jnp.float16 and jax.default_backend() == "cpu":  # XLA on the CPU lacks the product that JAX asks for
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn" if fused else "xla",
        ).astype(dtype)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    batch: Batch,
    cache: Cache | None,
    prefix: Callable[[], tuple[jax.Array, jax.Array]] | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Causal attention of new tokens to themselves and to those in a cache: (result, the cache with the new tokens).

    ``cache`` None: none is kept. Empty: rows begin here, and what comes back holds their keys and values. Otherwise
    ``k`` and ``v`` [b, capacity, kv_heads, size]: the new tokens are written at positions ``start`` and on.
    ``prefix`` gives keys and values [n, kv_heads, size] that stand before all tokens, in caches too.

    >>> q = jnp.ones((1, 3, 2, 8))
    >>> attend(q, q, q, {"ids": jnp.zeros((1, 3))}, {})[1]["k"].shape
    (1, 3, 2, 8)
    """
    before = () if prefix is None else prefix()
    count = len(before[0]) if before else 0
    if not cache:
        lengths = batch.get("lengths")
        if before:  # as many queries of zeros, whose results are dropped: attention is between rows of one length
            key, value = (
                jnp.concatenate([jnp.broadcast_to(x.astype(y.dtype), (len(y), *x.shape)), y], axis=1)
                for x, y in zip(before, (key, value), strict=True)
            )
            query = jnp.pad(query, ((0, 0), (count, 0), (0, 0), (0, 0)))
            lengths = None if lengths is None else lengths + count
        new = None if cache is None else {"k": key, "v": value}
        mixed = attention(query, key, value, lengths)
        return (mixed[:, count:] if before else mixed), new
    at = positions_of(batch, count)
    rows = jnp.arange(len(query))[:, None]
    new = {"k": key, "v": value}
    cache = {name: kept.at[rows, at].set(new[name].astype(kept.dtype)) for name, kept in cache.items()}
    known = jnp.arange(cache["k"].shape[1], dtype=jnp.int32) <= at[:, None, :, None]
    dtype = compute_dtype(query.dtype)
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        mixed = jax.nn.dot_product_attention(
            query.astype(dtype), cache["k"].astype(dtype), cache["v"].astype(dtype), mask=known, implementation="xla"
        )
    return mixed.astype(query.dtype), cache


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted losses in nats, sum of weights): logits float32 [..., vocabulary], targets int32 [...].

    loss = logsumexp(logits) - logits[target]; both results are float32 scalars.

    >>> total, count = cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 1]), jnp.ones(2))
    >>> round(float(total / count), 4)
    1.3863
    """
    return weighted(token_losses(logits, targets), weights)


def weighted(losses: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted losses, sum of weights); what has no weight is left out, whatever it is.

    >>> [float(x) for x in weighted(jnp.array([2.0, jnp.nan]), jnp.array([0.5, 0.0]))]
    [1.0, 0.5]
    """
    weights = weights.astype(jnp.float32)
    return jnp.sum(jnp.where(weights != 0, losses * weights, 0.0)), jnp.sum(weights)


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], in nats: logits float32 [..., n], targets int32 [...] -> float32 [...].

    >>> round(float(token_losses(jnp.zeros((1, 4)), jnp.array([3]))[0]), 4)
    1.3863
    """
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


_SLAB_LOGITS = 1 << 22
_SLAB_ROWS = (512, 8192)


def vocabulary_losses(
    x: jax.Array, weight: jax.Array | Weight, bias: jax.Array | None, targets: jax.Array
) -> jax.Array:
    """-log softmax(x W^T + b)[target], in nats, float32 of the targets' shape; the logits never exist as a whole.

    They are made slab by slab, so many rows of W at once, beside a running maximum and a running sum of exponentials
    (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3).

    Args:
        x: [..., size], in the dtype of the product.
        weight: [vocabulary, size].
        bias: [vocabulary], or None.
        targets: int32 [...].

    >>> x, w = jnp.ones((1, 2)), jnp.array([[1.0, 0.0], [0.0, 0.0], [2.0, 1.0]])
    >>> round(float(vocabulary_losses(x, w, None, jnp.array([2]))[0]), 4)
    0.1698
    """
    rows = weight.shape[0]
    fewest, most = _SLAB_ROWS
    State = tuple[jax.Array, jax.Array, jax.Array]
    count = min(rows, max(fewest, min(most, _SLAB_LOGITS // max(1, targets.size) // fewest * fewest)))

    cut: Callable[[Any, int], Any] = (
        partial(lax.dynamic_slice_in_dim, weight) if isinstance(weight, jax.Array) else weight.slabs(x)
    )

    def logits_of(start: Any, count: int) -> jax.Array:
        part = None if bias is None else lax.dynamic_slice_in_dim(bias, start, count)
        return linear(x, cut(start, count), part, dtype=jnp.float32)

    @partial(jax.checkpoint, static_argnums=2)  # a derivative makes the logits anew, slab by slab
    def further(state: State, start: Any, count: int) -> State:
        highest, total, picked = state
        logits = logits_of(start, count)
        new = jnp.maximum(highest, jnp.max(logits, axis=-1))
        total = total * jnp.exp(highest - new) + jnp.sum(jnp.exp(logits - new[..., None]), axis=-1)
        at = targets - start
        here = jnp.take_along_axis(logits, jnp.clip(at, 0, count - 1)[..., None], axis=-1)[..., 0]
        return new, total, jnp.where((at >= 0) & (at < count), here, picked)

    lowest = jnp.full(targets.shape, -1e30, jnp.float32)  # finite: no difference is inf - inf
    state = (lowest, jnp.zeros_like(lowest), jnp.zeros_like(lowest))
    whole = rows // count
    state, _ = lax.scan(lambda s, i: (further(s, i * count, count), None), state, jnp.arange(whole, dtype=jnp.int32))
    if rest := rows - whole * count:
        state = further(state, jnp.int32(whole * count), rest)
    highest, total, picked = state
    return highest + jnp.log(total) - picked


def realign(ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves padding to the right: (ids [batch, time], lengths int32 [batch]) from ids and a 0/1 attention mask.

    The order of the real tokens is kept; the mask may be left-padded (as tokenizers make for generation) or
    have holes.

    >>> ids, lengths = realign(jnp.array([[0, 0, 5, 6]]), jnp.array([[0, 0, 1, 1]]))
    >>> ids.tolist(), lengths.tolist()
    ([[5, 6, 0, 0]], [2])
    """
    real = jnp.asarray(mask).astype(bool)
    order = jnp.argsort(~real, axis=1, stable=True)
    return jnp.take_along_axis(ids, order, axis=1), jnp.sum(real, axis=1, dtype=jnp.int32)
