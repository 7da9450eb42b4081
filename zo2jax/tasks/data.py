"""Examples of a task: read from local files or the Hugging Face hub, split, and sampled."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Example(dict[str, Any]):
    """The fields of one example, and ``where`` they were read, for messages.

    A field that is not there raises ValueError (no KeyError), which says so.

    >>> Example({"label": 1}, "cb_train.jsonl, line 3")["premise"]
    Traceback (most recent call last):
    ...
    ValueError: cb_train.jsonl, line 3: no field 'premise'; it has label
    """

    where: str

    def __init__(self, fields: Mapping[str, Any], where: str = "example") -> None:
        """Takes the fields over."""
        super().__init__(fields)
        self.where = where

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.where}: no field {name!r}; it has {', '.join(map(str, self)) or 'none'}")


def _object(fields: Any, where: str) -> Example:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: found {str(fields)[:50]!r}, expected an object of fields")
    return Example(fields, where)


def _text(path: Path, fallback: str = "") -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not fallback:
            raise ValueError(f"{path} is not UTF-8 text ({error}): convert it first") from error
        text = content.decode(fallback)
    return text.replace("\r\n", "\n")


def _read_jsonl(path: Path) -> list[Example]:
    examples = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        where = f"{path.name}, line {number}"
        if line.strip():
            try:
                examples.append(_object(json.loads(line), where))
            except json.JSONDecodeError as error:
                problem = f"{error.msg}, column {error.colno}"
                raise ValueError(f"{where}: not JSON ({problem}): expected one object per line") from error
    return examples


def _read_json(path: Path) -> list[Example]:
    text = _text(path)
    try:
        items = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})") from error
    if isinstance(items, dict):
        items = items.get("data")
    if not isinstance(items, list):
        raise ValueError(f'{path.name}: expected a list of objects, or {{"data": [...]}} with one')
    return [_object(item, f"{path.name}, item {number}") for number, item in enumerate(items, 1)]


def _table(path: Path, rows: Iterable[tuple[int, list[str]]]) -> list[Example]:
    """The rows (line number, columns) below a header; labels that look like integers become integers."""
    filled = ((number, row) for number, row in rows if any(row))
    _, header = next(filled, (0, []))
    examples = []
    for number, row in filled:
        where = f"{path.name}, line {number}"
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} columns, but the header has {len(header)} ({', '.join(header)})")
        fields: dict[str, Any] = dict(zip(header, row, strict=True))
        if re.fullmatch(r"-?\d+", fields.get("label", "")):
            fields["label"] = int(fields["label"])
        examples.append(Example(fields, where))
    return examples


def _read_tsv(path: Path) -> list[Example]:
    return _table(path, enumerate((line.split("\t") for line in _text(path).split("\n")), 1))


def _read_csv(path: Path) -> list[Example]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        return _table(path, ((reader.line_num, row) for row in reader))
    except csv.Error as error:
        raise ValueError(f"{path.name}, line {reader.line_num}: not CSV ({error})") from error


# Class numbers of the published .all files, by the abbreviations of the .label files.
_TREC = {"DESC": 0, "ENTY": 1, "ABBR": 2, "HUM": 3, "LOC": 4, "NUM": 5}


def _read_trec(path: Path) -> list[Example]:
    """Lines "0 text" or "DESC:manner text"; the published files are in Latin-1."""
    examples = []
    for number, line in enumerate(_text(path, fallback="latin-1").split("\n"), 1):
        label, _, text = line.strip().partition(" ")
        if label:
            label = str(_TREC.get(label.partition(":")[0], label))
            if not (label.isdecimal() and text):
                expected = f"a number or one of {', '.join(_TREC)}, a space and a text"
                raise ValueError(f"{path.name}, line {number}: found {line[:50]!r}, expected {expected}")
            examples.append(Example({"label": int(label), "text": text}, f"{path.name}, line {number}"))
    return examples


def _read_parquet(path: Path) -> list[Example]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package pyarrow: pip install zo2jax[data]") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    return [Example(row, f"{path.name}, row {number}") for number, row in enumerate(rows, 1)]


_READERS: dict[str, Callable[[Path], list[Example]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".all": _read_trec,
    ".label": _read_trec,
}


def _load_hub(source: str) -> Any:
    """All splits of "hub:PATH" or "hub:PATH:CONFIG"."""
    _, *parts = source.split(":")
    if len(parts) not in (1, 2) or not all(parts):
        raise ValueError(f"{source}: expected hub:PATH or hub:PATH:CONFIG, and :SPLIT after it where one split is read")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{source} needs the package datasets: pip install zo2jax[data]") from error
    try:
        try:
            return load_dataset(*parts)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            return load_dataset(*parts, revision="refs/convert/parquet")  # the hub's own copy, made by the script
    except Exception as error:  # it raises many kinds; each means that there is no data
        raise FileNotFoundError(f"{source}: the hub did not give it ({type(error).__name__}: {error})") from error


def _hub_split(source: str, splits: Any, split: str) -> list[Example]:
    if split not in splits:
        raise ValueError(f"{source}: no split {split!r}; it has {', '.join(splits)}")
    return [Example(row, f"{source}:{split}, row {number}") for number, row in enumerate(splits[split], 1)]


def read_examples(source: str | Path) -> list[Example]:
    """The examples of a file, by its suffix, or of "hub:PATH:SPLIT" or "hub:PATH:CONFIG:SPLIT".

    Files: .jsonl (an object a line), .json (a list of objects, or {"data": [...]}), .tsv (as GLUE's: a header and
    no quoting), .csv (with a header), .parquet, and TREC's .all and .label. "hub:" reads through `datasets`.

    Raises:
        FileNotFoundError: if there is no such file or data set.
        ValueError: naming the file and the line that cannot be read, or an empty file, or an unknown suffix.
        ImportError: for Parquet or the hub without the extra ``zo2jax[data]``.

    >>> read_examples("no/such/train.jsonl")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no file at no/such/train.jsonl: expected examples
    """
    if str(source).startswith("hub:"):
        whole, _, split = str(source).rpartition(":")
        examples = _hub_split(whole, _load_hub(whole), split)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no file at {source or '(empty)'}: expected examples")
        if path.suffix not in _READERS:
            raise ValueError(f"{path}: examples are read from files that end in {', '.join(_READERS)}")
        examples = _READERS[path.suffix](path)
    if not examples:
        raise ValueError(f"{source} is empty: expected examples")
    return examples


def _find_file(folder: Path, *groups: str) -> Path:
    """The one file of the first group of words (as "valid|val") of which some file's name has one."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _READERS)
    for words in groups:
        found = [file for file in files if re.search(rf"(?<![a-z])({words})", file.name.lower())]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{folder} has several files for {words}: {names}; keep or name one")
        if found:
            return found[0]
    names = ", ".join(file.name for file in files) or "no examples at all"
    raise FileNotFoundError(f"{folder} has no file for {' or '.join(groups)}; it has {names}")


