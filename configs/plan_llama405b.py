"""What it takes to train Llama 3 405B: int4 weights, low-rank directions.

    zo2jax plan plan_llama405b [--machine h200] [--host-memory 128GiB] [-o plan.png]

Made from its shape alone, in seconds, without weights and without a GPU. For other formats add ``format=int8`` or
``format=``.
"""

from dataclasses import dataclass
from typing import Literal

from zo2jax.config import Config


@dataclass(frozen=True, kw_only=True)
class PlanLlama405b(Config):
    """One row of 2048 tokens a step; V and the codes never change, and P is an adapter."""

    model: str = "shape:llama-405b"
    dtype: Literal["", "float32", "bfloat16", "float16"] = "bfloat16"
    format: Literal["", "int8", "int4"] = "int4"
    direction: Literal["normal", "rademacher", "lowrank", "lora"] = "lowrank"
    refresh: int = 0
    batch: int = 1
    tokens: int = 2048
    tier: Literal["device", "host", "disk", "auto"] = "auto"
