"""What it takes to train a trillion parameters in Llama 3's form: int4 weights, low-rank directions.

    zo2jax plan plan_1t [--machine h200] [--host-memory 128GiB] [-o plan.png]

Made from its shape alone, in seconds, without weights and without a GPU. For other formats add ``format=int8`` or
``format=``.
"""

from dataclasses import dataclass

from zo2jax.config import ReadOnlyRecipe


@dataclass(frozen=True, kw_only=True)
class Plan1t(ReadOnlyRecipe):
    """The recipe of `zo2jax.config.ReadOnlyRecipe`."""

    model: str = "shape:1t"
