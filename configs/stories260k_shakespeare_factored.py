"""The real Llama stories260K adapted to Shakespeare's plays with low-rank directions: its matrices are only read.

    zo2jax train stories260k_shakespeare_factored model=FOLDER data=tinyshakespeare.txt dtype=bfloat16

``model`` is a Hugging Face folder of karpathy/tinyllamas stories260K, ``data`` the tinyshakespeare text.
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
