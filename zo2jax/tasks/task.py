"""A task: how an example becomes a prompt, what may follow it, and what is right."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from string import Formatter
from typing import Any

from zo2jax.tasks.data import Example
from zo2jax.tasks.metrics import exact_match

Fields = Mapping[str, Any]
Metric = Callable[[Any, Any], float | dict[str, float]]
"""(prediction, reference) of one example -> score or named scores in [0, 1].

With candidates: (index, set of gold indices). Free text: (text, tuple of answers)."""


def as_example(fields: Fields) -> Example:
    """The fields as an `Example`, which knows where it is from; others are called "example".

    >>> as_example({"label": 0}).where
    'example'
    """
    return fields if isinstance(fields, Example) else Example(fields)


@contextmanager
def _making(part: str, example: Example) -> Iterator[None]:
    """Turns whatever a task's functions raise into a ValueError that starts with where the example is from."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(example.where):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{example.where}: cannot make the {part}: {kind}{error}") from error


def _fill(part: str, form: str | Callable[[Example], str], example: Example) -> str:
    """The text of a format string or function."""
    with _making(part, example):
        text = form.format_map(example) if isinstance(form, str) else form(example)
        if not isinstance(text, str):
            raise ValueError(f"found {text!r}, expected text")
        return text


def _read(part: str, field: str | Callable[[Example], Any], example: Example) -> Any:
    """The value of a field's name or function."""
    with _making(part, example):
        return example[field] if isinstance(field, str) else field(example)


@dataclass(frozen=True, kw_only=True)
class Task:
    """How examples are put to a model. Where a string or a function fits, the function gets the example.

    With ``candidates`` the model chooses the most probable one; without them it writes free text.
    Every method raises ValueError with the example's file and line if a field is missing or does not fit.

    >>> task = Task(prompt="{sentence} It was", candidates=(" terrible", " great"))
    >>> example = {"sentence": "A gem.", "label": 1}
    >>> task.prompt_of(example) + task.gold_text(example)
    'A gem. It was great'
    """

    prompt: str | Callable[[Example], str]
    """A format string over the fields."""
    candidates: Sequence[str] | Callable[[Example], Sequence[str]] | None = None
    """The texts that may follow the prompt."""
    label: str | Callable[[Example], int | Sequence[int]] = "label"
    """The field of the right candidate's index or text, or of several, the first of which is trained."""
    answers: str | Callable[[Example], str | Sequence[str]] = "answers"
    """The field of the right texts, where there are no candidates."""
    target: str | Callable[[Example], str] = " {answer}\n"
    """What is trained after the prompt, where there are no candidates: a format string over the first answer."""
    metric: Metric | None = None
    """None: `accuracy` with candidates, `token_f1` without."""
    calibration: str | Callable[[Example], str] = ""
    """The content-free prompt of calibrated scores (arXiv 2104.08315), a format string over the fields."""
    classification: bool = True
    """Whether training compares the candidates, instead of raising the probability of the right one alone."""
    tokens: int = 50
    """How many tokens free text may have."""
    stop: tuple[str, ...] = ("\n",)
    """What ends free text, beside the end-of-text token."""
    separator: str = "\n\n"
    """What stands between demonstrations."""
    special_tokens: bool = True
    """Whether the tokenizer adds its special tokens; chat templates have them in the text."""
    source: str = ""
    """The Hugging Face data set whose fields these are, as "glue:sst2"."""

    def __post_init__(self) -> None:
        """Refuses format strings that do not parse, and a lone text where candidates belong."""
        for name in ("prompt", "target", "calibration"):
            form = getattr(self, name)
            try:
                list(Formatter().parse(form if isinstance(form, str) else ""))
            except ValueError as error:
                raise ValueError(f"{name}={form!r} is no format string ({error}); a brace is written {{{{") from error
        if isinstance(self.candidates, str):
            raise ValueError(f"candidates={self.candidates!r}: expected several texts, as (' no', ' yes')")

    def prompt_of(self, example: Fields) -> str:
        """The prompt."""
        return _fill("prompt", self.prompt, as_example(example))

    def calibration_of(self, example: Fields) -> str:
        """The prompt without content, against which calibrated scores are taken."""
        return _fill("calibration", self.calibration, as_example(example))

    def candidates_of(self, example: Fields) -> tuple[str, ...]:
        """The texts that may follow the prompt; at least one, none of them empty."""
        example = as_example(example)
        with _making("candidates", example):
            found = self.candidates(example) if callable(self.candidates) else self.candidates
            if not found or isinstance(found, str):
                raise ValueError(f"found {found!r}, expected a list of texts")
            for number, text in enumerate(found):
                if not isinstance(text, str) or not text.strip(" "):
                    raise ValueError(f"candidate {number} is {text!r}, expected text")
            return tuple(found)

    def _golds(self, example: Example) -> tuple[int, ...]:
        """The indices of the right candidates in the label's order."""
        names = [text.strip() for text in self.candidates_of(example)]
        value = _read("label", self.label, example)
        several = isinstance(value, Iterable) and not isinstance(value, str)
        try:
            golds = tuple(
                names.index(label.strip()) if isinstance(label, str) else operator.index(label)
                for label in (value if several else [value])
            )
        except (TypeError, ValueError):
            golds = ()
        if not golds or not all(0 <= gold < len(names) for gold in golds):
            expected = f"an integer from 0 to {len(names) - 1}, or the text of a candidate"
            raise ValueError(f"{example.where}: the label is {value!r}, expected {expected}")
        return golds

    def gold_of(self, example: Fields) -> frozenset[int]:
        """The indices of the right candidates, usually one."""
        return frozenset(self._golds(as_example(example)))

    def answers_of(self, example: Fields) -> tuple[str, ...]:
        """The right texts, at least one."""
        example = as_example(example)
        value = _read("answers", self.answers, example)
        with _making("answers", example):
            found = (value,) if isinstance(value, str) else tuple(value)
            if not found or not all(isinstance(text, str) for text in found):
                raise ValueError(f"found {value!r}, expected one text or several")
            return found

    def gold_text(self, example: Fields) -> str:
        """What is trained after the prompt: the (first) right candidate, or the target."""
        example = as_example(example)
        if self.candidates is not None:
            return self.candidates_of(example)[self._golds(example)[0]]
        if isinstance(self.target, str):
            example = Example({**example, "answer": self.answers_of(example)[0]}, example.where)
        return _fill("target", self.target, example)


