"""MeZO on SST-2, sentiment of film reviews: OPT-13B, all parameters.

    zo2jax train mezo_sst2 model=FOLDER data=FOLDER [learning_rate=1e-6]

Without ``data`` the examples come from the Hugging Face hub. Try 1e-7 and 1e-6 as learning rates.

On one H200 about 37 min and 26.3 GiB: a step of OPT-13B's shape takes 49 ms and 85 us a token (measured on random
weights), with 16 rows of 46 tokens a step, padding included.
Published with 1000 examples (arXiv 2305.17333, table 1): zero-shot 58.8, in-context 87.0, MeZO 91.4, Adam 92.0.
"""

from dataclasses import dataclass

from zo2jax.config import MezoRecipe


@dataclass(frozen=True, kw_only=True)
class MezoSst2(MezoRecipe):
    """The recipe of `zo2jax.config.MezoRecipe`."""

    directory: str = "runs/mezo_sst2"
    task: str = "sst2"
