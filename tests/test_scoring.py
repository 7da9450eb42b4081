"""Scores and evaluation with a model whose log-probabilities are known, so that every score is checked by hand."""

from dataclasses import replace

import numpy as np
import pytest
from task_fakes import ASK, BOS, EXAMPLES, SAY, Fake, X, Y, log_prob, make_tokenizer, text
from tokenizers import Tokenizer

import zo2jax as zo
from zo2jax.tasks.data import Example
from zo2jax.tasks.scoring import Evaluation, evaluate, option_scores
from zo2jax.tasks.task import Task

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer) -> Fake:
    return Fake(tokenizer)


def expected(row: str, option: str) -> list[float]:
    """Log-probabilities of the option's tokens, from the text."""
    ids = [BOS, *row.removeprefix("<s>").encode()]
    return [log_prob(ids[i - 1], i - 1, ids[i]) for i in range(len(ids) - len(option), len(ids))]


SCORES = {
    "mean": lambda x, d: [np.mean(expected(f"<s>{d}{x}\n{c}", c)) for c in ("No", "Yes")],
    "sum": lambda x, d: [np.sum(expected(f"<s>{d}{x}\n{c}", c)) for c in ("No", "Yes")],
    "sfc": lambda x, d: [
        np.sum(expected(f"<s>{d}{x}\n{c}", c)) - np.sum(expected(f"<s>c {c}", " " + c)) for c in ("No", "Yes")
    ],
    "icl_sfc": lambda x, d: [
        np.sum(expected(f"<s>{d}{x}\n{c}", c)) - np.sum(expected(f"<s>{d}c {c}", " " + c)) for c in ("No", "Yes")
    ],
}


@pytest.mark.parametrize("scoring", SCORES)
@pytest.mark.parametrize("shots", ["none", "one list", "a list each"])
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_scores_by_hand(model, scoring, shots, batch):
    examples = EXAMPLES[1:]
    sets = {
        "none": (None, [""] * 10),
        "one list": ([Y], ["B\nNo\n\n"] * 10),
        "a list each": ([[Y] * (i % 2) for i in range(10)], ["", "B\nNo\n\n"] * 5),
    }
    demonstrations, prefixes = sets[shots]
    scores = option_scores(model, ASK, examples, demonstrations=demonstrations, scoring=scoring, batch=batch)
    wanted = [SCORES[scoring](e["x"], prefix) for e, prefix in zip(examples, prefixes, strict=True)]
    np.testing.assert_allclose(np.array(scores), wanted, rtol=1e-6)
    assert {n for n, _ in model.shapes} == {batch}


def test_rows_that_occur_twice_are_scored_once(model):
    """The calibration rows of all examples are the same two."""
    option_scores(model, ASK, EXAMPLES[1:6], scoring="sfc", batch=1)
    assert len(model.shapes) == 5 * 2 + 2


def test_long_rows_come_first_and_progress_is_told(model):
    told = []
    option_scores(model, ASK, EXAMPLES, batch=8, progress=lambda done, total: told.append((done, total)))
    assert told == [(8, 22), (16, 22), (22, 22)]
    assert [t for _, t in model.shapes] == sorted((t for _, t in model.shapes), reverse=True)


def test_examples_may_differ_in_candidates(model):
    task = Task(prompt="{x}:", candidates=lambda e: e["c"], label="gold")
    examples = [{"x": "A", "c": ["p", "qr"], "gold": [0, 1]}, {"x": "B", "c": ["s", "t", "uvw"], "gold": 0}]
    scores = option_scores(model, task, examples)
    wanted = [[np.mean(expected(f"<s>{e['x']}:{c}", c)) for c in e["c"]] for e in examples]
    assert [score.tolist() for score in scores] == [pytest.approx(row) for row in wanted]
    result = evaluate(model, task, examples)
    assert result.predictions == [int(np.argmax(row)) for row in wanted]
    assert result.metrics == {"accuracy": (1 + (result.predictions[1] == 0)) / 2}


