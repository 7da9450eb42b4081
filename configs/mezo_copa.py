"""MeZO on COPA, cause or effect of a premise: OPT-13B, all parameters.

    zo2jax train mezo_copa model=FOLDER data=FOLDER [learning_rate=1e-6]

Without ``data`` the examples come from the Hugging Face hub. Try 1e-7 and 1e-6 as learning rates.

On one H200 about 24 min and 26.5 GiB: a step of OPT-13B's shape takes 49 ms and 85 us a token (measured on random
weights), with 16 rows of 17 tokens a step, padding included.
Published with 1000 examples (arXiv 2305.17333, table 1): zero-shot 80.0, in-context 87.0, MeZO 88.0, Adam 79.0.
"""

from dataclasses import dataclass

from zo2jax.config import MezoRecipe


@dataclass(frozen=True, kw_only=True)
class MezoCopa(MezoRecipe):
    """The recipe of `zo2jax.config.MezoRecipe`, with as few held-out examples as the data allow."""

    directory: str = "runs/mezo_copa"
    task: str = "copa"
    dev_examples: int = 100
