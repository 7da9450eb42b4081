"""MeZO on SQuAD, answers from a passage (token F1): OPT-13B, all parameters.

    zo2jax train mezo_squad model=FOLDER data=FOLDER [learning_rate=1e-6]

Without ``data`` the examples come from the Hugging Face hub. Try 1e-7, 5e-7 and 1e-6 as learning rates.

On one H200 about 3.2 h and 30 GiB: a step of OPT-13B's shape takes 49 ms and 85 us a token (measured on random
weights), with 16 rows of 384 tokens a step assumed.
Published with 1000 examples (arXiv 2305.17333, table 1): zero-shot 46.2, in-context 75.9, MeZO 84.7, Adam 84.9.
"""

from dataclasses import dataclass

from zo2jax.config import MezoRecipe


@dataclass(frozen=True, kw_only=True)
class MezoSquad(MezoRecipe):
    """The recipe of `zo2jax.config.MezoRecipe`."""

    directory: str = "runs/mezo_squad"
    task: str = "squad"