BAD_SCORES = {
    "no examples": ({"examples": []}, "no examples: expected at least one"),
    "scoring": ({"scoring": "avg"}, "scoring='avg': expected one of mean, sum, sfc, icl_sfc"),
    "sets": ({"demonstrations": [[X]]}, "1 lists of demonstrations for 2 examples: expected one each"),
    "batch": ({"batch": 0}, "batch=0: expected at least 1"),
    "example": ({"examples": [X, {"x": "a", "label": 0}, {"label": 0}]}, "example: no field 'x'; it has label"),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_scores_that_cannot_be_are_refused(case, model):
    changes, message = BAD_SCORES[case]
    examples = changes.get("examples", [X, Y])
    options = {name: value for name, value in changes.items() if name != "examples"}
    for call in (option_scores, evaluate):
        with pytest.raises(ValueError, match=message):
            call(model, ASK, examples, **options)


def test_a_broken_model_is_named(model):
    model.token_log_probs = lambda batch: np.full(batch["targets"].shape, np.nan, np.float32)
    with pytest.raises(ValueError, match=r"^f\.jsonl, line 3: the scores are \[nan nan\]: the model's weights"):
        option_scores(model, ASK, [Example(X, "f.jsonl, line 3")])


def test_labels_are_checked_before_anything_is_computed(model):
    with pytest.raises(ValueError, match="line 4: the label is 9"):
        evaluate(model, ASK, [*EXAMPLES, Example(X | {"label": 9}, "line 4")])
    assert model.shapes == []


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_text_is_generated_and_compared(model, batch):
    told = []
    examples = [
        {"x": "long ab", "answers": ["AB: no", "the ab."]},
        {"x": "xy", "answers": ["q"]},
        {"x": "z" * 9, "answers": "zz"},
    ]
    result = evaluate(model, SAY, examples, batch=batch, progress=lambda *n: told.append(n))
    assert result == Evaluation({"token_f1": pytest.approx(2 / 3)}, ["AB:", "XY:", "ZZ:"], 3)
    assert told[-1] == (3, 3) and len(told) == -(-3 // batch)
    assert {shape[1:] for shape in model.shapes} == {(50, ("\n",))}
    assert str(result) == "token_f1 0.667 (3 examples)"


def test_demonstrations_of_generated_text(tokenizer):
    prompts = []

    class Recorder(Fake):
        def generate(self, rows, tokens, *, stop):
            prompts.extend(map(text, rows))
            return [""] * len(rows)

    evaluate(Recorder(tokenizer), replace(SAY, tokens=3), [X, Y], demonstrations=[[Y], []])
    assert prompts == ["<s>B: no\n\nA b:", "<s>B:"]


def test_metrics_may_have_several_names(model):
    task = replace(SAY, metric=lambda prediction, answers: {"length": len(prediction) / 4, "right": 1.0})
    result = evaluate(model, task, [X, Y])
    assert result.predictions == ["B:", ">B:"]
    assert result.metrics == {"length": 0.625, "right": 1.0}
    assert str(result) == "length 0.625, right 1.000 (2 examples)"
    assert str(Evaluation({"a": 0.5}, [1], 1)) == "a 0.500 (1 example)"


@pytest.mark.parametrize("scoring", ["mean", "sum"])
def test_scores_of_a_model_are_those_of_its_logits(tiny_folder, scoring):
    model = zo.load(tiny_folder)
    task = Task(prompt="{x} ", candidates=("yes", "no", "maybe"), special_tokens=False)
    examples = [{"x": "Is it"}, {"x": "A longer question, is it"}]
    scores = option_scores(model, task, examples, scoring=scoring, batch=4)
    for example, score in zip(examples, scores, strict=True):
        for candidate, value in zip(task.candidates, score.tolist(), strict=True):
            ids = model.tokenizer.encode(f"{example['x']} {candidate}").ids
            logits = np.asarray(model.logits([ids])[0], np.float64)
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            first = len(example["x"])  # the space counts for the candidate
            parts = [log_probs[i - 1, ids[i]] for i in range(first, len(ids))]
            assert value == pytest.approx(np.sum(parts) if scoring == "sum" else np.mean(parts), rel=1e-4)
