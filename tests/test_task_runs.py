"""Zero-shot runs on real data sets: scores and accuracy against MeZO's rules on transformers; see task_oracle."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from task_oracle import Oracle, Wider

import zo2jax as zo
from zo2jax.tasks.catalog import TASKS
from zo2jax.tasks.data import find_splits, subset
from zo2jax.tasks.scoring import evaluate, option_scores


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tab_separated(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        return [dict(row) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def labelled_lines(path: Path) -> list[dict]:
    lines = path.read_bytes().decode("latin-1").split("\n")
    return [dict(zip(("label", "text"), line.split(" ", 1), strict=True)) for line in lines if line]


def lower_first(choice: str) -> str:
    first, space, rest = choice.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def copa(x: dict) -> tuple[str, list[str], int]:
    link = {"effect": " so ", "cause": " because "}[x["question"]]
    return (
        x["premise"].rstrip().removesuffix(".") + link,
        [lower_first(x["choice1"]), lower_first(x["choice2"])],
        x["label"],
    )


def boolq(x: dict) -> tuple[str, list[str], int]:
    question = x["question"][0].upper() + x["question"][1:].removesuffix("?") + "?"
    return x["passage"] + " " + question + "\n", ["Yes", "No"], 1 - x["answer"]


def rte(x: dict) -> tuple[str, list[str], int]:
    ask = '\nDoes this mean that "' + x["hypothesis"] + '" is true? Yes or No?\n'
    return x["premise"] + ask, ["Yes", "No"], x["label"]


def cb(x: dict) -> tuple[str, list[str], int]:
    ask = ' Can we infer that "' + x["hypothesis"] + '"? Yes, No, or Maybe?\n'
    return "Suppose " + x["premise"] + ask, ["Yes", "No", "Maybe"], x["label"]


def sst2(x: dict) -> tuple[str, list[str], int]:
    return x["sentence"].strip() + " It was", [" terrible", " great"], int(x["label"])


def trec(x: dict) -> tuple[str, list[str], int]:
    kinds = [" Description", " Entity", " Expression", " Human", " Location", " Number"]
    return x["text"] + "\nType:", kinds, int(x["label"])


# The file of the evaluation examples, how it is read, the prompt's rule, and how many examples are scored.
RUNS = {
    "sst2": ("dev.tsv", tab_separated, sst2, 40),
    "rte": ("rte_validation.jsonl", json_lines, rte, 40),
    "cb": ("cb_validation.jsonl", json_lines, cb, 40),
    "boolq": ("boolq_validation.jsonl", json_lines, boolq, 12),
    "copa": ("copa_validation.jsonl", json_lines, copa, 40),
    "trec": ("TREC.test.all", labelled_lines, trec, 40),
}


@pytest.fixture(scope="module")
def oracle(stories) -> Oracle:
    pytest.importorskip("torch"), pytest.importorskip("transformers")
    return Oracle(stories)


@pytest.mark.parametrize("name", RUNS)
def test_zero_shot_scores_and_accuracy(name, test_data, stories, oracle):
    file, read, rule, count = RUNS[name]
    rows = read(test_data / "tasks" / name / file)
    order = np.random.RandomState(0).permutation(len(rows))[:count]
    cases = [rule(rows[i]) for i in order]
    theirs = [oracle.scores(prompt, candidates, (), "mean", "") for prompt, candidates, _ in cases]

    model = Wider(zo.load(stories))
    examples = subset(find_splits(str(test_data / "tasks" / name))[1], count, 0)
    ours = option_scores(model, TASKS[name], examples)
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=0, atol=1e-4)
    result = evaluate(model, TASKS[name], examples)
    right = np.mean([x.argmax() == gold for x, (_, _, gold) in zip(theirs, cases, strict=True)])
    assert result.count == count and result.metrics == {"accuracy": pytest.approx(right)}
    assert [int(p) for p in result.predictions] == [x.argmax() for x in theirs]
