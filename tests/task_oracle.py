"""MeZO's token, score and loss rules once more, with transformers alone: one row at a time, no batches, no padding."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SEPARATOR = "\n\n"
Encode = Callable[[str], list[int]]
Row = tuple[tuple[int, ...], int]  # token ids, and how many of the last belong to the option


def fast_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder, with the special tokens that its file asks for."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def opt_encode(folder: Path, bos: int = 0) -> Encode:
    """GPT-2's byte-level BPE with a token ``bos`` in front, as MeZO has it for OPT."""
    from transformers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    return lambda text: [bos, *tokenizer.encode(text, add_special_tokens=False)]


def joined(demonstrations: Sequence[str], text: str) -> str:
    """Demonstrations and the text, separated by an empty line."""
    return (SEPARATOR.join(d.strip() for d in demonstrations).strip() + SEPARATOR + text).lstrip().strip(" ")


def truncated(ids: list[int], context: int) -> tuple[int, ...]:
    """The first token, which is BOS, and as many of the last as fit."""
    return tuple(ids if len(ids) <= context else ids[:1] + ids[len(ids) - context + 1 :])


def option_row(encode: Encode, context: int, prompt: str, candidate: str, demonstrations: Sequence[str] | None) -> Row:
    """Tokens of prompt and candidate, after the demonstrations; None: as they are, without any separator."""
    whole = (prompt + candidate).strip(" ")
    option = len(encode(whole)) - len(encode(prompt.strip(" ")))
    ids = truncated(encode(whole if demonstrations is None else joined(demonstrations, whole)), context)
    return ids, min(option, len(ids) - 1)


def prompt_ids(encode: Encode, context: int, prompt: str, demonstrations: Sequence[str] = ()) -> tuple[int, ...]:
    """Tokens of a prompt that is to be continued."""
    return truncated(encode(joined(demonstrations, prompt.strip(" "))), context)


@dataclass
class Oracle:
    """A Llama of transformers in float32."""

    folder: Path
    seen: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(1)
        self.model = LlamaForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.tokenizer = fast_tokenizer(self.folder)
        self.context = self.model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def logits(self, ids: Sequence[int]) -> Any:
        import torch

        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([list(ids)])).logits[0]

    def log_probs(self, row: Row) -> np.ndarray:
        """Log-probability of each option token, float64 [option]."""
        ids, option = row
        if ids not in self.seen:
            logs = self.logits(ids).double().log_softmax(-1).numpy()
            self.seen[ids] = logs[np.arange(len(ids) - 1), list(ids[1:])]
        return self.seen[ids][-option:]

    def option_rows(self, prompt: str, candidates: Sequence[str], demonstrations: Sequence[str] | None) -> list[Row]:
        return [option_row(self.encode, self.context, prompt, c, demonstrations) for c in candidates]

    def scores(
        self, prompt: str, candidates: Sequence[str], demonstrations: Sequence[str], scoring: str, calibration: str
    ) -> np.ndarray:
        """One score per candidate: "mean" or "sum" of log-probs, or sums less those after the calibration prompt."""
        logs = [self.log_probs(row) for row in self.option_rows(prompt, candidates, demonstrations)]
        if scoring == "mean":
            return np.array([x.mean() for x in logs])
        sums = np.array([x.sum() for x in logs])
        if scoring == "sum":
            return sums
        assert scoring in ("sfc", "icl_sfc")
        before = demonstrations if scoring == "icl_sfc" else None
        return sums - [self.log_probs(row).sum() for row in self.option_rows(calibration, candidates, before)]

    def generate(self, ids: Sequence[int], tokens: int, stop: Sequence[str] = ("\n",)) -> str:
        """Greedy text after ``ids``, up to EOS or the first stop string, without the spaces around it."""
        new: list[int] = []
        while len(new) < tokens:
            token = int(self.logits([*ids, *new])[-1].argmax())
            if token == self.model.config.eos_token_id:
                break
            new.append(token)
            if any(s in self.tokenizer.decode(new, skip_special_tokens=True) for s in stop):
                break
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return re.split("|".join(map(re.escape, stop)), text)[0].strip() if stop else text.strip()

    def tokens_loss(self, rows: Sequence[Row]) -> float:
        """Teacher forcing: the mean over all option tokens of a batch."""
        return -float(np.concatenate([self.log_probs(row) for row in rows]).mean())

    def candidates_loss(self, examples: Sequence[Sequence[Row]], gold: Sequence[int]) -> float:
        """Softmax cross-entropy over the mean log-probs of each example's candidates, averaged over examples."""
        losses = []
        for rows, right in zip(examples, gold, strict=True):
            scores = np.array([self.log_probs(row).mean() for row in rows])
            losses.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[right])
        return float(np.mean(losses))


def words(text: str) -> list[str]:
    """The words of a text in lower case without punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return [w for w in re.sub(r"\b(a|an|the)\b", " ", bare).split() if w]


def token_f1(text: str, answers: Sequence[str]) -> float:
    """SQuAD's F1 of shared words, the best over the answers; an answer that says there is none must be met exactly."""
    if answers[0] in ("unanswerable", "no answer", "CANNOTANSWER"):
        return float(words(text) == words(answers[0]))

    def one(answer: str) -> float:
        ours, theirs = words(text), words(answer)
        if not ours or not theirs:
            return float(ours == theirs)
        same = sum((Counter(ours) & Counter(theirs)).values())
        return 2 * same / (len(ours) + len(theirs))

    return max(one(answer) for answer in answers)


def rouge(text: str, answers: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F-measures with stemming), each the best over the answers."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    return {name: max(scorer.score(answer, text)[name].fmeasure for answer in answers) for name in names}


def wider(batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch with more padding: one of few shapes, so that a test compiles few programs."""
    time, scored = batch["ids"].shape[1], batch["positions"].shape[1]
    weights = batch["weights"]
    shared = weights.ndim == 3 and len(weights) == len(batch["ids"]) and scored == weights.shape[1]
    more = dict.fromkeys(("positions", "targets", "weights"), 0 if shared else max(24 - scored, 0))
    more["ids"] = next(n for n in (64, 128, 192, 256, 384, 512) if n >= time) - time
    return batch | {key: np.pad(batch[key], [(0, 0)] * (batch[key].ndim - 1) + [(0, n)]) for key, n in more.items()}


class Wider:
    """Stands in for a model: scores batches with more padding, equal ones once."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.tokenizer, self.folder = model, model.config, model.tokenizer, model.folder
        self.seen: dict[tuple, np.ndarray] = {}

    def token_log_probs(self, batch: dict[str, Any]) -> np.ndarray:
        key = tuple((name, array.shape, array.tobytes()) for name, array in sorted(batch.items()))
        if key not in self.seen:
            self.seen[key] = np.asarray(self.model.token_log_probs(wider(batch)))[:, : batch["positions"].shape[1]]
        return self.seen[key]
