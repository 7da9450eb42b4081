"""Metrics of one prediction against its references; each is in [0, 1], and a run reports the mean."""

import re
import string
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

_NO_ANSWER = ("unanswerable", "no answer", "CANNOTANSWER")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(prediction: int, gold: int | Collection[int]) -> float:
    """1.0 if the predicted index is the gold one, or one of several gold ones; else 0.0.

    >>> accuracy(2, {0, 2}), accuracy(1, 0)
    (1.0, 0.0)
    """
    return float(prediction in gold if isinstance(gold, Collection) else prediction == gold)


def normalize_answer(text: str) -> str:
    """SQuAD's normal form (arXiv 1606.05250): lower case, no punctuation, no articles, single spaces.

    >>> normalize_answer("The  Eiffel-Tower, a tower!")
    'eiffeltower tower'
    """
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def _f1(prediction: list[str], gold: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(gold)).values())
    if not prediction or not gold:
        return float(prediction == gold)
    return 2 * common / (len(prediction) + len(gold))


def token_f1(text: str, answers: Sequence[str]) -> float:
    """SQuAD's F1 (arXiv 1606.05250): overlap of the bags of normalised words, the best over the answers.

    Two empty answers agree, as in SQuAD v2 (arXiv 1806.03822). Where the first answer says that there is none
    ("unanswerable", "no answer", "CANNOTANSWER"), words do not count one by one: the whole has to agree.

    >>> token_f1("the big red dog", ["a red dog", "cat"])
    0.8
    """
    if answers[0] in _NO_ANSWER:
        return exact_match(text, answers[:1])
    words = normalize_answer(text).split()
    return max(_f1(words, normalize_answer(answer).split()) for answer in answers)


def exact_match(text: str, answers: Sequence[str]) -> float:
    """SQuAD's exact match (arXiv 1606.05250): 1.0 if the text equals one of the answers in normal form, else 0.0.

    >>> exact_match("The dog.", ["cat", "dog"])
    1.0
    """
    return float(normalize_answer(text) in map(normalize_answer, answers))


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(text: str, answers: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004): F-measures of stemmed words, each the best over the answers.

    >>> rouge("the cats sat", ["the cat sat down", "no"])
    {'rouge1': 0.857..., 'rouge2': 0.8, 'rougeL': 0.857...}
    """
    scores = [_rouge_scorer().score(answer, text) for answer in answers]
    return {name: max(score[name].fmeasure for score in scores) for name in scores[0]}
