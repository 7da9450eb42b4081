"""From a config to what a run needs of its data: batches, held-out batches, a loss, and a way to score the result."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zo2jax.config import Config, ConfigError
from zo2jax.config_files import run_file
from zo2jax.models.model import Model
from zo2jax.models.tokenizers import ChatTemplate
from zo2jax.objectives import Generated, error_rate
from zo2jax.tasks.catalog import find_task
from zo2jax.tasks.data import demonstration_sets, find_splits, subset
from zo2jax.tasks.encoding import TaskBatches, TaskHeldOut
from zo2jax.tasks.metrics import token_f1
from zo2jax.tasks.scoring import Evaluation, evaluate
from zo2jax.tasks.task import Task, chat_task, completion_task
from zo2jax.tasks.text import HeldOut, TextBatches, load_text, random_text


@dataclass(frozen=True)
class Prepared:
    """What a run needs of its data.

    >>> Prepared("3 rows", [], [], "nats/token").loss is None
    True
    """

    summary: str
    batches: Sequence[Any]
    held_out: Iterable[Any]
    unit: str
    """Of the losses."""
    loss: Any = None
    """What is trained on instead of the model's own loss."""
    evaluate: Callable[..., Evaluation] | None = None
    """``(model, progress=None) -> Evaluation`` of the task's metric on the evaluation examples; None for plain text."""


@dataclass(frozen=True)
class InParts(Sequence[Any]):
    """Batches, so many of which make a step: a sequence of lists.

    >>> list(InParts([1, 2, 3, 4], 2))
    [[1, 2], [3, 4]]
    """

    batches: Sequence[Any]
    parts: int

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self.batches) // self.parts

    def __getitem__(self, index: Any) -> Any:
        """The batches of step ``index``."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"step {index} of {len(self)}")
        return [self.batches[index % len(self) * self.parts + i] for i in range(self.parts)]


def prepare(config: Config, model: Model) -> Prepared:
    r"""Reads and encodes a config's data for a model: plain text, or the examples of a task.

    Raises:
        ValueError, FileNotFoundError: for a task that is not known, and for data that is not there or does not fit,
            before anything is computed.

    >>> from zo2jax.demo import model_folder
    >>> from zo2jax import load
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "train.jsonl"
    ...     _ = file.write_text('{"sentence": "Fine.", "label": 1}\n' * 8)
    ...     config = Config(task="sst2", data=folder, validation="train.jsonl", train_examples=6, dev_examples=2)
    ...     prepare(config, load(model_folder())).summary
    'sst2: 6 training and 2 development examples, 8 to evaluate on; objective candidates'
    """
    parts = config.micro_batches
    if parts > 1:  # the rows of a step are those of as many steps of smaller batches
        config = replace(config, batch=config.batch // parts, steps=config.steps * parts, micro_batches=1)
    data = _prepare_task(config, model) if config.task else _prepare_text(config, model)
    return replace(data, batches=InParts(data.batches, parts)) if parts > 1 else data


def first_tokens(config: Config, model: Model) -> list[int]:
    """The ids of the first ``config.prefix`` tokens of the training data, in the order of the batches.

    The first one is the token that begins texts, if the model has one.

    Raises:
        ConfigError: for less data than that.

    >>> from zo2jax.demo import model_folder
    >>> from zo2jax import load
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "text.txt"
    ...     _ = file.write_text("All is well that ends well. " * 40)
    ...     config = Config(data=str(file), tokens=3, batch=1, prefix=5)
    ...     len(first_tokens(config, load(model_folder())))
    5
    """
    found: list[int] = []
    begins = model.config.bos_id, model.config.prompt_bos
    for batch in prepare(replace(config, micro_batches=1), model).batches:
        ids = np.asarray(batch["ids"])
        for row, length in zip(ids, batch.get("lengths", [ids.shape[1]] * len(ids)), strict=True):
            found += row[: int(length)].tolist()
            if begins[0] is not None and found[0] not in begins:
                found.insert(0, begins[0])
            if len(found) >= config.prefix:
                return found[: config.prefix]
    raise ConfigError(f"prefix={config.prefix}: the training data have {len(found)} tokens, expected as many at least")


def _prepare_text(config: Config, model: Model) -> Prepared:
    if config.model.startswith("shape:") and not config.data:
        text = random_text(model, tokens=config.tokens, batch=config.batch)
    else:
        text = load_text(model, config.data, tokens=config.tokens, batch=config.batch, held_out=config.held_out)
    return Prepared(
        f"{len(text.train):,} rows of {config.tokens} tokens, {len(text.held_out):,} held out",
        TextBatches(text.train, config.batch, config.steps, config.seed),
        HeldOut(text.held_out, config.batch),
        "nats/token",
    )


def _prepare_task(config: Config, model: Model) -> Prepared:
    task = resolve_task(config.task, model)
    source = config.data or (f"hub:{task.source}" if task.source else "")
    if not source:
        raise ConfigError("data is empty: expected a file or folder of examples, or hub:PATH[:CONFIG]")
    train, validation = find_splits(source, config.validation)
    if not validation:
        raise ConfigError(f"data={source} is one file: name the evaluation examples by validation=FILE")
    chosen = subset(train, config.train_examples + config.dev_examples, config.data_seed)
    if len(chosen) <= config.dev_examples:
        raise ConfigError(
            f"dev_examples={config.dev_examples} leaves none of {len(chosen)} training examples: make it smaller"
        )
    train_examples, dev = chosen[: -config.dev_examples], chosen[-config.dev_examples :]
    examples = subset(validation, config.eval_examples, config.data_seed)
    objective = config.objective or ("candidates" if task.candidates and task.classification else "tokens")
    if objective in ("candidates", "accuracy") and task.candidates is None:
        raise ConfigError(
            f"objective={objective}: the task {config.task} has no candidates; expected tokens or generated"
        )
    encoded = "candidates" if objective == "accuracy" else objective
    options: dict[str, Any] = {"batch": config.batch, "objective": encoded}
    shown = None
    if config.demonstrations:
        shown = demonstration_sets(train, len(examples), config.demonstrations)

    def score(model: Model, progress: Any = None) -> Evaluation:
        return evaluate(
            model, task, examples, demonstrations=shown, scoring=config.scoring, batch=config.batch, progress=progress
        )

    return Prepared(
        f"{config.task}: {len(train_examples):,} training and {len(dev):,} development examples, {len(examples):,} to "
        f"evaluate on; objective {objective}",
        TaskBatches(model, task, train_examples, steps=config.steps, seed=config.seed, **options),
        TaskHeldOut(model, task, dev, **options),
        "nats/token" if objective == "tokens" else "nats/example" if objective == "candidates" else "per example",
        {"accuracy": error_rate, "generated": _generated(task)}.get(objective),
        score,
    )


def _generated(task: Task) -> Generated:
    """The task's metric on generated text as a loss; the mean of its values, if it has several."""
    metric = token_f1 if task.candidates is not None or task.metric is None else task.metric

    def value(text: str, references: Sequence[str]) -> float:
        found = metric(text, references)
        return float(np.mean(list(found.values()))) if isinstance(found, dict) else float(found)

    return Generated(value, task.tokens, task.stop)


