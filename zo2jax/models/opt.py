"""OPT (arXiv 2205.01068): learned positions, LayerNorm before (the 350m: after) attention and MLP, ReLU."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
from flax import nnx

from zo2jax.models.decoder import Decoder, read_hub, write_hub
from zo2jax.models.layers import Batch, Cache, LayerNorm, Linear, PositionEmbed, attend

_OFFSET = 2
"""Rows of the position embedding before the first position, never used."""
_MEZO_BOS = 0
"""<s>, which MeZO's runner puts before prompts (OPT's own tokenizer puts </s>, 2)."""


@dataclass(frozen=True, kw_only=True)
class OptConfig(Decoder):
    """The shape of an OPT, 125m to 175B; the names in config.json are those that `from_hub` reads.

    >>> OptConfig(vocabulary=8, size=8, hidden=32, layers=1, heads=2, context=16, token_size=8).pre_norm
    True
    """

    token_size: int
    """Width of the token embedding and of the head's input; the 350m projects from and to it."""
    tied: bool = True
    biases: bool = True
    affine: bool = True
    """Whether the norms have weights."""
    pre_norm: bool = True
    final_norm: bool = True
    prompt_bos: int | None = _MEZO_BOS

    model_type: ClassVar[str] = "opt"
    architecture: ClassVar[str] = "OPT"
    unwrapped: ClassVar[frozenset[str]] = frozenset({"embed.positions"})

    @classmethod
    def from_hub(cls, hub: dict[str, Any]) -> "OptConfig":
        """Reads a Hugging Face config.json (of transformers 4 or 5).

        Raises:
            ValueError: naming the missing keys, or a value that this implementation does not compute.
        """
        names = {"vocabulary": "vocab_size", "size": "hidden_size", "hidden": "ffn_dim"}
        names |= {"layers": "num_hidden_layers", "heads": "num_attention_heads", "context": "max_position_embeddings"}
        common = read_hub(hub, names)
        if hub.get("activation_function", "relu") != "relu":
            raise ValueError(f"activation_function is {hub['activation_function']!r}, expected 'relu'")
        pre_norm = hub.get("do_layer_norm_before", True)
        return cls(
            **common,
            token_size=hub.get("word_embed_proj_dim") or common["size"],
            tied=hub.get("tie_word_embeddings", True),
            biases=hub.get("enable_bias", True),
            affine=hub.get("layer_norm_elementwise_affine", True),
            pre_norm=pre_norm,
            final_norm=pre_norm and not hub.get("_remove_final_layer_norm", False),
        )

    def to_hub(self) -> dict[str, Any]:
        """The config.json of Hugging Face."""
        return write_hub(self) | {
            "hidden_size": self.size,
            "ffn_dim": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.context,
            "word_embed_proj_dim": self.token_size,
            "activation_function": "relu",
            "enable_bias": self.biases,
            "layer_norm_elementwise_affine": self.affine,
            "do_layer_norm_before": self.pre_norm,
            "_remove_final_layer_norm": self.pre_norm and not self.final_norm,
        }

    @property
    def head_size_in(self) -> int:
        """Columns of the head's matrix."""
        return self.token_size

    @property
    def _projects(self) -> bool:
        return self.token_size != self.size

    def make_embed(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """Token and position embedding."""
        tokens, positions = (self.vocabulary, self.token_size), (self.context, self.size)
        return PositionEmbed(tokens, positions, dtype, rngs, offset=_OFFSET + self.prefix)

    def make_attention(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The first block of a layer."""
        return Attention(self, dtype, rngs)

    def make_mlp(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The second block of a layer."""
        return MLP(self, dtype, rngs)

    def make_finish(self, dtype: Any, rngs: nnx.Rngs) -> tuple[nnx.Module | None, Linear | None]:
        """The final norm (all but the 350m), the projection to the tokens' width (the 350m)."""
        project = Linear(self.size, self.token_size, bias=False, dtype=dtype, rngs=rngs) if self._projects else None
        return LayerNorm(self.size, affine=self.affine) if self.final_norm else None, project

    def backbone_names(self) -> dict[str, str]:
        """Our names -> Hugging Face's, for all leaves but the head's matrix."""
        base = "model.decoder"
        names = {"embed.weight": f"{base}.embed_tokens.weight", "embed.positions": f"{base}.embed_positions.weight"}
        if self._projects:
            names["embed.project.weight"] = f"{base}.project_in.weight"
            names["head.project.weight"] = f"{base}.project_out.weight"
        norms = {"head.norm": f"{base}.final_layer_norm"} if self.final_norm else {}
        for i in range(self.layers):
            ours, theirs = f"layers.{i}", f"{base}.layers.{i}"
            norms[f"{ours}.attn.norm"] = f"{theirs}.self_attn_layer_norm"
            norms[f"{ours}.mlp.norm"] = f"{theirs}.final_layer_norm"
            parts = {f"attn.{p}": f"self_attn.{p}_proj" for p in "qkv"} | {"attn.o": "self_attn.out_proj"}
            for part, their_part in (parts | {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}).items():
                for kind in ("weight", "bias") if self.biases else ("weight",):
                    names[f"{ours}.{part}.{kind}"] = f"{theirs}.{their_part}.{kind}"
        for ours, theirs in norms.items() if self.affine else ():
            names |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
        return names


class Attention(nnx.Module):
    """x + attention(norm(x)), causal; the 350m: norm(x + attention(x))."""

    def __init__(self, config: OptConfig, dtype: Any, rngs: nnx.Rngs):
        """Norm, q, k, v, o."""
        self.heads, self.pre_norm = config.heads, config.pre_norm
        self.norm = LayerNorm(config.size, affine=config.affine)
        make = partial(Linear, config.size, config.size, bias=config.biases, dtype=dtype, rngs=rngs)
        self.q, self.k, self.v, self.o = make(), make(), make(), make()
        self.prefix = config.make_prefix()

    def __call__(self, x: jax.Array, batch: Batch, cache: Cache | None = None) -> Any:
        """X [b, t, size] -> the same; with a cache, (the same, the cache)."""
        h = self.norm(x) if self.pre_norm else x
        q, k, v = (part(h).reshape(*h.shape[:2], self.heads, -1) for part in (self.q, self.k, self.v))
        mixed, kept = attend(q, k, v, batch, cache, self.prefix)
        x = x + self.o(mixed.reshape(x.shape), dtype=x.dtype)
        x = x if self.pre_norm else self.norm(x)
        return x if cache is None else (x, kept)


class MLP(nnx.Module):
    """x + fc2(relu(fc1(norm(x)))); the 350m: norm(x + fc2(relu(fc1(x))))."""

    def __init__(self, config: OptConfig, dtype: Any, rngs: nnx.Rngs):
        """Norm and two matrices."""
        self.pre_norm = config.pre_norm
        self.norm = LayerNorm(config.size, affine=config.affine)
        make = partial(Linear, bias=config.biases, dtype=dtype, rngs=rngs)
        self.fc1, self.fc2 = make(config.size, config.hidden), make(config.hidden, config.size)

    def __call__(self, x: jax.Array, batch: Batch) -> jax.Array:
        """X [b, t, size] -> the same."""
        h = self.fc1(self.norm(x) if self.pre_norm else x)
        x = x + self.fc2(jax.nn.relu(h), dtype=x.dtype)
        return x if self.pre_norm else self.norm(x)
