"""Tasks: what is read from files, what the catalog makes of it, metrics, and one clear message for what is wrong."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from zo2jax.tasks.catalog import TASKS, find_task
from zo2jax.tasks.data import Example, demonstration_sets, find_splits, read_examples, subset
from zo2jax.tasks.metrics import accuracy, exact_match, normalize_answer, rouge, token_f1
from zo2jax.tasks.task import Task, as_example, chat_task, completion_task

ROWS = [{"text": 'a "b"', "label": 1}, {"text": "Zürich\u2028x", "label": -1}]


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def json_lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


FORMATS = {
    "a.jsonl": (json_lines(ROWS).replace("\n", "\n\n"), ["line 1", "line 3"]),
    "dos.jsonl": (json_lines(ROWS).replace("\n", "\r\n"), ["line 1", "line 2"]),
    "bom.jsonl": ("\ufeff" + json_lines(ROWS), ["line 1", "line 2"]),
    "a.json": (json.dumps(ROWS, indent=1), ["item 1", "item 2"]),
    "data.json": (json.dumps({"version": 1, "data": ROWS}), ["item 1", "item 2"]),
    "a.tsv": ('text\tlabel\na "b"\t1\nZürich\u2028x\t-1', ["line 2", "line 3"]),
    "dos.tsv": ('label\ttext\r\n1\ta "b"\r\n\r\n-1\tZürich\u2028x\r\n', ["line 2", "line 4"]),
    "a.csv": ('text,label\n"a ""b""",1\n\nZürich\u2028x,-1\n', ["line 2", "line 4"]),
    "a.parquet": (ROWS, ["row 1", "row 2"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_files_are_read(name, tmp_path):
    content, places = FORMATS[name]
    if name.endswith("parquet"):
        write_parquet(tmp_path / name, content)
    else:
        (tmp_path / name).write_bytes(content.encode())
    examples = read_examples(tmp_path / name)
    assert examples == ROWS
    assert [type(e["label"]) for e in examples] == [int, int]
    assert [e.where for e in examples] == [f"{name}, {place}" for place in places]


def test_columns_are_texts_but_for_labels(tmp_path):
    (tmp_path / "a.csv").write_text('id,label,text\n7,entailment,"two\nlines"\n8,1.0,x\n9,2,"2"\n')
    assert [list(e.values()) for e in read_examples(tmp_path / "a.csv")] == [
        ["7", "entailment", "two\nlines"],
        ["8", "1.0", "x"],
        ["9", 2, "2"],
    ]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_trec_files(encoding, tmp_path):
    (tmp_path / "t.all").write_bytes("0 How far is Köln ?\n5 When\n".encode(encoding))
    (tmp_path / "t.label").write_text("ABBR:exp What is X ?\nNUM:date When\n")
    numbers, names = read_examples(tmp_path / "t.all"), read_examples(tmp_path / "t.label")
    assert numbers == [{"label": 0, "text": "How far is Köln ?"}, {"label": 5, "text": "When"}]
    assert names == [{"label": 2, "text": "What is X ?"}, {"label": 5, "text": "When"}]
    assert names[1].where == "t.label, line 2"


BAD = {
    "word.jsonl": (b'{"a": 1}\n{"a": }\n', r"word.jsonl, line 2: not JSON \(Expecting value, column 7\): expected one"),
    "list.jsonl": (b'{"a": 1}\n\n[1, 2]\n', r"list.jsonl, line 3: found '\[1, 2\]', expected an object of fields"),
    "cut.json": (b'[\n{"a": 1},\n{"a"', "cut.json, line 3: not JSON"),
    "one.json": (b'{"a": 1}', r'one.json: expected a list of objects, or \{"data": \[...\]\}'),
    "two.json": (b'[{"a": 1}, 2]', "two.json, item 2: found '2', expected an object"),
    "few.tsv": (b"text\tlabel\nx\t1\ny\n", r"few.tsv, line 3: 1 columns, but the header has 2 \(text, label\)"),
    "many.tsv": (b"text\tlabel\nx\t1\t2\n", "many.tsv, line 2: 3 columns, but the header has 2"),
    "few.csv": (b"text,label\nx\n", "few.csv, line 2: 1 columns, but the header has 2"),
    "open.csv": (b'text,label\nx,1\n"y,2\n', r"open.csv, line 3: not CSV \(unexpected end of data\)"),
    "word.all": (b"0 x\nWHO y\n", "word.all, line 2: found 'WHO y', expected a number or one of DESC, ENTY, ABBR"),
    "bare.label": (b"DESC:manner\n", "bare.label, line 1: found 'DESC:manner', expected a number"),
    "a.parquet": (b"PAR1 no", "a.parquet cannot be read as Parquet"),
    "latin.jsonl": (b'{"a": "K\xf6ln"}\n', r"latin.jsonl is not UTF-8 text .*position 8.*: convert it first"),
    "empty.jsonl": (b"", "empty.jsonl is empty: expected examples"),
    "blank.jsonl": (b"\n \n", "blank.jsonl is empty"),
    "empty.json": (b"", "empty.json is empty"),
    "none.json": (b"[]", "none.json is empty"),
    "header.tsv": (b"text\tlabel\n", "header.tsv is empty"),
    "empty.csv": (b"", "empty.csv is empty"),
    "empty.all": (b"", "empty.all is empty"),
    "a.xml": (b"<a/>", r"a.xml: examples are read from files that end in .jsonl, .json, .tsv, .csv, .parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(name, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name)


@pytest.mark.parametrize("source", ["", "no/such.jsonl", "."])
def test_a_missing_file_is_named(source):
    with pytest.raises(FileNotFoundError, match=f"no file at {source.replace('.', '[.]') or '.empty.'}: expected"):
        read_examples(source)


def fill(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(json.dumps({"from": name}) + "\n")
    return str(folder)


SPLITS = [
    (["cb_train.jsonl", "cb_validation.jsonl", "cb_test.jsonl"], "", "cb_train.jsonl", "cb_validation.jsonl"),
    (["train.jsonl", "dev.jsonl", "test.jsonl", "LICENSE.txt"], "", "train.jsonl", "dev.jsonl"),
    (["train.jsonl", "valid.jsonl", "dev.jsonl"], "", "train.jsonl", "valid.jsonl"),
    (["Train-00000.jsonl", "val.jsonl", "test.jsonl"], "", "Train-00000.jsonl", "val.jsonl"),
    (["train.jsonl", "constraint_test.jsonl"], "", "train.jsonl", "constraint_test.jsonl"),
    (["train.jsonl", "dev.jsonl", "other.jsonl"], "other.jsonl", "train.jsonl", "other.jsonl"),
]


@pytest.mark.parametrize(("names", "validation", "train", "kept"), SPLITS)
def test_files_of_a_folder_are_found_by_their_names(names, validation, train, kept, tmp_path):
    folder = fill(tmp_path / "f", *names)
    assert find_splits(folder, validation) == ([{"from": train}], [{"from": kept}])


def test_a_file_is_for_training_only(tmp_path):
    folder = fill(tmp_path / "f", "a.jsonl", "b.jsonl", "test.jsonl")
    outside = fill(tmp_path / "g", "c.jsonl") + "/c.jsonl"
    assert find_splits(folder + "/a.jsonl") == ([{"from": "a.jsonl"}], [])
    assert find_splits(folder + "/a.jsonl", "b.jsonl")[1] == [{"from": "b.jsonl"}]
    assert find_splits(folder + "/a.jsonl", outside)[1] == [{"from": "c.jsonl"}]


BAD_SPLITS = {
    "nothing": ([], "", FileNotFoundError, "has no file for train; it has no examples at all"),
    "no training": (["a.jsonl", "test.jsonl"], "", FileNotFoundError, "no file for train; it has a.jsonl, test.jsonl"),
    "no evaluation": (
        ["train.jsonl", "a.jsonl"],
        "",
        FileNotFoundError,
        r"no file for validation or valid\|val or dev or test; it has a.jsonl, train.jsonl",
    ),
    "two": (["train.jsonl", "train.json"], "", ValueError, "several files for train: train.json, train.jsonl; keep or"),
    "unknown": (["train.jsonl"], "b.jsonl", FileNotFoundError, "no file at b.jsonl"),
}


@pytest.mark.parametrize("case", BAD_SPLITS)
def test_splits_that_are_not_clear_are_refused(case, tmp_path):
    names, validation, kind, message = BAD_SPLITS[case]
    with pytest.raises(kind, match=message):
        find_splits(fill(tmp_path / "f", *names), validation)


@pytest.fixture
def hub(monkeypatch):
    """In place of `datasets`: data sets with and without a configuration, and one that is made by a script."""
    splits = {
        ("glue", "mnli"): ("train", "validation_matched", "validation_mismatched", "test"),
        ("user/data",): ("train", "validation", "test"),
        ("bare",): ("train", "test"),
        ("old", "rte"): ("train", "validation"),
    }

    def load_dataset(*parts, revision="main"):
        if parts not in splits:
            raise RuntimeError("offline")
        if parts[0] == "old" and revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found old.py")
        return {name: [{"from": name, "n": n} for n in range(2)] for name in splits[parts]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_the_hub_is_read(hub, tmp_path):
    examples = read_examples("hub:glue:mnli:test")
    assert examples == [{"from": "test", "n": 0}, {"from": "test", "n": 1}]
    assert examples[1].where == "hub:glue:mnli:test, row 2"
    assert read_examples("hub:user/data:train")[0]["from"] == "train"


@pytest.mark.parametrize(
    ("source", "validation", "kept"),
    [
        ("hub:user/data", "", "validation"),
        ("hub:glue:mnli", "", "validation_matched"),
        ("hub:glue:mnli", "validation_mismatched", "validation_mismatched"),
        ("hub:bare", "", "test"),
        ("hub:old:rte", "", "validation"),
        ("hub:bare", "hub:user/data:validation", "validation"),
    ],
)
def test_splits_of_the_hub(hub, source, validation, kept):
    train, evaluation = find_splits(source, validation)
    assert (train[0]["from"], evaluation[0]["from"]) == ("train", kept)


def test_the_real_package_reads_local_data_sets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = fill(tmp_path / "f", "train.jsonl", "validation.jsonl")
    assert find_splits(f"hub:{folder}") == ([{"from": "train.jsonl"}], [{"from": "validation.jsonl"}])
    with pytest.raises(FileNotFoundError, match=f"hub:{tmp_path}/no: the hub did not give it"):
        read_examples(f"hub:{tmp_path}/no:train")


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("hub:train", ValueError, "hub: expected hub:PATH or hub:PATH:CONFIG, and :SPLIT"),
        ("hub:a:b:c:train", ValueError, "hub:a:b:c: expected hub:PATH"),
        ("hub:bare:dev", ValueError, "hub:bare: no split 'dev'; it has train, test"),
        ("hub:no:train", FileNotFoundError, r"hub:no: the hub did not give it \(RuntimeError: offline\)"),
    ],
)
def test_what_the_hub_lacks_is_named(hub, source, kind, message):
    with pytest.raises(kind, match=message):
        read_examples(source)


@pytest.mark.parametrize(("name", "source"), [("datasets", "hub:glue:sst2:train"), ("pyarrow", "a.parquet")])
def test_a_package_that_is_not_there_is_named(name, source, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ImportError, match=rf"{source.removesuffix(':train')} needs the package {name}: pip install zo2jax\[data\]"
    ):
        read_examples(source)


def test_a_subset_is_mezos():
    """What MeZO's runner draws: a permutation after numpy.random.seed."""
    train = [Example({"n": n}) for n in range(50)]
    np.random.seed(7)
    assert [e["n"] for e in subset(train, 20, seed=7)] == np.random.permutation(50)[:20].tolist()
    assert len(subset(train, 99, seed=0)) == 50
    np.random.seed(0)
    seeds = np.random.randint(0, 10000, 3)
    sets = demonstration_sets(train, 3, count=4)
    assert sets == [subset(train, 4, seed) for seed in seeds]
    assert len({json.dumps(s) for s in sets}) == 3


def test_real_files(test_data):
    """Counts as `wc -l` gives them, and labels that fit the tasks."""
    counts = {"cb": (250, 56), "boolq": (1000, 3270), "copa": (400, 100), "rte": (1000, 277), "sst2": (60614, 6735)}
    for name, wanted in (counts | {"trec": (5452, 500)}).items():
        train, kept = find_splits(str(test_data / "tasks" / name))
        assert (len(train), len(kept)) == wanted
        task = TASKS[name]
        assert set().union(*map(task.gold_of, kept)) == set(range(len(task.candidates_of(kept[0]))))
    with pytest.raises(ValueError, match=r"cb_test\.jsonl, line 1: the label is -1, expected an integer from 0 to 2"):
        TASKS["cb"].gold_of(read_examples(test_data / "tasks" / "cb" / "cb_test.jsonl")[0])


# Tasks


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


# Metrics, worked by hand.


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
