"""What it takes to train 500 billion parameters in Llama 3's form: int4 weights, low-rank directions.

    zo2jax plan plan_500b [--machine h200] [--host-memory 128GiB] [-o plan.png]

Made from its shape alone, in seconds, without weights and without a GPU. For other formats add ``format=int8`` or
``format=``.
"""

from dataclasses import dataclass

from zo2jax.config import ReadOnlyRecipe


@dataclass(frozen=True, kw_only=True)
class Plan500b(ReadOnlyRecipe):
    """The recipe of `zo2jax.config.ReadOnlyRecipe`."""

    model: str = "shape:500b"
