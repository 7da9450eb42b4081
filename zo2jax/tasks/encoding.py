"""Examples as rows of tokens, and rows as batches of few shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any

import numpy as np

from zo2jax.models.model import bucket
from zo2jax.tasks.task import Fields, Task, as_example
from zo2jax.tasks.text import shuffled

Batch = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """Token ids, of which the last ``option`` are scored.

    >>> Row((5, 7, 2), option=1)
    Row(ids=(5, 7, 2), option=1)
    """

    ids: tuple[int, ...]
    option: int


@dataclass(frozen=True)
class Input:
    """What a model reads: token ids, and which positions predict which targets.

    >>> shared_input([Row((5, 7, 2), 1), Row((5, 7, 3), 1)])
    Input(ids=(5, 7), positions=(1, 1), targets=(2, 3))
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]


FILLER = Input((0,), (), ())
"""Fills a batch up; nothing of it is scored."""


def shared_input(rows: Sequence[Row]) -> Input | None:
    """One input that serves all rows: if each is one scored token after the same others, which are read once.

    So a candidate of one token costs nothing but a row of the vocabulary matrix. None where rows differ otherwise.

    >>> shared_input([Row((5, 7, 2), 1), Row((5, 8, 3), 1)]) is None
    True
    """
    if any(row.option != 1 or row.ids[:-1] != rows[0].ids[:-1] for row in rows):
        return None
    before = rows[0].ids[:-1]
    return Input(before, (len(before) - 1,) * len(rows), tuple(row.ids[-1] for row in rows))


def own_input(row: Row) -> Input:
    """The input of one row.

    >>> own_input(Row((5, 7, 2), 2))
    Input(ids=(5, 7, 2), positions=(0, 1), targets=(7, 2))
    """
    count = len(row.ids)
    return Input(row.ids, tuple(range(count - row.option - 1, count - 1)), row.ids[count - row.option :])


def encode_text(model: Any, text: str, special_tokens: bool = True) -> list[int]:
    """The token ids of a text, with the special tokens of the model's tokenizer.

    If ``model.config.prompt_bos`` is an integer, it stands first in place of the tokenizer's own special tokens.

    Raises:
        ValueError: without a tokenizer, or if it has more tokens than the model.

    >>> import zo2jax
    >>> from zo2jax.demo import model_folder
    >>> model = zo2jax.load(model_folder())
    >>> [model.tokenizer.id_to_token(token) for token in encode_text(model, "(self)")]
    ['(', 'self', ')']
    """
    if model.tokenizer is None:
        raise ValueError(f"the model from {model.folder} has no tokenizer.json, which reading text needs")
    bos = model.config.prompt_bos if special_tokens else None
    ids = model.tokenizer.encode(text, add_special_tokens=special_tokens and bos is None).ids
    if (top := max(ids, default=0)) >= (count := model.config.vocabulary):
        raise ValueError(f"the tokenizer gives token {top}, the model has {count}: they do not belong together")
    return ids if bos is None else [bos, *ids]


def _cut(model: Any, ids: list[int], length: int) -> tuple[int, ...]:
    """The last ``length`` tokens; a special token that stands first stays there."""
    if len(ids) <= length:
        return tuple(ids)
    special = {token for token, added in model.tokenizer.get_added_tokens_decoder().items() if added.special}
    special |= {model.config.prompt_bos, *model.tokenizer.encode("").ids[:1]}
    return (ids[0], *ids[len(ids) - length + 1 :]) if ids[0] in special else tuple(ids[-length:])


def _prefix(task: Task, demonstrations: Sequence[Fields]) -> str:
    """Demonstrations, each a prompt with the right text after it, and what separates them from what follows."""
    shown = task.separator.join((task.prompt_of(d) + task.gold_text(d)).strip() for d in demonstrations)
    return shown.strip() + task.separator


def _after(prefix: str, text: str) -> str:
    return (prefix + text).lstrip().strip(" ")


