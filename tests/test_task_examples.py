"""Tasks against prompts written by hand, and against MeZO's rules on transformers (task_examples, task_oracle)."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import task_oracle
from task_examples import CASES, Case
from task_oracle import Oracle, Wider, wider

import zo2jax as zo
from zo2jax.models.tokenizers import read_tokenizer
from zo2jax.tasks.catalog import TASKS
from zo2jax.tasks.encoding import TaskBatches, TaskHeldOut, encode_options, encode_prompt, encode_target
from zo2jax.tasks.scoring import evaluate, option_scores
from zo2jax.tasks.task import Task

CHOICE = [name for name, cases in CASES.items() if cases[0].candidates]
TEXT = [name for name in CASES if name not in CHOICE]
LOSSES = [(name, "tokens") for name in CASES] + [(name, "candidates") for name in CHOICE]


@pytest.fixture(scope="module")
def oracle(stories) -> Oracle:
    pytest.importorskip("torch"), pytest.importorskip("transformers")
    return Oracle(stories)


@pytest.fixture(scope="module")
def model(stories):
    return zo.load(stories)


@pytest.fixture(scope="module")
def wide(model) -> Wider:
    return Wider(model)


def calibration(name: str, case: Case) -> str:
    if name == "copa":
        return {"effect": "so ", "cause": "because "}[case.fields["question"]]
    return {"sst2": " It was", "record": "-"}.get(name, "")


def fields(cases: list[Case]) -> list[dict]:
    return [case.fields for case in cases]


def texts(cases: list[Case]) -> list[str]:
    return [case.prompt + case.target for case in cases]


def demonstrations(name: str, count: int) -> list[Case]:
    return CASES[name][-count:] if count else []


def scored(name: str, count: int) -> list[Case]:
    """All examples, or half of them after demonstrations, which make rows long."""
    return CASES[name][:5] if count else CASES[name]


def pairs(rows) -> list[tuple[tuple[int, ...], int]]:
    return [(tuple(row.ids), row.option) for row in rows]


def labels(case: Case) -> int:
    """The candidate that is trained: the first of the gold ones in the order of the data set."""
    return case.candidates.index(case.target)


# The oracle itself, by hand.


def test_oracle_joins_and_truncates():
    assert task_oracle.joined([" a b\n", "c "], " d \n") == "a b\n\nc\n\n d \n"
    assert task_oracle.joined([], " d e ") == "d e"
    assert task_oracle.truncated([1, 5, 6, 7, 8], 3) == (1, 7, 8)
    assert task_oracle.truncated([1, 5, 6], 3) == (1, 5, 6)

    def encode(text):
        return [0, *text.encode()]

    assert task_oracle.option_row(encode, 9, " ab ", "cd ", ["x"]) == ((0, *b"x\n\nab cd"), 2 + 1)
    assert task_oracle.option_row(encode, 4, "-", " cd", None) == ((0, *b" cd"), 3)


def test_oracle_metrics_by_hand():
    assert task_oracle.token_f1("The cat, sat!", ["dog", "a cat"]) == pytest.approx(2 / 3)
    assert task_oracle.token_f1("", ["the"]) == 1 and task_oracle.token_f1("x", ["the"]) == 0
    assert task_oracle.token_f1("Unanswerable.", ["unanswerable"]) == 1
    assert task_oracle.token_f1("it is unanswerable", ["unanswerable"]) == 0


# Prompts, candidates and gold.


def test_every_task_has_examples():
    assert set(CASES) == set(TASKS)


@pytest.mark.parametrize("name", CASES)
def test_prompts_candidates_and_gold_are_those_written_by_hand(name):
    task = TASKS[name]
    for case in CASES[name]:
        assert task.prompt_of(case.fields) == case.prompt
        assert task.gold_text(case.fields) == case.target
        if case.candidates:
            assert task.candidates_of(case.fields) == case.candidates
            assert task.gold_of(case.fields) == case.gold
            assert task.calibration_of(case.fields) == calibration(name, case)
        else:
            assert tuple(" ".join(a.split("\n")) for a in task.answers_of(case.fields)) == case.gold


# Tokens.


@pytest.mark.parametrize("context", [512, 44])
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("name", CHOICE)
def test_tokens_and_option_lengths(name, count, context, model, oracle):
    shots = demonstrations(name, count)
    small = replace(model, config=replace(model.config, context=context))
    for case in CASES[name]:
        for kind, prompt, before in [
            (None, case.prompt, texts(shots)),
            ("sfc", calibration(name, case), None),
            ("icl_sfc", calibration(name, case), texts(shots)),
        ]:
            ours = encode_options(small, TASKS[name], case.fields, fields(shots), calibrated=kind)
            theirs = [task_oracle.option_row(oracle.encode, context, prompt, c, before) for c in case.candidates]
            assert pairs(ours) == theirs, (kind, case.prompt)
        target = task_oracle.option_row(oracle.encode, context, case.prompt, case.target, ())
        assert pairs([encode_target(small, TASKS[name], case.fields)]) == [target]


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("name", TEXT)
def test_tokens_of_free_text(name, count, model, oracle):
    shots = demonstrations(name, count)
    for case in CASES[name]:
        for context, tokens in [(512, 0), (44, 0), (44, 8)]:
            small = replace(model, config=replace(model.config, context=context))
            ours = encode_prompt(small, TASKS[name], case.fields, fields(shots), tokens=tokens)
            assert ours == task_oracle.prompt_ids(oracle.encode, context - tokens, case.prompt, texts(shots))
        target = task_oracle.option_row(oracle.encode, 512, case.prompt, case.target, ())
        assert pairs([encode_target(model, TASKS[name], case.fields)]) == [target]


@pytest.mark.parametrize("name", CASES)
def test_tokens_of_opt(name, test_data):
    pytest.importorskip("transformers")
    folder = test_data / "tokenizers" / "gpt2"
    encode = task_oracle.opt_encode(folder)
    tokenizer = read_tokenizer(folder, "gpt2")
    for context in (2048, 24):
        config = SimpleNamespace(context=context, prompt_bos=0, vocabulary=50257)
        opt = SimpleNamespace(config=config, tokenizer=tokenizer, folder=folder)
        for case in CASES[name]:
            shots = demonstrations(name, 2)
            if case.candidates:
                rows = encode_options(opt, TASKS[name], case.fields, fields(shots))
                theirs = [
                    task_oracle.option_row(encode, context, case.prompt, c, texts(shots)) for c in case.candidates
                ]
                assert pairs(rows) == theirs
                assert {row.ids[0] for row in rows} == {0}
            else:
                ours = encode_prompt(opt, TASKS[name], case.fields, fields(shots), tokens=8)
                assert ours == task_oracle.prompt_ids(encode, context - 8, case.prompt, texts(shots))
                if context > 24:
                    target = task_oracle.option_row(encode, context, case.prompt, case.target, ())
                    assert pairs([encode_target(opt, TASKS[name], case.fields)]) == [target]


# Scores.


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("name", CHOICE)
def test_option_scores(name, count, wide, oracle):
    shots, cases, task = demonstrations(name, count), scored(name, count), TASKS[name]
    for scoring in ("mean", "sum", "sfc", "icl_sfc"):
        ours = option_scores(wide, task, fields(cases), demonstrations=fields(shots) or None, scoring=scoring)
        theirs = [
            oracle.scores(case.prompt, case.candidates, texts(shots), scoring, calibration(name, case))
            for case in cases
        ]
        for our, their in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(our, their, rtol=0, atol=1e-4, err_msg=scoring)
    assert max(np.abs(x).max() for x in theirs) > 0.1


@pytest.mark.parametrize("name", ["copa", "record", "trec"])
def test_scores_do_not_depend_on_the_batch(name, model, wide):
    examples = fields(CASES[name])
    whole = option_scores(model, TASKS[name], examples, batch=16)
    single = option_scores(wide, TASKS[name], examples, batch=1)
    assert [len(x) for x in whole] == [len(case.candidates) for case in CASES[name]]
    for a, b in zip(whole, single, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    backwards = option_scores(model, TASKS[name], examples[::-1], batch=16)
    for a, b in zip(whole, backwards[::-1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_each_example_may_have_its_own_demonstrations(wide, oracle):
    cases = CASES["cb"][:4]
    shots = [CASES["cb"][i : i + i % 3] for i in range(4, 8)]
    ours = option_scores(wide, TASKS["cb"], fields(cases), demonstrations=[fields(s) for s in shots])
    for our, case, mine in zip(ours, cases, shots, strict=True):
        theirs = oracle.scores(case.prompt, case.candidates, texts(mine), "mean", "")
        np.testing.assert_allclose(our, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sst2", "copa", "record", "boolq", "trec"])
@pytest.mark.parametrize(("scoring", "count"), [("mean", 0), ("icl_sfc", 2)])
def test_accuracy(name, scoring, count, wide, oracle):
    cases, shots = scored(name, count), demonstrations(name, count)
    result = evaluate(wide, TASKS[name], fields(cases), demonstrations=fields(shots), scoring=scoring)
    theirs = [
        oracle.scores(case.prompt, case.candidates, texts(shots), scoring, calibration(name, case)).argmax()
        for case in cases
    ]
    assert [int(p) for p in result.predictions] == theirs
    right = np.mean([p in case.gold for p, case in zip(theirs, cases, strict=True)])
    assert result.metrics == {"accuracy": pytest.approx(right)} and result.count == len(cases)


# Generation.


@pytest.mark.parametrize(("stop", "count"), [(("\n",), 0), (("\n",), 2), ((".", "?"), 0)])
@pytest.mark.parametrize("name", TEXT)
def test_generated_answers(name, stop, count, model, oracle):
    if name == "cnn_dailymail" and stop == ("\n",):
        stop = ()
    tokens = 8 if stop == ("\n",) else 14
    task = replace(TASKS[name], tokens=tokens, stop=stop)
    cases, shots = scored(name, count), demonstrations(name, count)
    result = evaluate(model, task, fields(cases), demonstrations=fields(shots) or None)
    prompts = [
        task_oracle.prompt_ids(oracle.encode, oracle.context - tokens, case.prompt, texts(shots)) for case in cases
    ]
    theirs = [oracle.generate(ids, tokens, stop) for ids in prompts]
    assert result.predictions == theirs
    metric = task_oracle.rouge if name == "cnn_dailymail" else task_oracle.token_f1
    values = [metric(text, case.gold) for text, case in zip(theirs, cases, strict=True)]
    expected = (
        {key: np.mean([v[key] for v in values]) for key in values[0]}
        if isinstance(values[0], dict)
        else {"token_f1": np.mean(values)}
    )
    assert result.metrics == pytest.approx(expected, abs=1e-9)
    assert count or max(expected.values()) > 0 or name != "squad"  # some words agree, so that the metric is tried


# Training losses.


@pytest.fixture(scope="module")
def loss(model):
    return jax.jit(model.loss)


def rows_of(batch: dict) -> list[tuple[int, ...]]:
    return [tuple(int(i) for i in ids[:n]) for ids, n in zip(batch["ids"], batch["lengths"], strict=True)]


def members(batch: dict, firsts: dict[tuple[int, ...], int]) -> list[int]:
    """Which examples a batch holds, by their first rows; filler is left out."""
    rows = rows_of(batch)
    each = len(rows) // len(batch["labels"]) if "labels" in batch else 1
    kept = batch["labels"] >= 0 if "labels" in batch else np.asarray(batch["weights"]).any(axis=1)
    return [firsts[row] for row, keep in zip(rows[::each], kept, strict=True) if keep]


@pytest.mark.parametrize(("name", "objective"), LOSSES)
def test_training_losses(name, objective, model, loss, oracle):
    cases, examples = CASES[name], fields(CASES[name])
    if objective == "candidates":
        options = [oracle.option_rows(case.prompt, case.candidates, ()) for case in cases]
        firsts = {rows[0][0]: i for i, rows in enumerate(options)}

        def expected(those):
            return oracle.candidates_loss([options[i] for i in those], [labels(cases[i]) for i in those])
    else:
        rows = [oracle.option_rows(case.prompt, [case.target], ())[0] for case in cases]
        firsts = {ids: i for i, (ids, _) in enumerate(rows)}

        def expected(those):
            return oracle.tokens_loss([rows[i] for i in those])

    size = 12 // max(len(case.candidates) for case in cases) if objective == "candidates" else 4
    steps = 12 // size
    train = TaskBatches(model, TASKS[name], examples, batch=size, steps=steps, seed=3, objective=objective)
    held_out = TaskHeldOut(model, TASKS[name], examples, batch=size, objective=objective)
    seen = []
    for batch in [*train, *held_out]:
        those = members(batch, firsts)
        given = batch if (name, objective) == ("cb", "candidates") else wider(batch)
        np.testing.assert_allclose(float(loss(model.params, given)), expected(those), rtol=0, atol=1e-4)
        seen.append(those)
    drawn = [i for those in seen[:steps] for i in those]
    assert len(train) == steps and len(drawn) == steps * size
    assert sorted(drawn[:10]) == list(range(10)) and set(Counter(drawn[10:]).values()) == {1}
    assert [i for those in seen[steps:] for i in those] == list(range(10))


# Candidates of one token, which share a row; stories260K has none in the tasks above.

SHORT = Task(prompt="{x} was", candidates=(" a", " the", " in", " so"), calibration="It was")
SHORT_EXAMPLES = [
    {"x": x, "label": i % 4} for i, x in enumerate(["Tom", "Once upon a time there", "The big red ball", "She", "Lily"])
]


@pytest.mark.parametrize("scoring", ["mean", "sum", "sfc", "icl_sfc"])
def test_scores_of_candidates_that_share_a_row(scoring, model, oracle):
    shots = SHORT_EXAMPLES[3:]
    shown = [f"{e['x']} was{SHORT.candidates[e['label']]}" for e in shots]
    scores = option_scores(model, SHORT, SHORT_EXAMPLES, demonstrations=shots, scoring=scoring, batch=3)
    for example, mine in zip(SHORT_EXAMPLES, scores, strict=True):
        theirs = oracle.scores(f"{example['x']} was", SHORT.candidates, shown, scoring, "It was")
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


def test_losses_of_candidates_that_share_a_row(model, loss, oracle):
    options = [oracle.option_rows(f"{e['x']} was", SHORT.candidates, ()) for e in SHORT_EXAMPLES]
    held_out = list(TaskHeldOut(model, SHORT, SHORT_EXAMPLES, batch=3, objective="candidates"))
    assert [len(batch["ids"]) for batch in held_out] == [3, 3]  # a row for an example, not one for a candidate
    for batch, those in zip(held_out, (range(3), range(3, 5)), strict=True):
        expected = oracle.candidates_loss([options[i] for i in those], [SHORT_EXAMPLES[i]["label"] for i in those])
        np.testing.assert_allclose(float(loss(model.params, batch)), expected, rtol=0, atol=1e-4)
