"""Encoding and batches with a tokenizer of one token per character, so that every row is checked by hand."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from task_fakes import ASK, BOS, EXAMPLES, SAY, Fake, X, Y, make_tokenizer, text
from tokenizers import Tokenizer

from zo2jax.tasks.data import Example
from zo2jax.tasks.encoding import (
    Row,
    TaskBatches,
    TaskHeldOut,
    encode_options,
    encode_prompt,
    encode_target,
    encode_text,
    make_batch,
)
from zo2jax.tasks.task import Task, chat_task, completion_task
from zo2jax.tasks.text import TextBatches, pack


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer) -> Fake:
    return Fake(tokenizer)


def shown(rows) -> list[tuple[str, str]]:
    """(the row's text, the option's text)."""
    return [(text(row.ids), text(row.ids[-row.option :])) for row in rows]


@pytest.mark.parametrize(("prompt_bos", "first"), [(None, BOS), (0, 0), (7, 7)])
def test_special_tokens(model, prompt_bos, first):
    model.prompt_bos = prompt_bos
    assert encode_text(model, "ab") == [first, 97, 98]
    assert encode_text(model, "ab", special_tokens=False) == [97, 98]
    assert encode_text(model, "") == [first]
    assert encode_prompt(model, replace(SAY, special_tokens=False), X) == tuple(b"A b:")


def test_a_model_without_its_tokenizer_is_refused(model):
    with pytest.raises(ValueError, match=r"the model from a/folder has no tokenizer\.json, which reading text needs"):
        encode_text(Fake(None), "a")
    model.vocabulary = 98
    with pytest.raises(ValueError, match="the tokenizer gives token 98, the model has 98: they do not belong together"):
        encode_text(model, "ab")


# (task, demonstrations, calibrated) -> each row's text and its option
ROWS = {
    "plain": (ASK, [], None, [("<s>A b\nNo", "No"), ("<s>A b\nYes", "Yes")]),
    "demonstrations": (ASK, [X, Y], None, [(f"<s>A b\nYes\n\nB\nNo\n\nA b\n{c}", c) for c in ("No", "Yes")]),
    "separator": (replace(ASK, separator=" | "), [Y], None, [(f"<s>B\nNo | A b\n{c}", c) for c in ("No", "Yes")]),
    "sfc": (ASK, [X], "sfc", [("<s>c No", " No"), ("<s>c Yes", " Yes")]),
    "icl_sfc": (ASK, [Y], "icl_sfc", [(f"<s>B\nNo\n\nc {c}", f" {c}") for c in ("No", "Yes")]),
    "calibration alone": (replace(ASK, calibration=""), [], "sfc", [("<s>No", "No"), ("<s>Yes", "Yes")]),
    "spaces around": (replace(ASK, prompt="  {x} "), [], None, [("<s>A b No", " No"), ("<s>A b Yes", " Yes")]),
    "lines around": (
        replace(ASK, prompt="\n {x}\n", candidates=("a ", "b\n")),
        [Y],
        None,
        [("<s>B\na\n\n\n A b\na", "a"), ("<s>B\na\n\n\n A b\nb\n", "b\n")],
    ),
    "lines first": (replace(ASK, prompt="\n {x}\n"), [], None, [("<s>A b\nNo", "No"), ("<s>A b\nYes", "Yes")]),
    "function": (
        replace(ASK, candidates=lambda e: [*e["x"][::2], "ab"]),
        [],
        None,
        [("<s>A b\nA", "A"), ("<s>A b\nb", "b"), ("<s>A b\nab", "ab")],
    ),
    "partly merged": (
        replace(ASK, prompt="r", candidates=("ed", "e!!")),
        [],
        None,
        [("<s>red", "d"), ("<s>re!!", "!!")],
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_candidates(case, model):
    task, demonstrations, calibrated, wanted = ROWS[case]
    rows = encode_options(model, task, X, demonstrations, calibrated=calibrated)
    assert shown(rows) == wanted


@pytest.mark.parametrize("context", [9, 10, 11, 12])
def test_long_rows_lose_their_oldest_tokens_but_for_the_first(context, model):
    """BOS and the last tokens, at most ``context`` together."""
    model.context = context
    whole = "<s>A b\nYes\n\nB\nNo"
    row = encode_options(model, ASK, Y, [X])[0]
    assert shown([row]) == [("<s>" + whole[-(context - 1) :], "No")]
    assert text(encode_prompt(model, ASK, Y, [X], tokens=3)) == "<s>" + whole[:-2][-(context - 4) :]


def test_what_stands_first_in_long_rows(tokenizer):
    talk = Task(prompt="<o>{x}", candidates=("a",), special_tokens=False)
    bare = Task(prompt="{x}", candidates=("a",), special_tokens=False)
    long = {"x": "0123456789"}
    assert shown(encode_options(Fake(tokenizer, 6), talk, long)) == [("<o>6789a", "a")]
    assert shown(encode_options(Fake(tokenizer, 6), bare, long)) == [("56789a", "a")]
    rows = encode_options(Fake(tokenizer, 6, prompt_bos=0), replace(bare, special_tokens=True), long)
    assert rows == [Row((0, *b"6789a"), 1)]


def test_the_first_token_is_never_scored(tokenizer):
    task = Task(prompt="", candidates=("abc", "d"), special_tokens=False)
    assert encode_options(Fake(tokenizer), replace(task, candidates=("abc",)), X) == [Row(tuple(b"abc"), 2)]
    with pytest.raises(ValueError, match="example: 'd' cannot be scored: it is the row's first token, which no model"):
        encode_options(Fake(tokenizer), task, X)


BAD = {
    "merged": (
        Task(prompt="a r", candidates=("x", "e")),
        64,
        "'e' cannot be scored: its tokens merge with the prompt's",
    ),
    "too long": (
        Task(prompt="a", candidates=("b" * 8,)),
        8,
        "'b{8}' cannot be scored: its 8 tokens do not fit the model's",
    ),
    "target too long": (
        Task(prompt="{x}", candidates=("b" * 99,)),
        99,
        "'b{50}' cannot be scored: its 99 tokens do not",
    ),
    "empty": (
        Task(prompt="a", candidates=("x", " ")),
        64,
        "cannot make the candidates: candidate 1 is ' ', expected text",
    ),
    "no field": (Task(prompt="{y}", candidates=("x",)), 64, "no field 'y'; it has x, label, answers"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("objective", ["candidates", "tokens"])
def test_what_cannot_be_encoded_is_named(case, objective, model):
    task, model.context, message = BAD[case]
    examples = [Example({"x": "A", "label": len(task.candidates) - 1, "answers": []}, "t.jsonl, line 2")]
    with pytest.raises(ValueError, match=rf"^t\.jsonl, line 2: {message}"):
        encode_options(model, task, examples[0])
    with pytest.raises(ValueError, match=rf"^t\.jsonl, line 2: {message}"):
        TaskBatches(model, task, examples, batch=1, steps=1, seed=0, objective=objective)


def test_demonstrations_that_cannot_be_shown_are_named(model):
    with pytest.raises(ValueError, match=r"^d\.jsonl, line 9: the label is 7"):
        encode_options(model, ASK, X, [Y, Example(X | {"label": 7}, "d.jsonl, line 9")])


def test_an_option_that_just_fits(model):
    model.context = 9
    assert shown(encode_options(model, Task(prompt="abc", candidates=("d" * 8,)), X)) == [("<s>dddddddd", "dddddddd")]


def test_an_unknown_calibration_is_refused(model):
    with pytest.raises(ValueError, match="calibrated='pmi': expected None, 'sfc' or 'icl_sfc'"):
        encode_options(model, ASK, X, calibrated="pmi")


def test_targets(model):
    class Lines:
        def render(self, messages, *, add_generation_prompt=False):
            return "<o>" + "".join(f"{m['role'][0]}{m['content']}<o>\n" for m in messages) + "a" * add_generation_prompt

    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Ho"}]}
    assert shown([encode_target(model, SAY, Y)]) == [("<s>B: no\n", " no\n")]
    assert shown([encode_target(model, ASK, X)]) == [("<s>A b\nYes", "Yes")]
    assert shown([encode_target(model, chat_task(Lines()), talk)]) == [("<o>uHi<o>\na Ho<o>\n", " Ho<o>\n")]
    pair = {"prompt": "1 + 1 = ", "completion": "2 "}
    assert shown([encode_target(model, completion_task(), pair)]) == [("<s>1 + 1 = 2", " 2")]


def test_prompts(model):
    assert text(encode_prompt(model, SAY, X, [Y, X])) == "<s>B: no\n\nA b: ok\n\nA b:"
    assert text(encode_prompt(model, replace(SAY, prompt=" {x} "), X)) == "<s>A b"
    model.context = 8
    assert text(encode_prompt(model, SAY, {"x": "0123456"}, tokens=2)) == "<s>3456:"
    assert text(encode_prompt(model, SAY, {"x": "0123456"}, tokens=6)) == "<s>:"
    with pytest.raises(ValueError, match="7 new tokens leave no prompt in the model's context of 8"):
        encode_prompt(model, SAY, X, tokens=7)
    with pytest.raises(ValueError, match="example: the prompt is empty: give at least one token"):
        encode_prompt(model, Task(prompt=" ", special_tokens=False), X)


# Batches


def test_a_batch_by_hand():
    batch = make_batch([Row((5, 6, 7, 8), 2), Row((9, 4), 1)], context=64, rows_to=3)
    assert {name: (a.dtype, a.tolist()) for name, a in batch.items()} == {
        "ids": (np.int32, [[5, 6, 7, 8, 0, 0, 0, 0], [9, 4, *[0] * 6], [0] * 8]),
        "lengths": (np.int32, [4, 2, 1]),
        "positions": (np.int32, [[1, 2], [0, 0], [0, 0]]),
        "targets": (np.int32, [[7, 8], [4, 0], [0, 0]]),
        "weights": (np.float32, [[1, 1], [1, 0], [0, 0]]),
    }


def test_batches_have_few_shapes():
    def shape(length, option, context):
        batch = make_batch([Row(tuple(range(length)), option)], context=context)
        return batch["ids"].shape[1], batch["targets"].shape[1]

    times = {shape(n, 1, 999)[0] for n in range(1, 260)}
    assert times == {8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384}
    options = {shape(60, n, 999)[1] for n in range(60)}
    assert options == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}
    assert all(n <= shape(n, n - 1, 50)[0] <= 50 for n in range(1, 51))
    assert shape(33, 20, 40) == (40, 24)


def batches(model, task=ASK, examples=EXAMPLES, **changes) -> TaskBatches:
    options = {"batch": 4, "steps": 20, "seed": 7, "objective": "candidates"} | changes
    return TaskBatches(model, task, examples, **options)


def texts(batch) -> list[str]:
    return [text(ids[:n]) for ids, n in zip(batch["ids"].tolist(), batch["lengths"].tolist(), strict=True)]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("batch", [1, 4, 11, 25])
@pytest.mark.parametrize("objective", ["candidates", "tokens", "generated"])
def test_examples_come_in_the_order_of_text(model, objective, batch):
    """As `TextBatches`: every epoch is a new permutation of all examples, a function of the seed."""
    task = SAY if objective == "generated" else ASK
    got = [
        line for b in batches(replace(model, context=99), task, batch=batch, objective=objective) for line in texts(b)
    ]
    order = np.concatenate([b["ids"][:, 0] for b in TextBatches(pack(np.arange(12), 1), batch, 20, seed=7)])
    rows = {
        "candidates": lambda i: [f"<s>{'ab' * i}\n{c}".replace("<s>\n", "<s>") for c in ("No", "Yes")],
        "tokens": lambda i: [f"<s>{'ab' * i}\n{('No', 'Yes')[i % 2]}".replace("<s>\n", "<s>")],
        "generated": lambda i: [f"<s>{'ab' * i}:"],
    }[objective]
    assert got == [line for i in order.tolist() for line in rows(i)]


def test_a_batch_is_a_function_of_seed_and_index(model):
    wanted = list(batches(model))
    for i in np.random.default_rng(0).permutation(20).tolist():
        batches(model, seed=i + 10, batch=5)[3]  # others in between
        assert same(batches(model, steps=i + 1)[i], wanted[i])
    assert not same(batches(model, seed=8)[0], wanted[0])


def test_batches_are_a_sequence(model):
    made = batches(model, steps=10)
    whole = list(made)
    assert len(made) == len(whole) == 10
    for part in (slice(3, 7), slice(None, None, -2), slice(-3, None), slice(8, 99)):
        assert len(made[part]) == len(whole[part])
        assert all(same(a, b) for a, b in zip(made[part], whole[part], strict=True))
    assert same(made[-1], whole[9]) and same(made[-10], whole[0])
    for index in (10, -11):
        with pytest.raises(IndexError, match="of 10"):
            made[index]


def test_candidates_are_filled_up_to_the_largest_of_all_examples(model):
    task = Task(prompt="{x}:", candidates=lambda e: e["c"], label=lambda e: e["gold"])
    examples = [{"x": "A", "c": ["p", "q"], "gold": [1, 0]}, {"x": "B", "c": ["r", "st", "u"], "gold": 2}]
    batch = next(iter(TaskHeldOut(model, task, examples, batch=3, objective="candidates")))
    empty = "\x00"
    assert texts(batch) == ["<s>A:p", "<s>A:q", empty, "<s>B:r", "<s>B:st", "<s>B:u", *[empty] * 3]
    assert (batch["labels"].dtype, batch["labels"].tolist()) == (np.int32, [1, 2, -1])
    assert batch["weights"].sum(2).tolist() == [[1, 1, 0], [1, 2, 1], [0, 0, 0]]
    one = TaskHeldOut(model, task, examples, batch=1, objective="candidates")
    assert [b["ids"].shape for b in one] == [(3, 8), (3, 8)]


def test_candidates_of_one_token_share_a_row(model):
    """What is before them is read once; fewer candidates than others have, and filler, weigh nothing."""
    task = Task(prompt="{x}:", candidates=lambda e: e["c"], label=lambda e: e["gold"])
    examples = [{"x": "A", "c": ["p", "q", "r"], "gold": 2}, {"x": "Bc", "c": ["s", "t"], "gold": 0}]
    batch = next(iter(TaskHeldOut(model, task, examples, batch=3, objective="candidates")))
    assert texts(batch) == ["<s>A:", "<s>Bc:", "\x00"]
    assert batch["positions"].tolist() == [[2, 2, 2], [3, 3, 0], [0, 0, 0]]
    assert batch["targets"].tolist() == [list(b"pqr"), [*b"st", 0], [0, 0, 0]]
    assert batch["weights"].tolist() == [[[1], [1], [1]], [[1], [1], [0]], [[0], [0], [0]]]
    assert batch["labels"].tolist() == [2, 0, -1]
    longer = [*examples, {"x": "C", "c": ["u", "vw"], "gold": 0}]
    batch = next(iter(TaskHeldOut(model, task, longer, batch=3, objective="candidates")))
    assert len(batch["ids"]) == 9 and batch["weights"].shape == (3, 3, 2)  # all of one form, for one program


@pytest.mark.parametrize("batch", [1, 3, 11, 20])
@pytest.mark.parametrize("objective", ["candidates", "tokens", "generated"])
def test_held_out_examples_come_once_and_in_order(model, objective, batch):
    task = replace(SAY, tokens=5) if objective == "generated" else ASK
    held_out = TaskHeldOut(model, task, EXAMPLES, batch=batch, objective=objective)
    made, filler = list(held_out), -11 % batch
    rows = {"candidates": 2}.get(objective, 1)
    assert len(made) == len(held_out) == -(-11 // batch)
    assert {len(b["ids"]) for b in made} == {batch * rows}
    lines = [line for b in made for line in texts(b)]
    assert [line.count("ab") for line in lines] == [i for i in range(11) for _ in range(rows)] + [0] * filler * rows
    if objective == "candidates":
        assert [n for b in made for n in b["labels"].tolist()] == [i % 2 for i in range(11)] + [-1] * filler
    if objective == "generated":
        assert set(made[0]) == {"ids", "lengths", "answers"}
        assert [a for b in made for a in b["answers"]] == [[str(i)] for i in range(11)] + [[]] * filler
    else:
        weights = np.concatenate([b["weights"].reshape(batch * rows, -1).sum(1) for b in made])
        assert (weights > 0).tolist() == [True] * 11 * rows + [False] * filler * rows


def test_prompts_leave_room_for_what_is_generated(model):
    model.context = 16
    batch = batches(model, replace(SAY, tokens=6), objective="generated", batch=11, steps=1)[0]
    assert batch["lengths"].max() == 10
    candidates = replace(ASK, tokens=4, candidates=(" a", " b ", "c"), label=lambda e: [2, 1])
    assert batches(model, candidates, objective="generated", batch=1)[0]["answers"] == [["b", "c"]]


def test_batches_do_not_keep_the_model(model):
    """Its parameters would stay in memory, beside those that are trained."""
    kept = [batches(model), TaskHeldOut(model, ASK, EXAMPLES, batch=2, objective="tokens")]
    gone = weakref.ref(other := Fake(model.tokenizer))
    kept += [batches(other), TaskHeldOut(other, ASK, EXAMPLES, batch=2, objective="tokens")]
    del other
    gc.collect()
    assert gone() is None and len(kept) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": []}, "no examples: expected at least one"),
        ({"objective": "f1"}, "objective='f1': expected 'candidates', 'tokens' or 'generated'"),
        ({"task": SAY}, "line 0: cannot make the candidates: found None"),
        ({"examples": [*EXAMPLES, {"x": "a", "label": 2}]}, "example: the label is 2, expected an integer from 0 to 1"),
        ({"task": replace(SAY, tokens=63), "objective": "generated"}, "63 new tokens leave no prompt"),
    ],
)
def test_batches_that_cannot_be_are_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        batches(model, **changes)
    with pytest.raises(ValueError, match=message):
        options = {"task": ASK, "examples": EXAMPLES, "batch": 2, "objective": "candidates"} | changes
        TaskHeldOut(model, options.pop("task"), options.pop("examples"), **options)
