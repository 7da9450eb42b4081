"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm before attention and MLP, tanh GELU, fused q, k, v."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from zo2jax.models.decoder import Decoder, read_hub, write_hub
from zo2jax.models.heads import CausalLM
from zo2jax.models.layers import Batch, Cache, LayerNorm, Linear, PositionEmbed, attend


@dataclass(frozen=True, kw_only=True)
class Gpt2Config(Decoder):
    """The shape of a GPT-2; the names in config.json are those that `from_hub` reads.

    >>> Gpt2Config(vocabulary=8, size=8, hidden=32, layers=1, heads=2, context=16).tied
    True
    """

    tied: bool = True
    norm_eps: float = 1e-5

    model_type: ClassVar[str] = "gpt2"
    architecture: ClassVar[str] = "GPT2"

    @classmethod
    def from_hub(cls, hub: dict[str, Any]) -> "Gpt2Config":
        """Reads a Hugging Face config.json (of transformers 4 or 5).

        Raises:
            ValueError: naming the missing keys, or a value that this implementation does not compute.
        """
        names = {"vocabulary": "vocab_size", "size": "n_embd", "layers": "n_layer", "heads": "n_head"}
        common = read_hub(hub, names | {"context": "n_positions"})
        expected = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
        for key, value in expected.items():
            if hub.get(key, value) != value:
                raise ValueError(f"{key} is {hub[key]!r}, expected {value}")
        if (activation := hub.get("activation_function", "gelu_new")) not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ValueError(f"activation_function is {activation!r}, expected 'gelu_new'")
        return cls(
            **common,
            hidden=hub.get("n_inner") or 4 * common["size"],
            tied=hub.get("tie_word_embeddings", True),
            norm_eps=hub.get("layer_norm_epsilon", 1e-5),
        )

    def to_hub(self) -> dict[str, Any]:
        """The config.json of Hugging Face."""
        hub = write_hub(self) | {
            "n_embd": self.size,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_positions": self.context,
            "n_inner": self.hidden,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": self.norm_eps,
        }
        return hub | ({"architectures": ["GPT2LMHeadModel"]} if isinstance(self.head, CausalLM) else {})

    def make_embed(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """Token and position embedding."""
        tokens, positions = (self.vocabulary, self.size), (self.context, self.size)
        return PositionEmbed(tokens, positions, dtype, rngs, offset=self.prefix)

    def make_attention(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The first block of a layer."""
        return Attention(self, dtype, rngs)

    def make_mlp(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The second block of a layer."""
        return MLP(self, dtype, rngs)

    def make_finish(self, dtype: Any, rngs: nnx.Rngs) -> tuple[nnx.Module | None, Linear | None]:
        """The final norm."""
        return LayerNorm(self.size, self.norm_eps), None

    def backbone_names(self) -> dict[str, str]:
        """Our names -> Hugging Face's, for all leaves but the head's matrix."""
        names = {"embed.weight": "transformer.wte.weight", "embed.positions": "transformer.wpe.weight"}
        parts = {"head.norm": "transformer.ln_f"}
        for i in range(self.layers):
            ours, theirs = f"layers.{i}", f"transformer.h.{i}"
            parts |= {f"{ours}.attn.norm": f"{theirs}.ln_1", f"{ours}.mlp.norm": f"{theirs}.ln_2"}
            parts |= {f"{ours}.attn.qkv": f"{theirs}.attn.c_attn", f"{ours}.attn.o": f"{theirs}.attn.c_proj"}
            parts |= {f"{ours}.mlp.fc1": f"{theirs}.mlp.c_fc", f"{ours}.mlp.fc2": f"{theirs}.mlp.c_proj"}
        return names | {f"{a}.{kind}": f"{b}.{kind}" for a, b in parts.items() for kind in ("weight", "bias")}

    def transposed(self, name: str) -> bool:
        """All matrices within layers: GPT-2's files keep them (n_in, n_out)."""
        return name.startswith("layers.")


class Attention(nnx.Module):
    """x + attention(norm(x)), causal, with q, k and v in one matrix."""

    def __init__(self, config: Gpt2Config, dtype: Any, rngs: nnx.Rngs):
        """Norm and two matrices with biases."""
        self.heads, self.norm = config.heads, LayerNorm(config.size, config.norm_eps)
        make = partial(Linear, config.size, bias=True, dtype=dtype, rngs=rngs)
        self.qkv, self.o = make(3 * config.size), make(config.size)
        self.prefix = config.make_prefix()

    def __call__(self, x: jax.Array, batch: Batch, cache: Cache | None = None) -> Any:
        """X [b, t, size] -> the same; with a cache, (the same, the cache)."""
        q, k, v = jnp.split(self.qkv(self.norm(x)).reshape(*x.shape[:2], 3 * self.heads, -1), 3, axis=2)
        mixed, kept = attend(q, k, v, batch, cache, self.prefix)
        x = x + self.o(mixed.reshape(x.shape), dtype=x.dtype)
        return x if cache is None else (x, kept)


class MLP(nnx.Module):
    """x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self, config: Gpt2Config, dtype: Any, rngs: nnx.Rngs):
        """Norm and two matrices with biases."""
        self.norm = LayerNorm(config.size, config.norm_eps)
        make = partial(Linear, bias=True, dtype=dtype, rngs=rngs)
        self.fc1, self.fc2 = make(config.size, config.hidden), make(config.hidden, config.size)

    def __call__(self, x: jax.Array, batch: Batch) -> jax.Array:
        """X [b, t, size] -> the same."""
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm(x)), approximate=True), dtype=x.dtype)
