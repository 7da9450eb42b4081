"""Tasks: what they make of an example, what the catalog asks, and one clear message for what is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from zo2jax.tasks.catalog import TASKS, find_task
from zo2jax.tasks.data import Example
from zo2jax.tasks.metrics import exact_match, rouge
from zo2jax.tasks.task import Task, as_example, chat_task, completion_task

AT = Example({"text": "A {b}", "label": 1, "answers": ["x", "y"]}, "t.jsonl, line 3")
CHOICE = Task(prompt="{text}:", candidates=(" no", " yes"))
FREE = Task(prompt="{text}:")


def test_a_task_reads_an_example():
    assert CHOICE.prompt_of(AT) == FREE.prompt_of(AT) == "A {b}:"
    assert (CHOICE.candidates_of(AT), CHOICE.gold_of(AT), CHOICE.gold_text(AT)) == ((" no", " yes"), {1}, " yes")
    assert (FREE.answers_of(AT), FREE.gold_text(AT), FREE.calibration_of(AT)) == (("x", "y"), " x\n", "")
    functions = Task(
        prompt=lambda e: e["text"].lower(),
        candidates=lambda e: [e["text"], "B"],
        label=lambda e: [1, 0],
        calibration="{label}",
    )
    assert (functions.prompt_of(AT), functions.candidates_of(AT)) == ("a {b}", ("A {b}", "B"))
    assert (functions.gold_of(AT), functions.gold_text(AT), functions.calibration_of(AT)) == ({0, 1}, "B", "1")
    other = replace(FREE, answers=lambda e: e["text"], target=lambda e: f"<{e['text']}>")
    assert (other.answers_of(AT), other.gold_text(AT)) == (("A {b}",), "<A {b}>")


@pytest.mark.parametrize(
    ("label", "gold"),
    [(True, {1}), (False, {0}), (np.int64(1), {1}), ((1, 0), {0, 1}), ([0], {0}), ("yes", {1}), (["no"], {0})],
)
def test_labels(label, gold):
    assert CHOICE.gold_of({"label": label}) == gold


BAD_TASKS = {
    "format field": (FREE.prompt_of, {}, "no field 'text'; it has label, answers"),
    "function field": (Task(prompt=lambda e: e["text"]).prompt_of, {}, "no field 'text'; it has label, answers"),
    "label field": (
        replace(CHOICE, label="gold").gold_of,
        {},
        "no field 'gold'; it has label, answers",
    ),
    "answers field": (replace(FREE, answers="gold").gold_text, {}, "no field 'gold'; it has label, answers"),
    "attribute": (
        Task(prompt=lambda e: e["label"].strip()).prompt_of,
        {},
        "cannot make the prompt: AttributeError: 'int'",
    ),
    "no text": (Task(prompt=lambda e: e["label"]).prompt_of, {}, "cannot make the prompt: found 1, expected text"),
    "position": (Task(prompt="{}").prompt_of, {}, "cannot make the prompt: Format string contains positional fields"),
    "high": (CHOICE.gold_of, {"label": 2}, "the label is 2, expected an integer from 0 to 1"),
    "negative": (CHOICE.gold_of, {"label": -1}, "the label is -1, expected an integer from 0 to 1"),
    "text label": (CHOICE.gold_of, {"label": "perhaps"}, "the label is 'perhaps', expected an integer from 0 to 1"),
    "fraction": (CHOICE.gold_of, {"label": 1.0}, "the label is 1.0, expected an integer"),
    "null": (CHOICE.gold_of, {"label": None}, "the label is None, expected an integer"),
    "none of several": (CHOICE.gold_of, {"label": []}, r"the label is \[\], expected an integer"),
    "one of several": (CHOICE.gold_of, {"label": [0, 5]}, r"the label is \[0, 5\], expected an integer"),
    "empty candidate": (
        replace(CHOICE, candidates=("a", "  ")).candidates_of,
        {},
        "candidate 1 is '  ', expected text",
    ),
    "candidate of None": (replace(CHOICE, candidates=lambda e: [None]).candidates_of, {}, "candidate 0 is None"),
    "no candidates": (replace(CHOICE, candidates=()).candidates_of, {}, r"found \(\), expected a list of texts"),
    "free text": (FREE.candidates_of, {}, "cannot make the candidates: found None, expected a list of texts"),
    "no answers": (FREE.answers_of, {"answers": []}, r"found \[\], expected one text or several"),
    "a number": (FREE.answers_of, {"answers": [1]}, r"found \[1\], expected one text or several"),
    "not several": (FREE.answers_of, {"answers": None}, "cannot make the answers: TypeError"),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_what_a_task_cannot_use_is_named(case):
    method, changes, message = BAD_TASKS[case]
    fields = {"label": 1, "answers": ["x"]} | changes
    with pytest.raises(ValueError, match=rf"^cb\.jsonl, line 3: .*{message}"):
        method(Example(fields, "cb.jsonl, line 3"))
    with pytest.raises(ValueError, match=f"^example: .*{message}"):
        method(fields)


def test_tasks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"prompt='\{text' is no format string \(.*\); a brace is written \{\{"):
        Task(prompt="{text")
    with pytest.raises(ValueError, match=r"candidates='Yes': expected several texts"):
        Task(prompt="", candidates="Yes")


def test_an_example_stays_what_it_is():
    assert as_example(AT) is AT
    assert as_example({"a": 1}).where == "example"


def test_completions():
    task = completion_task("question", "reply")
    example = {"question": "{2} + 2 =", "reply": " {4}\n"}
    assert (task.prompt_of(example), task.gold_text(example)) == ("{2} + 2 =", " {4}\n")
    assert (task.answers_of(example), task.metric) == ((" {4}\n",), exact_match)
    assert completion_task(metric=rouge, tokens=7).tokens == 7
    with pytest.raises(ValueError, match="example: no field 'question'; it has prompt"):
        task.prompt_of({"prompt": "x"})


class Lines:
    """A chat template of one line a message."""

    def render(self, messages, *, add_generation_prompt=False):
        if any("role" not in m for m in messages):
            raise TypeError("no role")
        return (
            "<s>" + "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:" * add_generation_prompt
        )


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho {x}"}]


def test_chats():
    task = chat_task(Lines(), tokens=9)
    example = {"messages": [*TALK, *TALK]}
    assert task.prompt_of(example) == "<s>user: Hi\nassistant: Ho {x}\nuser: Hi\nassistant:"
    assert (task.gold_text(example), task.answers_of(example)) == (" Ho {x}\n", ("Ho {x}",))
    assert (task.special_tokens, task.stop, task.tokens) == (False, (), 9)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([*TALK, TALK[0]], "the last message is of role 'user', expected 'assistant'"),
        ([], r"messages is '\[\]', expected a list of messages"),
        ("Hi", "messages is 'Hi', expected a list of messages"),
        ([{"content": "x"}], "the last message is of role None, expected 'assistant'"),
        ([{"content": "x"}, TALK[1]], "TypeError: no role"),
    ],
)
def test_chats_that_cannot_be_trained_are_named(messages, message):
    with pytest.raises(ValueError, match=f"^c.jsonl, line 2: cannot make the .*{message}"):
        chat_task(Lines()).gold_text(Example({"messages": messages}, "c.jsonl, line 2"))


def test_a_template_that_rewrites_the_prompt_is_refused():
    class Counted:
        def render(self, messages, *, add_generation_prompt=False):
            return f"{len(messages)} messages"

    with pytest.raises(
        ValueError, match="example: cannot make the target: the chat template ends the prompt with '1 mes"
    ):
        chat_task(Counted()).gold_text({"messages": TALK})


# The catalog: prompt + candidate (or target), right candidates (or answers), calibration; written by hand.

CATALOG = [
    ("sst2", {"sentence": " a gem . ", "label": 1}, "a gem . It was great", {1}, " It was"),
    (
        "rte",
        {"premise": "P.", "hypothesis": "H", "label": 0},
        'P.\nDoes this mean that "H" is true? Yes or No?\nYes',
        {0},
        "",
    ),
    (
        "cb",
        {"premise": "P.", "hypothesis": "H", "label": 2},
        'Suppose P. Can we infer that "H"? Yes, No, or Maybe?\nMaybe',
        {2},
        "",
    ),
    ("boolq", {"passage": "P.", "question": "is it", "answer": True}, "P. Is it?\nYes", {0}, ""),
    ("boolq", {"passage": "P.", "question": "Is it?", "answer": False}, "P. Is it?\nNo", {1}, ""),
    (
        "wsc",
        {"text": "Bo saw it. It fell.", "span1_text": "Bo", "span2_text": "It", "label": 0},
        'Bo saw it. It fell.\nIn the previous sentence, does the pronoun "it" refer to Bo? Yes or No?\nNo',
        {0},
        "",
    ),
    (
        "wic",
        {"word": "bat", "sentence1": "A.", "sentence2": "B.", "label": 1},
        'Does the word "bat" have the same meaning in these two sentences? Yes, No?\nA.\nB.\nYes',
        {1},
        "",
    ),
    (
        "multirc",
        {"paragraph": "P.", "question": "Q?", "answer": "A", "label": 0},
        'P.\nQuestion: Q?\nI found this answer "A". Is that correct? Yes or No?\nNo',
        {0},
        "",
    ),
    (
        "copa",
        {"premise": "It rained. ", "choice1": "I left.", "choice2": "The Sun shone.", "question": "effect", "label": 1},
        "It rained so the Sun shone.",
        {1},
        "so ",
    ),
    (
        "copa",
        {"premise": "It rained..", "choice1": "I left.", "choice2": "X", "question": "cause", "label": 0},
        "It rained. because I left.",
        {0},
        "because ",
    ),
    (
        "record",
        {
            "passage": "T\n@highlight\nBo won",
            "query": "It was @placeholder!",
            "entities": ["Al", "Bo", "B"],
            "answers": ["B", "Bo"],
        },
        "T\n- Bo won\n- It was B!",
        {1, 2},
        "-",
    ),
    (
        "squad",
        {"title": "T", "context": "C", "question": " Q? ", "answers": {"text": ["a b", "b"], "answer_start": [0, 2]}},
        "Title: T\nContext: C\nQuestion: Q?\nAnswer: a b\n",
        ("a b", "b"),
        "",
    ),
    (
        "drop",
        {"passage": "P", "question": "Q? ", "answers_spans": {"spans": ["7", "seven"], "types": ["number", "span"]}},
        "Passage: P\nQuestion: Q?\nAnswer: 7\n",
        ("7", "seven"),
        "",
    ),
    ("trec", {"text": "Who ?", "label": 3}, "Who ?\nType: Human", {3}, ""),
    (
        "mnli",
        {"premise": "P", "hypothesis": "H", "label": 1},
        'P\nDoes this mean that "H" is true? Yes, Maybe, or No?\nMaybe',
        {1},
        "",
    ),
    (
        "squad_v2",
        {"title": "T", "context": "C", "question": "Q?", "answers": {"text": [], "answer_start": []}},
        "Title: T\nContext: C\nQuestion: Q?\nAnswer: unanswerable\n",
        ("unanswerable",),
        "",
    ),
    ("squad_v2", {"title": "", "context": "", "question": "", "answers": {"text": ["x"]}}, None, ("x",), ""),
    (
        "cnn_dailymail",
        {"article": "A.", "highlights": "One .\nTwo ."},
        "A.\nTL;DR: One . Two .\n",
        ("One . Two .",),
        "",
    ),
]


@pytest.mark.parametrize(("name", "example", "text", "gold", "calibration"), CATALOG)
def test_the_catalog(name, example, text, gold, calibration):
    task = find_task(name)
    if text is not None:
        assert task.prompt_of(example) + task.gold_text(example) == text
    assert (task.answers_of(example) if task.candidates is None else task.gold_of(example)) == gold
    assert task.calibration_of(example) == calibration


def test_every_task_is_tested():
    assert set(TASKS) == {row[0] for row in CATALOG}
    assert {name for name, task in TASKS.items() if not task.classification} == {
        *("copa", "record", "squad", "squad_v2", "drop", "cnn_dailymail")
    }


@pytest.mark.parametrize("number", range(6))
def test_trec_classes_of_both_sources(number):
    """Hugging Face numbers the classes ABBR, ENTY, DESC, HUM, LOC, NUM."""
    kind = [" Expression", " Entity", " Description", " Human", " Location", " Number"][number]
    assert TASKS["trec"].gold_text({"text": "x", "coarse_label": number, "fine_label": 9}) == kind


def test_bad_fields_of_the_catalog():
    for answer in ("false", -1, None):
        with pytest.raises(ValueError, match=f"the label is {answer!r}, expected an integer from 0 to 1"):
            TASKS["boolq"].gold_of({"answer": answer})
    with pytest.raises(ValueError, match="cannot make the label: the answer 'Z' is none of the entities 'A'"):
        TASKS["record"].gold_of({"entities": ["A"], "answers": ["Z"], "query": "@placeholder"})
    with pytest.raises(ValueError, match="the label is -1, expected an integer from 0 to 5"):
        TASKS["trec"].gold_of({"coarse_label": -1})
    with pytest.raises(ValueError, match="cannot make the prompt: question is 'reason', expected 'effect' or 'cause'"):
        TASKS["copa"].prompt_of({"premise": "P", "question": "reason"})


@pytest.mark.parametrize(
    ("name", "wanted"), [("SST-2", "sst2"), ("SQuAD_v2", "squad_v2"), ("CNN-DailyMail", "cnn_dailymail")]
)
def test_tasks_are_found(name, wanted):
    assert find_task(name) is TASKS[wanted]


def test_unknown_tasks_are_named():
    with pytest.raises(
        ValueError, match=r"unknown task 'SST-3': did you mean sst2\? the known ones are sst2, rte, cb,"
    ):
        find_task("SST-3")
    with pytest.raises(ValueError, match="unknown task 'xyzzy': the known ones are sst2"):
        find_task("xyzzy")
