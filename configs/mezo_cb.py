"""MeZO on CommitmentBank, entailment of an embedded clause: OPT-13B, all parameters.

    zo2jax train mezo_cb model=FOLDER data=FOLDER [learning_rate=1e-6]

Without ``data`` the examples come from the Hugging Face hub. Try 1e-7 and 1e-6 as learning rates.

On one H200 about 2.0 h and 27.3 GiB: a step of OPT-13B's shape takes 49 ms and 85 us a token (measured on random
weights), with 16 rows of 231 tokens a step, padding included.
Published with 1000 examples (arXiv 2305.17333, table 1): zero-shot 46.4, in-context 57.1, MeZO 67.9, Adam 83.9.
"""

from dataclasses import dataclass

from zo2jax.config import MezoRecipe


@dataclass(frozen=True, kw_only=True)
class MezoCb(MezoRecipe):
    """The recipe of `zo2jax.config.MezoRecipe`, with as few held-out examples as the data allow."""

    directory: str = "runs/mezo_cb"
    task: str = "cb"
    dev_examples: int = 100
