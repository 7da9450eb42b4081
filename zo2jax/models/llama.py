"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783): grouped-query attention, rotary positions, SwiGLU."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zo2jax.models.blocks import Batch, Block, Model, head_result
from zo2jax.models.layers import Linear, RMSNorm, attention, compute_dtype, linear, rotate


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling: low frequencies divided by ``factor``, a ramp between the two wavelengths.

    >>> RopeScaling(factor=8.0, low=1.0, high=4.0, original_context=8192).factor
    8.0
    """

    factor: float
    low: float
    high: float
    original_context: int


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama; the names in Hugging Face's config.json are those that `from_hub` reads.

    >>> LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16).tied
    False
    """

    vocabulary: int
    size: int
    """Width of the residual stream."""
    hidden: int
    """Width of the MLP."""
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    context: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()

    @classmethod
    def from_hub(cls, hub: dict[str, Any]) -> "LlamaConfig":
        """Reads a Hugging Face config.json (of transformers 4 or 5).

        Raises:
            ValueError: naming the missing keys, or a value that this implementation does not compute.
        """
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [k for k in needed if k not in hub]:
            raise ValueError(f"config.json lacks {', '.join(missing)}, which a Llama needs")
        if wrong := [f"{k}={hub[k]!r}" for k in needed if not isinstance(hub[k], int)]:
            raise ValueError(f"expected integers, found {', '.join(wrong)}")
        if hub.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act is {hub['hidden_act']!r}, expected 'silu'")
        heads, size = hub["num_attention_heads"], hub["hidden_size"]
        rope = {**(hub.get("rope_scaling") or {}), **(hub.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        scaling = None
        if kind == "llama3":
            keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            if missing := [k for k in keys if k not in rope]:
                raise ValueError(f"the rope scaling of Llama 3 lacks {', '.join(missing)}")
            scaling = RopeScaling(*(rope[k] for k in keys))
        elif kind != "default":
            raise ValueError(f"the rope type is {kind!r}, expected 'default' or 'llama3'")
        stop = hub.get("eos_token_id")
        return cls(
            vocabulary=hub["vocab_size"],
            size=size,
            hidden=hub["intermediate_size"],
            layers=hub["num_hidden_layers"],
            heads=heads,
            kv_heads=hub.get("num_key_value_heads") or heads,
            head_size=hub.get("head_dim") or size // heads,
            context=hub.get("max_position_embeddings", 2048),
            norm_eps=hub.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", hub.get("rope_theta", 10000.0))),
            rope_scaling=scaling,
            tied=hub.get("tie_word_embeddings", False),
            attention_bias=hub.get("attention_bias", False),
            mlp_bias=hub.get("mlp_bias", False),
            bos_id=hub.get("bos_token_id"),
            stop_ids=tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,),
        )

    def to_hub(self) -> dict[str, Any]:
        """The config.json of Hugging Face."""
        scaling = self.rope_scaling
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.size,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling
            and {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
                "original_max_position_embeddings": scaling.original_context,
            },
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "hidden_act": "silu",
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.stop_ids) if len(self.stop_ids) > 1 else (self.stop_ids or (None,))[0],
        }

    def blocks(self, dtype: Any = jnp.float32) -> tuple[Block, ...]:
        """Embed, layers.0 .. layers.L-1, head, with matrices of ``dtype``; no array is made."""
        dtype = jnp.dtype(dtype)
        layer = Block.define("layers.0", lambda rngs: Layer(self, dtype, rngs))
        tied = {"weight": "embed.weight"} if self.tied else {}
        return (
            Block.define("embed", lambda rngs: Embed(self, dtype, rngs)),
            *(Block(f"layers.{i}", layer.graphdef, layer.shapes) for i in range(self.layers)),
            Block.define("head", lambda rngs: Head(self, dtype, rngs), tied),
        )

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Model:
        """A model with random weights: matrices from N(0, 0.02^2), norms of ones."""
        dtype, keys = jnp.dtype(dtype), jax.random.split(key, self.layers + 2)

        @partial(jax.jit, static_argnums=0)
        def make(module: Any, key: jax.Array) -> Any:
            return nnx.to_pure_dict(nnx.state(module(self, dtype, nnx.Rngs(params=key))))

        params = {"embed": make(Embed, keys[0]), "head": make(Head, keys[1])}
        params |= {f"layers.{i}": make(Layer, keys[i + 2]) for i in range(self.layers)}
        if self.tied:
            del params["head"]["weight"]
        return Model(self, self.blocks(dtype), params)

    def hub_names(self) -> dict[str, str]:
        """Names of the leaves in this library -> names of the tensors in a Hugging Face file."""
        names = {"embed.weight": "model.embed_tokens.weight", "head.norm.weight": "model.norm.weight"}
        if not self.tied:
            names["head.weight"] = "lm_head.weight"
        for i in range(self.layers):
            ours, theirs = f"layers.{i}", f"model.layers.{i}"
            names[f"{ours}.attn.norm.weight"] = f"{theirs}.input_layernorm.weight"
            names[f"{ours}.mlp.norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
            parts = [("attn", "self_attn", p, self.attention_bias) for p in "qkvo"]
            parts += [("mlp", "mlp", p, self.mlp_bias) for p in ("gate", "up", "down")]
            for group, their_group, part, bias in parts:
                for kind in ("weight", "bias") if bias else ("weight",):
                    names[f"{ours}.{group}.{part}.{kind}"] = f"{theirs}.{their_group}.{part}_proj.{kind}"
        return names


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position, float32 [head_size / 2]: theta^(-2i / head_size), scaled as Llama 3 does if asked.

    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> rope_frequencies(config).round(4).tolist()
    [1.0, 0.009999999776482582]
    """
    frequencies = config.rope_theta ** -(np.arange(0, config.head_size, 2) / config.head_size)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    # rotations within the original context: at most `low` of them -> divided, at least `high` -> kept
    rotations = scaling.original_context * frequencies / (2 * math.pi)
    keep = np.clip((rotations - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (frequencies * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


class Embed(nnx.Module):
    """Token embedding: the rows of ``weight`` [vocabulary, size]."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        """Draws from N(0, 0.02^2)."""
        self.weight = Linear(config.size, config.vocabulary, bias=False, dtype=dtype, rngs=rngs).weight

    def __call__(self, carry: None, batch: Batch) -> jax.Array:
        """Ids [b, t] -> float32 [b, t, size]: the residual stream, which 16-bit matrices read and add to.

        In 16 bits its rounding would drown the difference of two losses.
        """
        return self.weight[...][batch["ids"]].astype(jnp.float32)


class Attention(nnx.Module):
    """Pre-norm causal self-attention with grouped keys and values and rotary positions."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        """Norm, q, k, v, o."""
        self.config = config
        self.norm = RMSNorm(config.size, config.norm_eps)
        make = partial(Linear, bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.q = make(config.size, config.heads * config.head_size)
        self.k = make(config.size, config.kv_heads * config.head_size)
        self.v = make(config.size, config.kv_heads * config.head_size)
        self.o = make(config.heads * config.head_size, config.size)

    def __call__(self, x: jax.Array, lengths: jax.Array | None) -> jax.Array:
        """X [b, t, size] -> the same."""
        h, size = self.norm(x), self.config.head_size
        q, k, v = (part(h).reshape(*h.shape[:2], -1, size) for part in (self.q, self.k, self.v))
        positions, frequencies = jnp.arange(x.shape[1]), jnp.asarray(rope_frequencies(self.config))
        mixed = attention(rotate(q, positions, frequencies), rotate(k, positions, frequencies), v, lengths)
        return self.o(mixed.reshape(*x.shape[:2], -1), dtype=x.dtype)


class MLP(nnx.Module):
    """Pre-norm SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        """Norm, gate, up, down."""
        self.norm = RMSNorm(config.size, config.norm_eps)
        make = partial(Linear, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate, self.up = make(config.size, config.hidden), make(config.size, config.hidden)
        self.down = make(config.hidden, config.size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [b, t, size] -> the same."""
        h = self.norm(x)
        return self.down(jax.nn.silu(self.gate(h)) * self.up(h), dtype=x.dtype)


class Layer(nnx.Module):
    """x + attention(x), then x + mlp(x)."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        """Attention and MLP."""
        self.attn, self.mlp = Attention(config, dtype, rngs), MLP(config, dtype, rngs)

    def __call__(self, x: jax.Array, batch: Batch) -> jax.Array:
        """X [b, t, size] -> the same."""
        x = x + self.attn(x, batch.get("lengths"))
        return x + self.mlp(x)


class Head(nnx.Module):
    """Final norm and the projection on the vocabulary, ``weight`` [vocabulary, size]; float32 logits."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        """Norm and matrix; a tied matrix is replaced by the embedding's."""
        self.norm = RMSNorm(config.size, config.norm_eps)
        self.weight = Linear(config.size, config.vocabulary, bias=False, dtype=dtype, rngs=rngs).weight

    def __call__(self, x: jax.Array, batch: Batch) -> Any:
        """X [b, t, size] -> logits [b, t, vocabulary], or (loss sum, count) with targets."""
        weight = self.weight[...]
        return head_result(linear(self.norm(x).astype(compute_dtype(weight.dtype)), weight, dtype=jnp.float32), batch)