def completion_task(prompt: str = "prompt", completion: str = "completion", **options: Any) -> Task:
    """A task on pairs of a prompt and its completion, both taken as they are; ``options`` are those of `Task`.

    >>> completion_task().gold_text({"prompt": "2 + 2 =", "completion": " 4"})
    ' 4'
    """
    fields = {"prompt": lambda example: example[prompt], "answers": completion, "target": "{answer}"}
    return Task(**{**fields, "metric": exact_match, **options})


def chat_task(template: Any, field: str = "messages", **options: Any) -> Task:
    r"""A task on conversations, whose last message is what the assistant is to say.

    ``template.render(messages, add_generation_prompt=...)`` makes the text, special tokens included. The answer
    that the metric sees is the content of the last message. ``options`` are those of `Task`.

    >>> class Lines:
    ...     def render(self, messages, add_generation_prompt):
    ...         text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
    ...         return text + "assistant:" * add_generation_prompt
    >>> talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    >>> chat_task(Lines()).gold_text({"messages": talk})
    ' 4\n'
    """

    def messages(example: Example) -> list[dict[str, Any]]:
        found = example[field]
        if not isinstance(found, Sequence) or not found or not all(isinstance(m, Mapping) for m in found):
            raise ValueError(f"{field} is {str(found)[:50]!r}, expected a list of messages with role and content")
        if found[-1].get("role") != "assistant":
            raise ValueError(f"the last message is of role {found[-1].get('role')!r}, expected 'assistant'")
        return list(found)

    def prompt(example: Example) -> str:
        return template.render(messages(example)[:-1], add_generation_prompt=True)

    def target(example: Example) -> str:
        start, whole = prompt(example), template.render(messages(example), add_generation_prompt=False)
        if not whole.startswith(start):
            raise ValueError(f"the chat template ends the prompt with {start[-30:]!r}, which the whole does not have")
        return whole[len(start) :]

    def answers(example: Example) -> str:
        return messages(example)[-1].get("content", "")

    fields = {"prompt": prompt, "answers": answers, "target": target, "stop": (), "special_tokens": False}
    return Task(**{**fields, **options})
