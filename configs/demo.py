"""The demo: the package's own small Llama, trained on docstrings, adapted to source code. Works offline.

    zo2jax demo [key=value ...]

``model`` and ``data`` default to what comes with the package and with Python.
"""

from dataclasses import dataclass
from typing import Literal

from zo2jax.config import Config


@dataclass(frozen=True, kw_only=True)
class Demo(Config):
    """About two minutes on 2 CPU cores."""

    directory: str = "runs/demo"
    steps: int = 1500
    learning_rate: float = 1e-4
    dtype: Literal["", "float32", "bfloat16", "float16"] = "float32"
