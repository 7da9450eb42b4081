"""What a model makes of a task: scores of the candidates or generated text, and the metric of its predictions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zo2jax.tasks.encoding import Row, encode_options, encode_prompt, make_batch, own_input, shared_input
from zo2jax.tasks.metrics import accuracy, token_f1
from zo2jax.tasks.task import Fields, Task, as_example

Demonstrations = Sequence[Fields] | Sequence[Sequence[Fields]]
Progress = Callable[[int, int], None]
SCORINGS = ("mean", "sum", "sfc", "icl_sfc")


def _sets(examples: Sequence[Fields], demonstrations: Demonstrations | None) -> Iterator[Any]:
    """The demonstrations of each example, from one list for all or one for each."""
    if not examples:
        raise ValueError("no examples: expected at least one")
    if not demonstrations or isinstance(demonstrations[0], Mapping):
        return iter([demonstrations or ()] * len(examples))
    if len(demonstrations) != len(examples):
        raise ValueError(
            f"{len(demonstrations)} lists of demonstrations for {len(examples)} examples: expected one each"
        )
    return iter(demonstrations)


def _batches(lengths: Sequence[int], batch: int, progress: Progress | None) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first: what does not fit the memory fails at once."""
    if batch < 1:
        raise ValueError(f"batch={batch}: expected at least 1")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch):
        yield order[start : start + batch]
        if progress:
            progress(min(start + batch, len(order)), len(order))


def _log_probs(model: Any, rows: Sequence[Row], batch: int, progress: Progress | None) -> dict[Row, float]:
    """The sum of the log-probabilities of each row's option.

    Equal rows (calibration has many) are scored once; what rows of one scored token have in common is read once.
    """
    groups: dict[Any, list[Row]] = {}
    for row in dict.fromkeys(rows):
        groups.setdefault(row.ids[:-1] if row.option == 1 else row, []).append(row)
    together = list(groups.values())
    inputs = [shared_input(group) or own_input(group[0]) for group in together]
    sums: dict[Row, float] = {}
    for chosen in _batches([len(one.ids) for one in inputs], batch, progress):
        arrays = make_batch([inputs[i] for i in chosen], context=model.config.context, rows_to=batch)
        log_probs = np.where(arrays["weights"] > 0, np.asarray(model.token_log_probs(arrays), np.float64), 0.0)
        for i, values in zip(chosen, log_probs, strict=False):
            if together[i][0].option == 1:
                sums.update(zip(together[i], values.tolist(), strict=False))
            else:
                sums[together[i][0]] = float(values.sum())
    return sums


def option_scores(
    model: Any,
    task: Task,
    examples: Sequence[Fields],
    *,
    demonstrations: Demonstrations | None = None,
    scoring: str = "mean",
    batch: int = 16,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """The scores of each example's candidates, float64 [candidates], in nats; the highest is the prediction.

    ``scoring`` "mean" is the mean log-probability of the candidate's tokens, "sum" their sum; "sfc" subtracts the
    sum after the task's calibration prompt (arXiv 2104.08315), "icl_sfc" the same after the demonstrations, which
    are one list for all examples or one for each. ``progress`` is called with the rows done and their number.

    Raises:
        ValueError: without examples, for an unknown scoring, an example that cannot be encoded, or scores of NaN.

    >>> import zo2jax
    >>> from zo2jax.demo import model_folder
    >>> task = Task(prompt="{x}", candidates=(" self", " banana"))
    >>> scores = option_scores(zo2jax.load(model_folder()), task, [{"x": "def run("}])[0]
    >>> bool(scores[0] > scores[1])
    True
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring={scoring!r}: expected one of {', '.join(SCORINGS)}")
    rows: list[list[Row]] = []
    free: list[list[Row]] = []
    for example, shown in zip(examples, _sets(examples, demonstrations), strict=True):
        rows.append(encode_options(model, task, example, shown))
        if scoring in ("sfc", "icl_sfc"):
            free.append(encode_options(model, task, example, shown, calibrated=scoring))
    sums = _log_probs(model, [row for group in rows + free for row in group], batch, progress)
    scores = [np.array([sums[row] for row in group]) for group in rows]
    if scoring == "mean":
        scores = [score / [row.option for row in group] for score, group in zip(scores, rows, strict=True)]
    elif free:
        scores = [score - [sums[row] for row in group] for score, group in zip(scores, free, strict=True)]
    for example, score in zip(examples, scores, strict=True):
        if np.isnan(score).any():
            raise ValueError(f"{as_example(example).where}: the scores are {score}: the model's weights are not sound")
    return scores


def _generate(
    model: Any, task: Task, prompts: Sequence[tuple[int, ...]], batch: int, progress: Progress | None
) -> list[str]:
    texts = [""] * len(prompts)
    for chosen in _batches([len(prompt) for prompt in prompts], batch, progress):
        written = model.generate([prompts[i] for i in chosen], task.tokens, stop=task.stop)
        for i, text in zip(chosen, written, strict=True):
            texts[i] = text.strip()
    return texts


@dataclass(frozen=True)
class Evaluation:
    """The mean of each metric over ``count`` examples, and the predictions in the order of the examples.

    >>> print(Evaluation({"accuracy": 0.75}, [0, 1, 1, 0], 4))
    accuracy 0.750 (4 examples)
    """

    metrics: dict[str, float]
    predictions: list[Any]
    count: int

    def __str__(self) -> str:
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in self.metrics.items())
        return f"{metrics} ({self.count} example{'s' * (self.count != 1)})"


def evaluate(
    model: Any,
    task: Task,
    examples: Sequence[Fields],
    *,
    demonstrations: Demonstrations | None = None,
    scoring: str = "mean",
    batch: int = 16,
    progress: Progress | None = None,
) -> Evaluation:
    """Predicts every example and takes the mean of the task's metric.

    A prediction is the index of the candidate with the highest score, see `option_scores`, or the greedily
    generated text without white space around it. ``progress`` is called with the rows or prompts done and their
    number.

    Raises:
        ValueError: without examples, or for one whose reference, prompt or candidates cannot be made.

    >>> import zo2jax
    >>> from zo2jax.demo import model_folder
    >>> task = Task(prompt="The return {x} is", candidates=(" banana", " a"))
    >>> print(evaluate(zo2jax.load(model_folder()), task, [{"x": "value", "label": 1}, {"x": "type", "label": 0}]))
    accuracy 0.500 (2 examples)
    """
    predictions: list[Any]
    references: list[Any]
    if task.candidates is not None:
        references = [task.gold_of(example) for example in examples]
        options: dict[str, Any] = {"demonstrations": demonstrations, "scoring": scoring, "batch": batch}
        scores = option_scores(model, task, examples, **options, progress=progress)
        predictions = [int(np.argmax(score)) for score in scores]
    else:
        references = [task.answers_of(example) for example in examples]
        pairs = zip(examples, _sets(examples, demonstrations), strict=True)
        prompts = [encode_prompt(model, task, example, shown, tokens=task.tokens) for example, shown in pairs]
        predictions = _generate(model, task, prompts, batch, progress)
    metric = task.metric or (token_f1 if task.candidates is None else accuracy)
    name = getattr(metric, "__name__", "score")
    results = [metric(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]
    named = [result if isinstance(result, dict) else {name: result} for result in results]
    means = {key: float(np.mean([result[key] for result in named])) for key in named[0]}
    return Evaluation(means, predictions, len(named))