def _encode_option(model: Any, task: Task, whole: str, final: str, prompt_tokens: int) -> Row:
    """The row of ``final``; its option is as long as what ``whole`` has beyond the prompt's tokens."""
    ids = encode_text(model, whole, task.special_tokens)
    option = len(ids) - prompt_tokens
    if final != whole:
        ids = encode_text(model, final, task.special_tokens)
    context = model.config.context
    if option < 1:
        raise ValueError("its tokens merge with the prompt's: put a space or a line break between them")
    if option >= context:
        raise ValueError(f"its {option} tokens do not fit the model's context of {context}: shorten it")
    row = Row(_cut(model, ids, context), min(option, len(ids) - 1))
    if not row.option:
        raise ValueError("it is the row's first token, which no model predicts: give it a prompt")
    return row


def _encode_options(
    model: Any, task: Task, example: Fields, prompt: str, texts: Sequence[str], prefix: str | None
) -> list[Row]:
    """A row for each text after the prompt."""
    prompt_tokens = len(encode_text(model, prompt.strip(" "), task.special_tokens))
    rows = []
    for text in texts:
        whole = (prompt + text).strip(" ")
        final = whole if prefix is None else _after(prefix, whole)
        try:
            rows.append(_encode_option(model, task, whole, final, prompt_tokens))
        except ValueError as error:
            raise ValueError(f"{as_example(example).where}: {text[:50]!r} cannot be scored: {error}") from error
    return rows


def encode_options(
    model: Any, task: Task, example: Fields, demonstrations: Sequence[Fields] = (), *, calibrated: str | None = None
) -> list[Row]:
    """A row for each candidate, by the token rules of MeZO's runner (arXiv 2305.17333).

    An option's length is how many tokens the candidate adds to the prompt without demonstrations. Rows that are
    too long lose their oldest tokens, except for a special token that stands first. The first token of a row is
    never scored. ``calibrated`` "sfc" puts the calibration prompt in place of the prompt, and leaves the
    demonstrations out; "icl_sfc" keeps them.

    Raises:
        ValueError: naming the example and the candidate, if the candidate has no tokens of its own or does not fit.

    >>> import zo2jax
    >>> from zo2jax.demo import model_folder
    >>> model = zo2jax.load(model_folder())
    >>> [row.option for row in encode_options(model, Task(prompt="{x} or", candidates=(" a", " no!")), {"x": "Yes"})]
    [1, 2]
    """
    if calibrated not in (None, "sfc", "icl_sfc"):
        raise ValueError(f"calibrated={calibrated!r}: expected None, 'sfc' or 'icl_sfc'")
    prompt = task.prompt_of(example) if calibrated is None else task.calibration_of(example)
    prefix = None if calibrated == "sfc" else _prefix(task, demonstrations)
    return _encode_options(model, task, example, prompt, task.candidates_of(example), prefix)


def encode_target(model: Any, task: Task, example: Fields) -> Row:
    r"""The row of the prompt and the right text after it, whose tokens are scored.

    Raises:
        ValueError: as `encode_options`.

    >>> import zo2jax
    >>> from zo2jax.demo import model_folder
    >>> model = zo2jax.load(model_folder())
    >>> row = encode_target(model, Task(prompt="{x} ="), {"x": "1 + 2", "answers": ["3"]})
    >>> model.tokenizer.decode(row.ids[-row.option :])
    ' 3\n'
    """
    prompt, texts = task.prompt_of(example), [task.gold_text(example)]
    return _encode_options(model, task, example, prompt, texts, _prefix(task, ()))[0]


def encode_prompt(
    model: Any, task: Task, example: Fields, demonstrations: Sequence[Fields] = (), *, tokens: int = 0
) -> tuple[int, ...]:
    """The tokens of the prompt, cut so that ``tokens`` more fit the model's context.

    Raises:
        ValueError: naming the example, if the prompt is empty; or if nothing of it would be left.

    >>> import zo2jax
    >>> from zo2jax.demo import model_folder
    >>> model = zo2jax.load(model_folder())
    >>> model.tokenizer.decode(encode_prompt(model, Task(prompt="{x} ="), {"x": "1 + 2"}, tokens=8))
    '1 + 2 ='
    """
    room = model.config.context - tokens
    if room < 2:
        raise ValueError(f"{tokens} new tokens leave no prompt in the model's context of {model.config.context}")
    text = _after(_prefix(task, demonstrations), task.prompt_of(example).strip(" "))
    ids = encode_text(model, text, task.special_tokens)
    if not ids:
        raise ValueError(f"{as_example(example).where}: the prompt is empty: give at least one token to continue")
    return _cut(model, ids, room)


