"""What is read from files and the hub: formats, splits, subsets, and one clear message for what is wrong."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from zo2jax.tasks.catalog import TASKS
from zo2jax.tasks.data import Example, demonstration_sets, find_splits, read_examples, subset

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
