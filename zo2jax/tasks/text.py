"""Language-model adaptation on plain text: packed rows of fixed length, a held-out split, a fixed order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


def text_files(data: str) -> list[Path]:
    """The files named by ``data``: one file, several separated by commas, or a folder (its .txt files, sorted).

    Raises:
        FileNotFoundError: naming the path that is not there.

    >>> text_files("no/such/file.txt")
    Traceback (most recent call last):
    ...
    FileNotFoundError: data: no file at no/such/file.txt
    """
    files: list[Path] = []
    for part in data.split(","):
        path = Path(part.strip()).expanduser()
        if part.strip() and path.is_dir():
            found = sorted(path.glob("*.txt"))
            if not found:
                raise FileNotFoundError(f"data: the folder {path} has no .txt files")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"data: no file at {part.strip() or '(empty)'}")
    return files


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it first") from error
    if not text.strip():
        raise ValueError(f"{path} is empty: expected text to train on")
    return text


def pack(tokens: np.ndarray, length: int) -> np.ndarray:
    """Rows of ``length`` + 1 token ids, int32 [rows, length + 1]; neighbours share one token, so each is a target once.

    >>> pack(np.arange(8), 3).tolist()
    [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    count = max(0, (len(tokens) - 1) // length)
    starts = np.arange(count)[:, None] * length
    return np.asarray(tokens, np.int32)[starts + np.arange(length + 1)[None, :]]


def _as_batch(rows: np.ndarray) -> Batch:
    return {"ids": rows[:, :-1], "targets": rows[:, 1:]}


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of ``count`` rows from Philox's raw words, which NumPy keeps stable across versions."""
    words = np.random.Philox(key=(seed % 2**64) + (epoch << 64)).random_raw(count)
    return np.argsort(words, kind="stable")


def shuffled(index: int, *, batch: int, steps: int, seed: int, count: int) -> list[int]:
    """Which of ``count`` rows batch ``index`` of ``steps`` holds: every epoch is a new permutation of all rows.

    Raises:
        IndexError: for an index beyond the steps.

    >>> shuffled(0, batch=2, steps=4, seed=0, count=4), shuffled(1, batch=2, steps=4, seed=0, count=4)
    ([0, 2], [1, 3])
    """
    if not -steps <= index < steps:
        raise IndexError(f"batch {index} of {steps}")
    start = index % steps * batch
    places = (divmod(place, count) for place in range(start, start + batch))
    return [int(_permutation(seed, epoch, count)[i]) for epoch, i in places]


@dataclass(frozen=True, eq=False)
class TextBatches(Sequence[Batch]):
    """``steps`` training batches of packed rows in a fixed order: every epoch is a new permutation of all rows.

    Batch i is a pure function of (seed, i), so that a run can go on at any step. A batch has int32 arrays ``ids``
    and ``targets``, both [batch, length].

    >>> batches = TextBatches(pack(np.arange(10), 3), batch=2, steps=4, seed=0)
    >>> len(batches), batches[3]["ids"].shape
    (4, (2, 3))
    """

    rows: np.ndarray
    batch: int
    steps: int
    seed: int

    def __len__(self) -> int:
        """How many batches there are."""
        return self.steps

    def __getitem__(self, index: Any) -> Any:
        """Batch ``index``."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rows = shuffled(index, batch=self.batch, steps=self.steps, seed=self.seed, count=len(self.rows))
        return _as_batch(self.rows[rows])


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The held-out rows as batches of one shape; the last is filled up with rows of weight 0.

    >>> [batch["weights"][:, 0].tolist() for batch in HeldOut(pack(np.arange(10), 3), batch=2)]
    [[1.0, 1.0], [1.0, 0.0]]
    """

    rows: np.ndarray
    batch: int

    def __len__(self) -> int:
        """How many batches there are."""
        return -(-len(self.rows) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        """The batches in order, with float32 ``weights`` [batch, length]."""
        for start in range(0, len(self.rows), self.batch):
            rows = self.rows[start : start + self.batch]
            weights = np.zeros((self.batch, rows.shape[1] - 1), np.float32)
            weights[: len(rows)] = 1.0
            padding = np.repeat(rows[:1], self.batch - len(rows), axis=0)
            yield _as_batch(np.concatenate([rows, padding])) | {"weights": weights}


@dataclass(frozen=True, eq=False)
class TextData:
    """Packed rows of a text: ``train`` and ``held_out``, each int32 [rows, length + 1].

    >>> TextData(pack(np.arange(10), 3), pack(np.arange(10), 3)).train.shape
    (3, 4)
    """

    train: np.ndarray
    held_out: np.ndarray


def load_text(model: Any, data: str, *, tokens: int, batch: int, held_out: float = 0.1) -> TextData:
    """Reads and packs text for a model: rows of ``tokens`` tokens (and one more, the last target).

    The last ``held_out`` of each file (by characters) is kept apart. Files are joined by the model's end-of-text
    token, if it has one.

    Raises:
        FileNotFoundError: for a path that is not there.
        ValueError: for an empty or undecodable file, a text shorter than one batch, rows beyond the model's
            context, a model without a tokenizer, or a tokenizer with more tokens than the model.
    """
    if model.tokenizer is None:
        raise ValueError(f"{model.folder} has no tokenizer.json, which reading text needs")
    if tokens < 1 or batch < 1 or not 0 < held_out < 1:
        raise ValueError(
            f"tokens={tokens}, batch={batch}, held_out={held_out}: expected at least 1, 1, and within (0, 1)"
        )
    model.check_tokens(tokens)
    parts: tuple[list[int], list[int]] = ([], [])
    for path in text_files(data):
        text = _read(path)
        cut = round(len(text) * (1 - held_out))
        for ids, piece in zip(parts, (text[:cut], text[cut:]), strict=True):
            ids += list(model.config.stop_ids[:1]) if ids else []
            ids += model.tokenizer.encode(piece, add_special_tokens=False).ids
    if (top := max(max(ids, default=0) for ids in parts)) >= model.config.vocabulary:
        raise ValueError(
            f"the tokenizer gives token {top}, the model has {model.config.vocabulary}: they do not belong together"
        )
    train, kept = (pack(np.array(ids), tokens) for ids in parts)
    if len(train) < batch or not len(kept):
        raise ValueError(
            f"data: {data} gives {len(parts[0])} training and {len(parts[1])} held-out tokens, that is {len(train)} "
            f"and {len(kept)} rows of {tokens}; one batch needs {batch}, and 1 is held out at least: use more text, "
            "or smaller batch or tokens"
        )
    return TextData(train, kept)


def random_text(model: Any, *, tokens: int, batch: int) -> TextData:
    """Rows of random tokens, for a model of random weights: four batches, and one that is held out.

    >>> from zo2jax.shapes import random_model
    >>> random_text(random_model("tiny"), tokens=4, batch=2).train.shape
    (8, 5)
    """
    model.check_tokens(tokens)
    rows = np.random.default_rng(0).integers(0, model.config.vocabulary, (5 * batch, tokens + 1)).astype(np.int32)
    return TextData(rows[batch:], rows[:batch])
