"""Qwen3 (arXiv 2505.09388): Llama's layers with an RMSNorm over each head's query and key."""

from dataclasses import dataclass
from typing import ClassVar

from zo2jax.models.llama import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(LlamaConfig):
    """The shape of a dense Qwen3.

    >>> config = Qwen3Config(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> config.hub_names()["layers.0.attn.q_norm.weight"]
    'model.layers.0.self_attn.q_norm.weight'
    """

    norm_eps: float = 1e-6
    qk_norm: bool = True

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3"
    default_head_size: ClassVar[int | None] = 128
