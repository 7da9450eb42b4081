"""Metrics, worked by hand."""

import numpy as np
import pytest

from zo2jax.tasks.metrics import accuracy, exact_match, normalize_answer, rouge, token_f1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat", "cat"),
        ("  a  b\tan\nc ", "b c"),
        ("it's the-end", "its theend"),
        ("a.b", "ab"),
        ("theatre Anna", "theatre anna"),
        ("U.S.A.", "usa"),
        ("the", ""),
        ("“x” 5°", "“x” 5°"),  # only ASCII punctuation goes
    ],
)
def test_normal_form_of_answers(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("text", "answers", "f1", "exact"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1, 1),
        ("the Denver Broncos!", ["denver broncos"], 1, 1),
        ("Denver", ["Denver Broncos"], 2 / 3, 0),  # precision 1, recall 1/2
        ("x x y", ["x y y z"], 4 / 7, 0),  # 2 of 3 and 2 of 4: bags, not sets
        ("x", ["y", "x z", "x z w"], 2 / 3, 0),  # the best
        ("x", ["y"], 0, 0),
        ("", ["y"], 0, 0),
        ("y", ["the"], 0, 0),
        ("", ["the"], 1, 1),
        ("Unanswerable.", ["unanswerable"], 1, 1),
        ("answer", ["no answer"], 0, 0),
        ("no answer", ["no answer", "answer"], 1, 1),
        ("answer", ["answer", "no answer"], 1, 1),
        ("cannotanswer", ["CANNOTANSWER"], 1, 1),
        ("unanswerable", ["Denver"], 0, 0),
    ],
)
def test_answers_are_compared_as_squad_does(text, answers, f1, exact):
    assert token_f1(text, answers) == pytest.approx(f1)
    assert exact_match(text, answers) == exact


def test_f1_is_the_official_definition():
    """Harmonic mean of precision and recall over bags of words, as in SQuAD v2's evaluation."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        predicted, gold = (rng.choice(["u", "v", "w", "x"], rng.integers(0, 5)).tolist() for _ in range(2))
        same = sum(min(predicted.count(word), gold.count(word)) for word in set(predicted))
        if not predicted or not gold:
            wanted = float(predicted == gold)
        else:
            precision, recall = same / len(predicted), same / len(gold)
            wanted = 2 * precision * recall / (precision + recall) if same else 0.0
        assert token_f1(" ".join(predicted), [" ".join(gold)]) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("prediction", "gold", "score"), [(1, 1, 1), (1, 0, 0), (2, {0, 2}, 1), (1, frozenset({0, 2}), 0), (0, [0], 1)]
)
def test_accuracy(prediction, gold, score):
    assert accuracy(prediction, gold) == score


def test_rouge():
    """Unigrams 3 of 4 and 3 of 3; bigrams 1 of 3 and 1 of 2; longest common subsequence 3."""
    scores = rouge("police killed the gunmen", ["police kill gunman", "the gunmen killed"])
    assert scores["rouge1"] == pytest.approx(6 / 7)
    assert scores["rouge2"] == pytest.approx(2 / 5)
    assert scores["rougeL"] == pytest.approx(4 / 7)
    assert rouge("x", ["y"]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    assert rouge("", ["y"])["rougeL"] == 0
