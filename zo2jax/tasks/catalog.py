"""The known tasks: those of MeZO (arXiv 2305.17333) with its prompts, and three more."""

from difflib import get_close_matches

from zo2jax.tasks.data import Example
from zo2jax.tasks.metrics import rouge
from zo2jax.tasks.task import Task


def _boolq_prompt(example: Example) -> str:
    question = example["question"]
    mark = "" if question.endswith("?") else "?"
    return f"{example['passage']} {question[:1].upper()}{question[1:]}{mark}\n"


def _boolq_label(example: Example) -> int:
    """Yes comes first, as in the prompt."""
    answer = example["answer"]
    return {True: 0, False: 1}[answer] if answer in (True, False) else answer


def _wsc_prompt(example: Example) -> str:
    pronoun, noun = example["span2_text"].lower(), example["span1_text"]
    question = f'In the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?'
    return f"{example['text']}\n{question}\n"


def _copa_conjunction(example: Example) -> str:
    conjunctions = {"effect": "so ", "cause": "because "}
    if (question := example["question"]) not in conjunctions:
        raise ValueError(f"question is {question!r}, expected 'effect' or 'cause'")
    return conjunctions[question]


def _copa_prompt(example: Example) -> str:
    return f"{example['premise'].rstrip().removesuffix('.')} {_copa_conjunction(example)}"


def _copa_candidates(example: Example) -> list[str]:
    """The choices, which go on with the premise's sentence: they start in lower case, except for "I"."""
    choices = [example["choice1"].partition(" "), example["choice2"].partition(" ")]
    return [(first if first == "I" else first.lower()) + space + rest for first, space, rest in choices]


def _record_candidates(example: Example) -> list[str]:
    return [f" {example['query'].replace('@placeholder', entity)}" for entity in example["entities"]]


def _record_label(example: Example) -> list[int]:
    entities = list(example["entities"])
    if missing := [answer for answer in example["answers"] if answer not in entities]:
        raise ValueError(f"the answer {missing[0]!r} is none of the entities {', '.join(map(repr, entities))}")
    return [entities.index(answer) for answer in example["answers"]]


def _trec_label(example: Example) -> int:
    """The published files number the classes as `TASKS` has them; Hugging Face has ABBR first and DESC third."""
    if "coarse_label" not in example:
        return example["label"]
    label = example["coarse_label"]
    return {0: 2, 2: 0}.get(label, label)


def _entailment(options: str) -> str:
    return '{premise}\nDoes this mean that "{hypothesis}" is true? ' + options + "\n"


def _squad_prompt(example: Example) -> str:
    question = example["question"].strip()
    return f"Title: {example['title']}\nContext: {example['context']}\nQuestion: {question}\nAnswer:"


def _drop_prompt(example: Example) -> str:
    return f"Passage: {example['passage']}\nQuestion: {example['question'].strip()}\nAnswer:"


TASKS: dict[str, Task] = {
    "sst2": Task(
        prompt=lambda e: f"{e['sentence'].strip()} It was",
        candidates=(" terrible", " great"),
        calibration=" It was",
        source="glue:sst2",
    ),
    "rte": Task(prompt=_entailment("Yes or No?"), candidates=("Yes", "No"), source="super_glue:rte"),
    "cb": Task(
        prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        candidates=("Yes", "No", "Maybe"),
        source="super_glue:cb",
    ),
    "boolq": Task(
        prompt=_boolq_prompt,
        candidates=("Yes", "No"),
        label=_boolq_label,
        source="boolq",
    ),
    "wsc": Task(prompt=_wsc_prompt, candidates=("No", "Yes"), source="super_glue:wsc.fixed"),
    "wic": Task(
        prompt='Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\n",
        candidates=("No", "Yes"),
        source="super_glue:wic",
    ),
    "multirc": Task(
        prompt='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        candidates=("No", "Yes"),
        source="super_glue:multirc",
    ),
    "copa": Task(
        prompt=_copa_prompt,
        candidates=_copa_candidates,
        calibration=_copa_conjunction,
        classification=False,
        source="super_glue:copa",
    ),
    "record": Task(
        prompt=lambda e: e["passage"].replace("@highlight\n", "- ") + "\n-",
        candidates=_record_candidates,
        label=_record_label,
        calibration="-",
        classification=False,
        source="super_glue:record",
    ),
    "squad": Task(
        prompt=_squad_prompt,
        answers=lambda e: e["answers"]["text"],
        classification=False,
        source="squad",
    ),
    "drop": Task(
        prompt=_drop_prompt,
        answers=lambda e: e["answers_spans"]["spans"],
        classification=False,
        source="drop",
    ),
    # MeZO ran TREC with RoBERTa's mask only; this is a prompt for causal models.
    "trec": Task(
        prompt="{text}\nType:",
        candidates=(" Description", " Entity", " Expression", " Human", " Location", " Number"),
        label=_trec_label,
        source="trec",
    ),
    "mnli": Task(prompt=_entailment("Yes, Maybe, or No?"), candidates=("Yes", "Maybe", "No"), source="glue:mnli"),
    "squad_v2": Task(
        prompt=_squad_prompt,
        answers=lambda e: tuple(e["answers"]["text"]) or ("unanswerable",),
        classification=False,
        source="squad_v2",
    ),
    "cnn_dailymail": Task(
        prompt="{article}\nTL;DR:",
        answers=lambda e: e["highlights"].replace("\n", " "),
        metric=rouge,
        classification=False,
        tokens=128,
        stop=(),
        source="cnn_dailymail:3.0.0",
    ),
}
"""The tasks by name. Prompts, order of candidates and fields are those of MeZO's runner and the Hugging Face hub."""


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def find_task(name: str) -> Task:
    """The known task of a name; upper case, "-" and "_" do not matter.

    Raises:
        ValueError: for an unknown name, with the nearest one.

    >>> find_task("SST-2") is TASKS["sst2"]
    True
    """
    known = {_key(task): task for task in TASKS}
    if (key := _key(name)) not in known:
        near = get_close_matches(key, known, n=1)
        hint = f"did you mean {known[near[0]]}? " if near else ""
        raise ValueError(f"unknown task {name!r}: {hint}the known ones are {', '.join(TASKS)}")
    return TASKS[known[key]]