def _find_hub_splits(source: str, validation: str) -> tuple[list[Example], list[Example]]:
    splits = _load_hub(source)
    train = _hub_split(source, splits, "train")
    if validation and validation not in splits:
        return train, read_examples(validation)
    wanted = [validation] if validation else ["validation", "validation_matched", "test"]
    return train, _hub_split(source, splits, next((name for name in wanted if name in splits), wanted[0]))


def find_splits(source: str, validation: str = "") -> tuple[list[Example], list[Example]]:
    """(training examples, evaluation examples) of a folder, a file, or "hub:PATH" or "hub:PATH:CONFIG".

    In a folder the training file has "train" in its name; the evaluation file is ``validation`` (a file's name in
    the folder, a path, or "hub:..."), or has "validation", else "valid" or "val", else "dev", else "test" in its
    name. A file is for training, and without ``validation`` nothing is left for evaluation. Of the hub's splits,
    ``validation`` is one or, without it, "validation", else "validation_matched", else "test".

    Raises:
        FileNotFoundError: listing what is there, if a file is not.
        ValueError: if several files fit, or as `read_examples`.

    >>> find_splits("no/such/folder")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no file at no/such/folder: expected examples
    """
    if source.startswith("hub:"):
        return _find_hub_splits(source, validation)
    path = Path(source).expanduser()
    folder = path if path.is_dir() else path.parent
    train = read_examples(_find_file(path, "train") if path.is_dir() else source)
    if validation:
        inside = folder / validation
        return train, read_examples(inside if inside.is_file() else validation)
    if not path.is_dir():
        return train, []
    return train, read_examples(_find_file(path, "validation", "valid|val", "dev", "test"))


def subset(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """``count`` examples, or all if there are fewer, in the random order of MeZO's runner (arXiv 2305.17333).

    The order is NumPy's ``RandomState(seed).permutation``, which does not change between versions.

    >>> subset([Example({"n": n}) for n in range(5)], 2, seed=0)
    [{'n': 2}, {'n': 0}]
    """
    order = np.random.RandomState(seed).permutation(len(examples))[: max(count, 0)]
    return [examples[i] for i in order]


def demonstration_sets(train: Sequence[Example], n_eval: int, count: int = 32) -> list[list[Example]]:
    """MeZO's demonstrations of in-context learning: ``count`` training examples for each of ``n_eval`` examples.

    >>> train = [Example({"n": n}) for n in range(5)]
    >>> [[e["n"] for e in chosen] for chosen in demonstration_sets(train, 2, count=3)]
    [[4, 1, 0], [0, 3, 4]]
    """
    seeds = np.random.RandomState(0).randint(0, 10000, n_eval).tolist()
    return [subset(train, count, seed) for seed in seeds]
