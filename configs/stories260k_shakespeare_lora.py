"""The real Llama stories260K adapted to Shakespeare's plays by adapters (LoRA) beside matrices that stay as they are.

    zo2jax train stories260k_shakespeare_lora model=FOLDER data=tinyshakespeare.txt dtype=bfloat16

``model`` is a Hugging Face folder of karpathy/tinyllamas stories260K, ``data`` the tinyshakespeare text.

Held-out loss 5.05 to 3.49 nats per token (directions of whole matrices: 3.56). 19 minutes on 2 CPU cores that do
something else as well. eps 1e-2 gives the same; a learning rate of 3e-4 is slow, 3e-3 is too large.
"""

from dataclasses import dataclass
from typing import Literal

from zo2jax.config import Config


@dataclass(frozen=True, kw_only=True)
class Stories260kShakespeareLora(Config):
    """7000 steps of 16 x 64 tokens at a constant learning rate; adapters of rank 8 on all matrices."""

    directory: str = "runs/stories260k_shakespeare_lora"
    steps: int = 7000
    learning_rate: float = 1e-3
    eps: float = 1e-3
    direction: Literal["normal", "rademacher", "lowrank", "lora"] = "lora"
    rank: int = 8
