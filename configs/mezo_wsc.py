"""MeZO on WSC, the Winograd schemas of SuperGLUE: OPT-13B, all parameters.

    zo2jax train mezo_wsc model=FOLDER data=FOLDER [learning_rate=1e-6]

Without ``data`` the examples come from the Hugging Face hub. Try 1e-7 and 1e-6 as learning rates.

On one H200 about 1 h and 26.5 GiB: a step of OPT-13B's shape takes 49 ms and 85 us a token (measured on random
weights), with 16 rows of 96 tokens a step assumed.
Published with 1000 examples (arXiv 2305.17333, table 1): zero-shot 38.5, in-context 39.4, MeZO 63.5, Adam 63.5.
"""

from dataclasses import dataclass

from zo2jax.config import MezoRecipe


@dataclass(frozen=True, kw_only=True)
class MezoWsc(MezoRecipe):
    """The recipe of `zo2jax.config.MezoRecipe`."""

    directory: str = "runs/mezo_wsc"
    task: str = "wsc"