def make_batch(rows: Sequence[Row | Input], *, context: int, rows_to: int = 0) -> Batch:
    """Rows as the arrays of one batch, filled up to ``rows_to`` rows of which nothing is scored.

    ``ids`` int32 [n, t] are right-padded with 0, ``lengths`` int32 [n] count the real tokens. Position
    ``positions`` int32 [n, p] predicts token ``targets`` int32 [n, p], which counts ``weights`` float32 [n, p] (0
    for padding). t and p are rounded up to few sizes, t to ``context`` at most.

    >>> batch = make_batch([Row((5, 7, 2), 2), Row((5, 9), 1)], context=16)
    >>> batch["positions"].tolist(), batch["targets"].tolist(), batch["weights"].tolist()
    ([[0, 1], [0, 0]], [[7, 2], [9, 0]], [[1.0, 1.0], [1.0, 0.0]])
    """
    inputs = [own_input(row) if isinstance(row, Row) else row for row in rows]
    inputs += [FILLER] * (rows_to - len(inputs))
    longest = max(len(one.ids) for one in inputs)
    assert longest <= context, f"a row of {longest} tokens, the context is {context}"
    scored = bucket(max(max(len(one.targets) for one in inputs), 1), 1)
    ids = np.zeros((len(inputs), min(context, bucket(longest))), np.int32)
    positions, targets = np.zeros((2, len(inputs), scored), np.int32)
    weights = np.zeros((len(inputs), scored), np.float32)
    for i, one in enumerate(inputs):
        ids[i, : len(one.ids)] = one.ids
        positions[i, : len(one.targets)] = one.positions
        targets[i, : len(one.targets)] = one.targets
        weights[i, : len(one.targets)] = 1.0
    lengths = np.array([len(one.ids) for one in inputs], np.int32)
    return {"ids": ids, "lengths": lengths, "positions": positions, "targets": targets, "weights": weights}


@dataclass(frozen=True)
class _Item:
    """An example in tokens; without inputs, one that fills up."""

    inputs: tuple[Input, ...] = ()
    label: int = -1
    answers: tuple[str, ...] = ()


def _encode_candidates(model: Any, task: Task, examples: Sequence[Fields]) -> tuple[list[_Item], int, bool]:
    """(the examples, the most candidates of one, whether those of each example share one input)."""
    labels, options = [], []
    for example in examples:
        labels.append(task.candidates_of(example).index(task.gold_text(example)))
        options.append(encode_options(model, task, example))
    together = [one for rows in options if (one := shared_input(rows))]
    shared = len(together) == len(options)
    inputs = [(one,) for one in together] if shared else [tuple(map(own_input, rows)) for rows in options]
    return list(map(_Item, inputs, labels)), max(map(len, options)), shared


def _encode_item(model: Any, task: Task, example: Fields, objective: str) -> _Item:
    if objective == "tokens":
        return _Item((own_input(encode_target(model, task, example)),))
    if task.candidates is None:
        answers = task.answers_of(example)
    else:
        answers = tuple(task.candidates_of(example)[i].strip() for i in sorted(task.gold_of(example)))
    return _Item((Input(encode_prompt(model, task, example, tokens=task.tokens), (), ()),), answers=answers)


@dataclass(frozen=True)
class _Encoded:
    """All examples of a task in tokens, and how some of them become a batch."""

    items: Sequence[_Item]
    objective: str
    context: int
    width: int = 1
    """The most candidates of an example."""
    shared: bool = True
    """Whether each example is one input."""

    @classmethod
    def make(cls, model: Any, task: Task, examples: Sequence[Fields], objective: str) -> "_Encoded":
        if objective not in ("candidates", "tokens", "generated"):
            raise ValueError(f"objective={objective!r}: expected 'candidates', 'tokens' or 'generated'")
        if not examples:
            raise ValueError("no examples: expected at least one")
        if objective == "candidates":
            items, width, shared = _encode_candidates(model, task, examples)
            return cls(items, objective, model.config.context, width, shared)
        items = [_encode_item(model, task, example, objective) for example in examples]
        return cls(items, objective, model.config.context)

    def batch(self, items: Sequence[_Item], count: int) -> Batch:
        """The items, filled up to ``count``, each with as many rows as the largest of all."""
        items = [*items, *[_Item()] * (count - len(items))]
        each = 1 if self.shared else self.width
        inputs = [one for item in items for one in (*item.inputs, *[FILLER] * (each - len(item.inputs)))]
        batch = make_batch(inputs, context=self.context)
        if self.objective == "candidates":
            for name in ("positions", "targets", "weights") if self.shared else ():
                batch[name] = batch[name][:, : self.width]
            weights = batch["weights"].reshape(len(items), self.width, -1)
            return batch | {"weights": weights, "labels": np.array([item.label for item in items], np.int32)}
        if self.objective == "generated":
            texts = [list(item.answers) for item in items]
            return {"ids": batch["ids"], "lengths": batch["lengths"], "answers": texts}
        return batch


