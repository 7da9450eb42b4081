"""A tokenizer of one token per character and a model of its tokens, with tasks and examples to encode and score."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

from zo2jax.tasks.data import Example
from zo2jax.tasks.task import Task

BOS, OTHER, MERGED = 1, 2, 3  # "re" is one token; characters are their code points


def make_tokenizer() -> Tokenizer:
    """Characters, with BOS in front."""
    vocab = {"<s>": BOS, "<o>": OTHER, "re": MERGED, **{chr(i): i for i in range(10, 127)}}
    made = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"re|[\s\S]"), "isolated")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made.add_special_tokens([AddedToken("<o>", special=True)])
    return made


@dataclass(eq=False)
class Fake:
    """A model whose log-probabilities and answers are functions of the tokens."""

    tokenizer: Any
    context: int = 64
    prompt_bos: int | None = None
    vocabulary: int = 127
    folder: str = "a/folder"
    shapes: list = field(default_factory=list)

    @property
    def config(self):
        return SimpleNamespace(context=self.context, prompt_bos=self.prompt_bos, vocabulary=self.vocabulary)

    def token_log_probs(self, batch):
        """Of a token and its place; NaN where nothing is asked for."""
        self.shapes.append(batch["ids"].shape)
        before = np.take_along_axis(batch["ids"], batch["positions"], 1)
        made = log_prob(before, batch["positions"], batch["targets"])
        return np.where(batch["weights"] > 0, made, np.nan).astype(np.float32)

    def generate(self, prompts, tokens, *, stop):
        self.shapes.append((len(prompts), tokens, stop))
        return [f" {text(prompt)[-3:].upper()} \n" for prompt in prompts]


def log_prob(before, position, target):
    return -((before * 5 + position * 3 + target * 7) % 17 + 1) / 4


def text(ids) -> str:
    return "".join({BOS: "<s>", OTHER: "<o>", MERGED: "re"}.get(i) or chr(i) for i in ids)


ASK = Task(prompt="{x}\n", candidates=("No", "Yes"), calibration="c ")
SAY = Task(prompt="{x}:")
X, Y = {"x": "A b", "label": 1, "answers": ["ok"]}, {"x": "B", "label": 0, "answers": ["no", "nope"]}
EXAMPLES = [Example({"x": "ab" * i, "label": i % 2, "answers": [str(i)]}, f"line {i}") for i in range(11)]
