"""The real Llama stories260K adapted to Shakespeare's plays with low-rank directions: its matrices are only read.

    zo2jax train stories260k_shakespeare_factored model=FOLDER data=tinyshakespeare.txt dtype=bfloat16

``model`` is a Hugging Face folder of karpathy/tinyllamas stories260K, ``data`` the tinyshakespeare text.

Held-out loss 5.05 to 3.58 nats per token (dense directions: 3.56); with format=int8 3.57, format=int4 group=16 3.69.
12 minutes on 2 CPU cores that do something else as well; under 1 GB with JAX itself.
"""

from dataclasses import dataclass
from typing import Literal

from zo2jax.config import Config


@dataclass(frozen=True, kw_only=True)
class Stories260kShakespeareFactored(Config):
    """7000 steps of 16 x 64 tokens at a constant learning rate; rank 2, one factor kept for 50 steps."""

    directory: str = "runs/stories260k_shakespeare_factored"
    steps: int = 7000
    learning_rate: float = 1e-4
    direction: Literal["normal", "rademacher", "lowrank"] = "lowrank"
