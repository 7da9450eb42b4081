"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783): grouped-query attention, rotary positions, SwiGLU."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zo2jax.models.decoder import Decoder, read_hub, write_hub
from zo2jax.models.layers import Batch, Cache, Embed, Linear, RMSNorm, attend, positions_of, rotate


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


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Decoder):
    """The shape of a Llama; the names in Hugging Face's config.json are those that `from_hub` reads.

    >>> LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16).tied
    False
    """

    kv_heads: int
    head_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether each head's query and key pass an RMSNorm before they are rotated."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "Llama"
    default_head_size: ClassVar[int | None] = None

    @classmethod
    def from_hub(cls, hub: dict[str, Any]) -> "LlamaConfig":
        """Reads a Hugging Face config.json (of transformers 4 or 5).

        Raises:
            ValueError: naming the missing keys, or a value that this implementation does not compute.
        """
        names = {"vocabulary": "vocab_size", "size": "hidden_size", "hidden": "intermediate_size"}
        common = read_hub(hub, names | {"layers": "num_hidden_layers", "heads": "num_attention_heads"})
        if hub.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act is {hub['hidden_act']!r}, expected 'silu'")
        if hub.get("use_sliding_window"):
            raise ValueError("use_sliding_window is true, expected full attention")
        heads, size = common["heads"], common["size"]
        rope = {**(hub.get("rope_scaling") or {}), **(hub.get("rope_parameters") or {})}
        return cls(
            **common,
            kv_heads=hub.get("num_key_value_heads") or heads,
            head_size=hub.get("head_dim") or cls.default_head_size or size // heads,
            context=hub.get("max_position_embeddings", 2048),
            norm_eps=hub.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", hub.get("rope_theta", 10000.0))),
            rope_scaling=_read_scaling(rope),
            tied=hub.get("tie_word_embeddings", False),
            attention_bias=hub.get("attention_bias", False),
            mlp_bias=hub.get("mlp_bias", False),
        )

    def to_hub(self) -> dict[str, Any]:
        """The config.json of Hugging Face."""
        scaling = self.rope_scaling
        return write_hub(self) | {
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
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "hidden_act": "silu",
        }

    @property
    def kept_shape(self) -> tuple[int, int]:
        """(heads, size) of the keys and values of a token."""
        return self.kv_heads, self.head_size

    def make_embed(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The token embedding."""
        return Embed(self.vocabulary, self.size, dtype, rngs)

    def make_attention(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The first block of a layer."""
        return Attention(self, dtype, rngs)

    def make_mlp(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The second block of a layer."""
        return MLP(self, dtype, rngs)

    def make_finish(self, dtype: Any, rngs: nnx.Rngs) -> tuple[nnx.Module | None, Linear | None]:
        """The final norm."""
        return RMSNorm(self.size, self.norm_eps), None

    def backbone_names(self) -> dict[str, str]:
        """Our names -> Hugging Face's, for all leaves but the head's matrix."""
        base = "transformer" if self.head.suffix == "ForQuestionAnswering" else "model"
        names = {"embed.weight": f"{base}.embed_tokens.weight", "head.norm.weight": f"{base}.norm.weight"}
        for i in range(self.layers):
            ours, theirs = f"layers.{i}", f"{base}.layers.{i}"
            names[f"{ours}.attn.norm.weight"] = f"{theirs}.input_layernorm.weight"
            names[f"{ours}.mlp.norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
            for part in ("q_norm", "k_norm") if self.qk_norm else ():
                names[f"{ours}.attn.{part}.weight"] = f"{theirs}.self_attn.{part}.weight"
            parts = [("attn", "self_attn", p, self.attention_bias) for p in "qkvo"]
            parts += [("mlp", "mlp", p, self.mlp_bias) for p in ("gate", "up", "down")]
            for group, their_group, part, bias in parts:
                for kind in ("weight", "bias") if bias else ("weight",):
                    names[f"{ours}.{group}.{part}.{kind}"] = f"{theirs}.{their_group}.{part}_proj.{kind}"
        return names


def _read_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"the rope type is {kind!r}, expected 'default' or 'llama3'")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [k for k in keys if k not in rope]:
        raise ValueError(f"the rope scaling of Llama 3 lacks {', '.join(missing)}")
    return RopeScaling(*(rope[k] for k in keys))


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


class Attention(nnx.Module):
    """x + attention(norm(x)), causal, with grouped keys and values and rotary positions."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        """Norm, q, k, v, o."""
        self.config = config
        self.norm = RMSNorm(config.size, config.norm_eps)
        make = partial(Linear, bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.q = make(config.size, config.heads * config.head_size)
        self.k = make(config.size, config.kv_heads * config.head_size)
        self.v = make(config.size, config.kv_heads * config.head_size)
        self.o = make(config.heads * config.head_size, config.size)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        self.prefix = config.make_prefix()

    def __call__(self, x: jax.Array, batch: Batch, cache: Cache | None = None) -> Any:
        """X [b, t, size] -> the same; with a cache, (the same, the cache)."""
        h, size = self.norm(x), self.config.head_size
        q, k, v = (part(h).reshape(*h.shape[:2], -1, size) for part in (self.q, self.k, self.v))
        q, k = (y if norm is None else norm(y) for y, norm in ((q, self.q_norm), (k, self.k_norm)))
        positions, frequencies = positions_of(batch, self.config.prefix), jnp.asarray(rope_frequencies(self.config))
        q, k = (rotate(y, positions, frequencies) for y in (q, k))
        mixed, kept = attend(q, k, v, batch, cache, self.prefix)
        x = x + self.o(mixed.reshape(*x.shape[:2], -1), dtype=x.dtype)
        return x if cache is None else (x, kept)


class MLP(nnx.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x))): SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        """Norm, gate, up, down."""
        self.norm = RMSNorm(config.size, config.norm_eps)
        make = partial(Linear, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate, self.up = make(config.size, config.hidden), make(config.size, config.hidden)
        self.down = make(config.hidden, config.size)

    def __call__(self, x: jax.Array, batch: Batch) -> jax.Array:
        """X [b, t, size] -> the same."""
        h = self.norm(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h), dtype=x.dtype)