def resolve_task(name: str, model: Model) -> Task:
    """A task by name: of the catalog, "completion", "chat" (with the model's template), or a Python file's own.

    A file holds one `Task`, whatever it is called, or several, of which one is named by ``file.py:name``.

    Raises:
        ConfigError: for a file that is not there, does not run, or does not hold one task.
        ValueError: for a name that is not known.

    >>> resolve_task("sst-2", None).candidates
    (' terrible', ' great')
    """
    if name == "completion":
        return completion_task()
    if name == "chat":
        if model.folder is None:
            raise ConfigError("task=chat: the model has no folder to read a chat template from")
        return chat_task(ChatTemplate.from_folder(model.folder))
    file, _, wanted = name.partition(".py:") if ".py:" in name else (name.removesuffix(".py"), "", "")
    if file == name:
        return find_task(name)
    path = Path(f"{file}.py").expanduser()
    if not path.is_file():
        raise ConfigError(f"task={name}: no file at {path}")
    tasks = {key: value for key, value in vars(run_file(path)).items() if isinstance(value, Task)}
    if wanted and wanted not in tasks:
        raise ConfigError(f"{path} has no task {wanted!r}; it has {', '.join(tasks) or 'none'}")
    if not wanted and len(tasks) != 1:
        raise ConfigError(f"{path} holds {len(tasks)} tasks, expected one, or its name as {path.name}:NAME")
    return tasks[wanted] if wanted else next(iter(tasks.values()))
