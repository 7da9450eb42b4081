"""From a config to a trained and judged task, by the command line and by its parts."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import zo2jax as zo
from zo2jax import cli, train
from zo2jax.config import Config, ConfigError
from zo2jax.metrics import read_metrics
from zo2jax.models.hub import export
from zo2jax.tasks.data import demonstration_sets, find_splits, subset
from zo2jax.tasks.prepare import prepare, resolve_task
from zo2jax.tasks.scoring import evaluate
from zo2jax.trained import trained_model

OWN_TASK = """
import zo2jax as zo

def shouting(text, answers):
    return float(text.isupper())

first = zo.Task(prompt="{word} is", candidates=(" good", " bad"))
second = zo.Task(prompt="{word} =", answers="word", metric=shouting, tokens=3)
"""


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def folder(tmp_path):
    """Twelve training and six evaluation examples, and a file with two tasks on them."""
    for name, count in (("train", 12), ("validation", 6)):
        rows = [{"word": f"{name}{i}", "label": i % 2, "sentence": f"w{i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(OWN_TASK)
    return tmp_path


def a_config(folder, tiny_folder, **changes):
    values = {"model": str(tiny_folder), "data": str(folder), "task": "sst2", "directory": str(folder / "run")}
    values |= {"steps": 2, "eval_every": 1, "batch": 2, "train_examples": 8, "dev_examples": 4, "learning_rate": 1e-3}
    return Config(**values | changes)


def test_the_data_of_a_task_is_mezos_sample(folder, tiny_folder):
    """The first examples of the permutation are trained on, the next are held out."""
    config, model = a_config(folder, tiny_folder, objective="tokens"), zo.load(tiny_folder)
    data = prepare(config, model)
    chosen = subset(find_splits(str(folder))[0], 12, 0)

    def texts(batches):
        rows = [row for batch in batches for row in zip(batch["ids"], batch["lengths"], batch["weights"], strict=True)]
        return {model.tokenizer.decode(ids[:n].tolist()) for ids, n, weights in rows if weights.any()}

    words = ("terrible", "great")
    expected = [f"{example['sentence']} It was {words[example['label']]}" for example in chosen]
    assert texts(data.held_out) == set(expected[8:])
    assert texts(prepare(replace(config, steps=4), model).batches) == set(expected[:8])  # an epoch
    assert data.unit == "nats/token"


def test_micro_batches_are_the_rows_of_a_step(folder, tiny_folder):
    config, model = a_config(folder, tiny_folder, batch=4), zo.load(tiny_folder)
    whole, parts = prepare(config, model).batches, prepare(replace(config, micro_batches=2), model).batches
    assert len(whole) == len(parts) == config.steps
    for step, batch in zip(parts, whole, strict=True):
        assert [len(part["labels"]) for part in step] == [2, 2]
        np.testing.assert_array_equal(np.concatenate([part["labels"] for part in step]), batch["labels"])
    assert [len(step) for step in parts[-1:]] == [2]
    np.testing.assert_array_equal(parts[-1][1]["ids"], parts[config.steps - 1][1]["ids"])
    with pytest.raises(IndexError, match=f"step {config.steps} of {config.steps}"):
        parts[config.steps]


@pytest.mark.slow
def test_a_run_of_micro_batches(folder, tiny_folder):
    """As one of whole batches, up to rounding, in an estimator of several directions."""
    options = {"batch": 4, "estimator": "leave_one_out", "directions": 3, "eps": 0.1, "dtype": "float32"}
    losses = []
    for parts in (1, 2):
        directory = str(folder / f"run{parts}")
        config = a_config(folder, tiny_folder, micro_batches=parts, directory=directory, probe_batch=parts, **options)
        train.train(config)
        losses.append([line["train/loss"] for line in read_metrics(directory) if "train/loss" in line])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert len(losses[0]) == config.steps


def test_the_evaluation_is_that_of_its_parts(folder, tiny_folder):
    model = zo.load(tiny_folder)
    train_examples, validation = find_splits(str(folder))
    config = a_config(folder, tiny_folder, demonstrations=2, scoring="sfc", eval_examples=5)
    examples = subset(validation, 5, 0)
    expected = evaluate(
        model,
        resolve_task("sst2", model),
        examples,
        demonstrations=demonstration_sets(train_examples, 5, 2),
        scoring="sfc",
    )
    assert prepare(config, model).evaluate(model) == expected


@pytest.mark.parametrize("objective", ["candidates", "tokens", "accuracy", "generated"])
def test_each_objective_trains_and_is_judged(objective, folder, tiny_folder, capsys):
    config = a_config(folder, tiny_folder, objective=objective)
    result = train.train(config)
    assert result.finished and set(result.metrics) == {"accuracy"}
    lines = read_metrics(folder / "run")
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 1, 2]
    written = json.loads((folder / "run" / "evaluation.json").read_text())
    assert written["metrics"] == result.metrics and len(written["predictions"]) == written["count"] == 6
    assert list((folder / "run" / "tensorboard").glob("events.*"))
    step, model = trained_model(folder / "run", best=True)
    expected = evaluate(model, resolve_task("sst2", model), subset(find_splits(str(folder))[1], 1000, 0))
    assert (written["step"], result.metrics) == (step, expected.metrics)
    assert cli.main(["eval", str(folder / "run"), "--best"]) == 0
    assert capsys.readouterr().out.endswith(f"step {step}  {expected}\n")


def test_tasks_of_a_python_file(folder, tiny_folder, capsys):
    config = a_config(folder, tiny_folder, task=f"{folder}/own.py:second", objective="generated")
    result = train.train(config)
    assert set(result.metrics) == {"shouting"}
    assert Path(json.loads((folder / "run" / "config.json").read_text())["task"]).is_absolute()
    arguments = [f"model={tiny_folder}", f"data={folder}", f"task={folder}/own.py:first", "eval_examples=3"]
    assert cli.main(["eval", "demo", *arguments, "dev_examples=4"]) == 0
    assert re.search(r"step 0  accuracy \d\.\d+ \(3 examples\)", capsys.readouterr().out)


def test_completions_and_chats(tmp_path, tiny_folder):
    pairs = [{"prompt": "2 + 2 =", "completion": " 4"}] * 3
    talks = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}] * 3
    chatty = export(zo.load(tiny_folder), tmp_path / "chatty")
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (chatty / "chat_template.jinja").write_text(template)
    for name, rows in (("completion", pairs), ("chat", talks)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"task": name, "data": str(file), "validation": str(file), "train_examples": 2, "dev_examples": 1}
        config, model = a_config(tmp_path, chatty, **changes), zo.load(chatty)
        batch = prepare(config, model).batches[0]
        scored = batch["targets"][0][batch["weights"][0] > 0].tolist()
        assert model.tokenizer.decode(scored) == {"completion": " 4", "chat": "Ho"}[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sst-9"}, "unknown task 'sst-9': did you mean sst2"),
        ({"task": "no/own.py"}, "no file at no/own.py"),
        ({"task": "{folder}/own.py"}, "holds 2 tasks, expected one, or its name as own.py:NAME"),
        ({"task": "{folder}/own.py:third"}, "has no task 'third'; it has first, second"),
        ({"task": "{folder}/broken.py"}, r"broken.py does not run \(ZeroDivisionError"),
        (
            {"task": "{folder}/own.py:second", "objective": "accuracy"},
            "has no candidates; expected tokens or generated",
        ),
        ({"task": "{folder}/own.py:first", "data": ""}, "data is empty"),
        ({"task": "chat"}, "chat_template"),
        ({"data": "{folder}/train.jsonl"}, "is one file: name the evaluation examples by validation=FILE"),
        ({"dev_examples": 20}, "dev_examples=20 leaves none of 12 training examples"),
        ({"task": "rte"}, r"train.jsonl, line \d+: no field 'premise'; it has"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_written(changes, message, folder, tiny_folder):
    (folder / "broken.py").write_text("1 / 0")
    changes = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.train(a_config(folder, tiny_folder, **changes))
    assert not (folder / "run").exists()


@pytest.mark.parametrize("field", ["train_examples", "dev_examples", "eval_examples"])
def test_counts_of_examples_are_positive(field):
    with pytest.raises(ConfigError, match=f"{field}=0: expected an integer of at least 1"):
        Config(**{field: 0})
    with pytest.raises(ConfigError, match="demonstrations=-1"):
        Config(demonstrations=-1)


def test_generate_by_the_command_line(tiny_folder, folder, capsys, monkeypatch):
    model = zo.load(tiny_folder)
    assert cli.main(["generate", str(tiny_folder), "ab", "hello", "--tokens", "5"]) == 0
    expected = ["ab" + model.generate("ab", 5), "hello" + model.generate("hello", 5)]
    assert capsys.readouterr().out == "".join(text + "\n" for text in expected)
    monkeypatch.setattr("sys.stdin", iter(["ab\n"]))
    assert cli.main(["generate", str(tiny_folder), "--tokens", "5"]) == 0
    assert capsys.readouterr().out == expected[0] + "\n"
    sample = ["generate", str(tiny_folder), "ab", "--tokens", "9", "--temperature", "1", "--top-p", "0.9", "--seed"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert cli.main([*sample, seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert cli.main(["generate", str(tiny_folder), "ab", "--chat"]) == 1
    assert "chat_template" in capsys.readouterr().err


def test_flags_may_stand_before_overrides(tiny_folder, folder, capsys):
    arguments = [f"model={tiny_folder}", f"data={folder}", "task=sst2", "dev_examples=4", "eval_examples=2"]
    with pytest.raises(SystemExit):
        cli.main(["eval", "demo", "--best", "stray", *arguments])
    assert "unrecognized arguments: stray" in capsys.readouterr().err
    assert cli.main(["eval", "demo", "--best", *arguments]) == 1
    assert "--best: demo is a config" in capsys.readouterr().err
