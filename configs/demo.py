"""The demo: the package's own small Llama, trained on docstrings, adapted to source code. Works offline.

    zo2jax demo [key=value ...]

``model`` and ``data`` default to what comes with the package and with Python. Held-out loss falls by 0.47 to 0.49 nats
per token (seeds 0, 1, 2) in 93 to 94 s on 2 CPU cores; 4 MB of weights, about 1 GB with JAX itself.
"""

from dataclasses import dataclass
from typing import Literal

from zo2jax.config import Config


@dataclass(frozen=True, kw_only=True)
class Demo(Config):
    """1200 steps of 16 x 64 tokens at a constant learning rate."""

    directory: str = "runs/demo"
    steps: int = 1200
    learning_rate: float = 1e-4
    dtype: Literal["", "float32", "bfloat16", "float16"] = "float32"
