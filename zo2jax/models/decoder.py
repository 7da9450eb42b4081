"""What the configurations of all decoders share: their blocks, random weights, and names in Hugging Face files."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from zo2jax.models.blocks import Block, Params, Source, del_leaf
from zo2jax.models.heads import CausalLM, Classification, Head, HeadKind, QuestionAnswering
from zo2jax.models.layers import Linear
from zo2jax.models.model import Model
from zo2jax.models.prefix import Prefix

_LANGUAGE_MODEL = CausalLM()


@dataclass(frozen=True, kw_only=True)
class Decoder(ABC):
    """The shape of a decoder: embed, then attention and MLP of each layer, head. A family says how each is made.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> [block.name for block in config.blocks()]
    ['embed', 'layers.0.attn', 'layers.0.mlp', 'head']
    """

    vocabulary: int
    size: int
    """Width of the residual stream."""
    hidden: int
    """Width of the MLP."""
    layers: int
    heads: int
    context: int
    tied: bool = False
    """Whether a language model's head is the embedding's matrix."""
    bos_id: int | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    prompt_bos: int | None = None
    """The token that tasks put before each prompt; None for what the tokenizer puts there."""
    head: HeadKind = _LANGUAGE_MODEL
    prefix: int = 0
    """Learned keys and values before a row's own (`zo2jax.with_prefix`); ``context`` is what they leave of it."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    """How Hugging Face's class names begin."""
    unwrapped: ClassVar[frozenset[str]] = frozenset()
    """Matrices of modules that PEFT puts no adapter on."""

    @classmethod
    @abstractmethod
    def from_hub(cls, hub: dict[str, Any]) -> "Decoder":
        """Reads a Hugging Face config.json (of transformers 4 or 5); ValueError for what is not computed here."""

    @abstractmethod
    def to_hub(self) -> dict[str, Any]:
        """The config.json of Hugging Face."""

    @abstractmethod
    def make_embed(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The first block: (None, batch) -> float32 [b, t, size]."""

    @abstractmethod
    def make_attention(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """A layer's first block, x + attention(norm(x)): (x, batch, cache=None) -> x, or (x, cache) with a cache."""

    @abstractmethod
    def make_mlp(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """A layer's second block, x + mlp(norm(x)): (x, batch) -> x."""

    @abstractmethod
    def make_finish(self, dtype: Any, rngs: nnx.Rngs) -> tuple[nnx.Module | None, Linear | None]:
        """What stands before the head's matrix: (final norm, projection)."""

    @abstractmethod
    def backbone_names(self) -> dict[str, str]:
        """Our names -> Hugging Face's, for all leaves but the head's matrix."""

    @property
    def kept_shape(self) -> tuple[int, int]:
        """(heads, size) of the keys and values of a token."""
        return self.heads, self.size // self.heads

    def make_prefix(self) -> Prefix | None:
        """What an attention block has before the tokens' own keys and values."""
        return Prefix(self.prefix, *self.kept_shape) if self.prefix else None

    @property
    def head_size_in(self) -> int:
        """Columns of the head's matrix."""
        return self.size

    def transposed(self, name: str) -> bool:
        """Whether Hugging Face keeps the matrix of this name (n_in, n_out)."""
        return False

    def make_head(self, dtype: Any, rngs: nnx.Rngs) -> Head:
        """The last block: (x, batch) -> logits, or (loss sum, count)."""
        outputs = self.head.outputs(self.vocabulary)
        norm, project = self.make_finish(dtype, rngs)
        matrix = Linear(self.head_size_in, outputs, bias=self.head.bias, dtype=dtype, rngs=rngs)
        return self.head.module(norm, project, matrix)

    @property
    def shares_matrix(self) -> bool:
        """Whether the head's matrix is the embedding's."""
        return self.tied and isinstance(self.head, CausalLM)

    def blocks(self, dtype: Any = jnp.float32) -> tuple[Block, ...]:
        """The model's blocks, with matrices of ``dtype``; no array is made."""
        dtype = jnp.dtype(dtype)
        attention = Block.define("attn", partial(self.make_attention, dtype), caches=True, takes_weights=True)
        mlp = Block.define("mlp", partial(self.make_mlp, dtype), takes_weights=True)
        tied = {"weight": "embed.weight"} if self.shares_matrix else {}
        return (
            Block.define("embed", partial(self.make_embed, dtype), takes_weights=True),
            *(replace(part, name=f"layers.{i}.{part.name}") for i in range(self.layers) for part in (attention, mlp)),
            Block.define("head", partial(self.make_head, dtype), tied, takes_weights=True),
        )

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Model:
        """A model with random weights: matrices from N(0, 0.02^2), norms of ones, biases of zeros.

        A block is made when it is asked for, each from a key of its own, which does not depend on how many there are.
        """
        dtype, blocks = jnp.dtype(dtype), self.blocks(dtype)
        parts = {"embed": self.make_embed, "head": self.make_head, "attn": self.make_attention, "mlp": self.make_mlp}
        readers: dict[str, Callable[[], Params]] = {}
        for i, block in enumerate((blocks[0], blocks[-1], *blocks[1:-1])):
            make = parts[block.name.split(".")[-1]]
            readers[block.name] = partial(_made, make, dtype, tuple(block.aliases), jax.random.fold_in(key, i))
        return Model(self, blocks, Source({block.name: readers[block.name] for block in blocks}))

    def hub_names(self) -> dict[str, str]:
        """Names of the leaves in this library -> names of the tensors in a Hugging Face file."""
        names = self.backbone_names()
        if not self.shares_matrix:
            names |= {f"head.{leaf}": f"{self.head.hub}.{leaf}" for leaf in ("weight", "bias")[: 1 + self.head.bias]}
        return names


@partial(jax.jit, static_argnums=(0, 1, 2))
def _made(make: Callable[..., nnx.Module], dtype: Any, tied: tuple[str, ...], key: jax.Array) -> Params:
    """Random leaves of a block, without those that it shares."""
    leaves = nnx.to_pure_dict(nnx.state(make(dtype, nnx.Rngs(params=key))))
    for name in tied:
        del_leaf(leaves, name)
    return leaves


def read_hub(hub: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Fields of a `Decoder` from a config.json: integers that it must have, and what all families have in common.

    Args:
        hub: the parsed config.json.
        names: field of the configuration -> key of config.json.

    Raises:
        ValueError: naming the missing keys, or the values that are no integers.

    >>> read_hub({"n_embd": 8, "eos_token_id": 3}, {"size": "n_embd"})["stop_ids"]
    (3,)
    """
    if missing := [key for key in names.values() if key not in hub]:
        raise ValueError(f"config.json lacks {', '.join(missing)}, which a {hub.get('model_type', 'model')} needs")
    if wrong := [f"{key}={hub[key]!r}" for key in names.values() if not isinstance(hub[key], int)]:
        raise ValueError(f"expected integers, found {', '.join(wrong)}")
    stop = hub.get("eos_token_id")
    return {field: hub[key] for field, key in names.items()} | {
        "bos_id": hub.get("bos_token_id"),
        "pad_id": hub.get("pad_token_id"),
        "stop_ids": tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,),
        "head": _read_head(hub),
    }


def _read_head(hub: dict[str, Any]) -> HeadKind:
    architecture = (hub.get("architectures") or [""])[0]
    if architecture.endswith(Classification.suffix):
        names = hub.get("id2label") or {i: f"LABEL_{i}" for i in range(hub.get("num_labels", 2))}
        return Classification(tuple(str(names[i]) for i in sorted(names, key=int)))
    return QuestionAnswering() if architecture.endswith(QuestionAnswering.suffix) else CausalLM()


def write_hub(config: Decoder) -> dict[str, Any]:
    """The part of config.json that all families have in common.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> write_hub(config)["architectures"]
    ['LlamaForCausalLM']
    """
    hub: dict[str, Any] = {
        "architectures": [config.architecture + config.head.suffix],
        "model_type": config.model_type,
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.stop_ids) if len(config.stop_ids) > 1 else (config.stop_ids or (None,))[0],
        "pad_token_id": config.pad_id,
    }
    if isinstance(config.head, Classification):
        hub["id2label"] = dict(enumerate(config.head.labels))
        hub["label2id"] = {label: i for i, label in enumerate(config.head.labels)}
    return hub
