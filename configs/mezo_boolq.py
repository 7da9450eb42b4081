"""MeZO on BoolQ, yes-or-no questions on a passage: OPT-13B, all parameters.

    zo2jax train mezo_boolq model=FOLDER data=FOLDER [learning_rate=1e-6]

Without ``data`` the examples come from the Hugging Face hub. Try 1e-7 and 1e-6 as learning rates.

On one H200 about 2.9 h and 29 GiB: a step of OPT-13B's shape takes 49 ms and 85 us a token (measured on random
weights), with 16 rows of 346 tokens a step, padding included.
Published with 1000 examples (arXiv 2305.17333, table 1): zero-shot 59.0, in-context 66.9, MeZO 67.6, Adam 77.1.
"""

from dataclasses import dataclass

from zo2jax.config import MezoRecipe


@dataclass(frozen=True, kw_only=True)
class MezoBoolQ(MezoRecipe):
    """The recipe of `zo2jax.config.MezoRecipe`."""

    directory: str = "runs/mezo_boolq"
    task: str = "boolq"