@dataclass(frozen=True, eq=False)
class TaskBatches(Sequence[Batch]):
    """``steps`` training batches of a task in a fixed order: every epoch is a new permutation of all examples.

    Batch i is a pure function of (seed, i). All examples are encoded at once, so that what is wrong with one is
    said before a run starts. The ``objective`` says what a batch of n examples holds, as `make_batch` has it:

    - "candidates": a row for each candidate, example by example, or one for all candidates of an example where each
      is one token; ``weights`` float32 [n, candidates, tokens] (0 for candidates that an example lacks), and ``labels``
      int32 [n], the right candidate (of several the first);
    - "tokens": a row for each example, its prompt with the right text, which is scored;
    - "generated": ``ids`` and ``lengths`` of the prompts, and ``answers``, a list of the right texts for each.

    Raises:
        ValueError: without examples, for an unknown objective, or for an example that cannot be encoded.

    >>> import zo2jax
    >>> from zo2jax.demo import model_folder
    >>> model = zo2jax.load(model_folder())
    >>> task, examples = Task(prompt="{x}", candidates=("!", "?")), [{"x": "A", "label": 1}]
    >>> TaskBatches(model, task, examples, batch=3, steps=9, seed=0, objective="candidates")[4]["labels"].tolist()
    [1, 1, 1]
    """

    model: InitVar[Any]
    task: InitVar[Task]
    examples: InitVar[Sequence[Fields]]
    _: KW_ONLY
    batch: int
    steps: int
    seed: int
    objective: str
    encoded: _Encoded = field(init=False, repr=False)

    def __post_init__(self, model: Any, task: Task, examples: Sequence[Fields]) -> None:
        """Encodes the examples; the model and its parameters are not kept."""
        object.__setattr__(self, "encoded", _Encoded.make(model, task, examples, self.objective))

    def __len__(self) -> int:
        """How many batches there are."""
        return self.steps

    def __getitem__(self, index: Any) -> Any:
        """Batch ``index``."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        items = self.encoded.items
        chosen = shuffled(index, batch=self.batch, steps=self.steps, seed=self.seed, count=len(items))
        return self.encoded.batch([items[i] for i in chosen], self.batch)


@dataclass(frozen=True, eq=False)
class TaskHeldOut:
    """The examples in order, once, as batches like those of `TaskBatches` of one number of rows.

    The last is filled up with rows of weight 0, of label -1 ("candidates") and without answers ("generated").

    Raises:
        ValueError: as `TaskBatches`.

    >>> import zo2jax
    >>> from zo2jax.demo import model_folder
    >>> model = zo2jax.load(model_folder())
    >>> task, examples = Task(prompt="{x}", candidates=("!", "?")), [{"x": "A", "label": 1}]
    >>> [b["labels"].tolist() for b in TaskHeldOut(model, task, examples * 3, batch=2, objective="candidates")]
    [[1, 1], [1, -1]]
    """

    model: InitVar[Any]
    task: InitVar[Task]
    examples: InitVar[Sequence[Fields]]
    _: KW_ONLY
    batch: int
    objective: str
    encoded: _Encoded = field(init=False, repr=False)

    def __post_init__(self, model: Any, task: Task, examples: Sequence[Fields]) -> None:
        """Encodes the examples; the model and its parameters are not kept."""
        object.__setattr__(self, "encoded", _Encoded.make(model, task, examples, self.objective))

    def __len__(self) -> int:
        """How many batches there are."""
        return -(-len(self.encoded.items) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        """The batches in order."""
        items = self.encoded.items
        for start in range(0, len(items), self.batch):
            yield self.encoded.batch(items[start : start + self.batch], self.batch)
