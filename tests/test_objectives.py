"""Losses that are not the model's own: a user's function, accuracy, a score of generated text."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zo2jax as zo
from zo2jax.directions import step_keys
from zo2jax.metrics import read_metrics
from zo2jax.models.blocks import forward
from zo2jax.models.llama import LlamaConfig
from zo2jax.objectives import error_rate
from zo2jax.tasks.encoding import TaskBatches, TaskHeldOut
from zo2jax.tasks.metrics import token_f1
from zo2jax.updates import perturb

CONFIG = LlamaConfig(vocabulary=23, size=16, hidden=24, layers=2, heads=2, kv_heads=1, head_size=8, context=32)
TASK = zo.Task(prompt="{x} is", candidates=(" good", " bad."))
EXAMPLES = [{"x": word, "label": i % 2} for i, word in enumerate(["tea", "rain", "a walk", "noise", "rest"])]
ESTIMATOR = zo.two_point(0.05)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def a_run(model, folder, **options):
    return zo.Run(model, ESTIMATOR, zo.sgd(1e-2), directory=folder, key=jax.random.key(3), **options)


def probes(model):
    """The parameters of the two members of a run's first step."""
    state = zo.mezo(model.loss, ESTIMATOR, zo.sgd(1e-2)).init(model.params, jax.random.key(3))
    keys = step_keys(state.key, state.step, 1)
    return [perturb(model.params, keys, jnp.asarray(row), state.leaf_ids) for row in ESTIMATOR.probes]


def assert_same_weights(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def weighted_squares(logits, batch):
    return batch["scale"] * jnp.mean(jnp.square(logits), axis=(1, 2))


def test_a_users_loss_makes_the_step_of_the_definition(tmp_path):
    """The same coefficients and weights as `zo2jax.mezo` with that loss, though the batch has targets."""
    model = CONFIG.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    ids = rng.integers(23, size=(3, 8)).astype(np.int32)
    batch = {"ids": ids, "targets": ids, "scale": rng.random(3).astype(np.float32)}
    algorithm = zo.mezo(
        lambda params, b: weighted_squares(model.replace(params).logits(b["ids"]), b).mean(), ESTIMATOR, zo.sgd(1e-2)
    )
    state, info = jax.jit(algorithm.step)(algorithm.init(model.params, jax.random.key(3)), batch)
    with a_run(model, tmp_path, loss=weighted_squares) as run:
        step = run.step(batch)
        assert step.loss == pytest.approx(float(info.loss), rel=1e-6)
        assert step.projected_gradient == pytest.approx(np.asarray(info.projected_gradient), rel=1e-4)
        moved = zo.apply_update(model.params, step.update, state.leaf_ids)
        assert_same_weights(run.model.params, moved)
        expected = np.mean(weighted_squares(run.model.logits(ids), batch))
        assert run.evaluate([batch]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("loss", [lambda logits, batch: logits.mean(), lambda logits, batch: logits[:, 0, 0] > 0])
def test_a_loss_of_another_shape_or_dtype_is_refused(loss, tmp_path):
    model = CONFIG.init(jax.random.key(0))
    with a_run(model, tmp_path, loss=loss) as run:
        with pytest.raises(TypeError, match=r"expected float32 \[examples\]"):
            run.step({"ids": np.ones((2, 4), np.int32)})
        assert_same_weights(run.model.params, model.params)


def accuracy_by_hand(model, params, task, examples):
    """How many examples have their best candidate right, with NumPy in float64 from one row's logits at a time."""
    right = 0
    for example in examples:
        scores = []
        for text in task.candidates_of(example):
            prompt = model.tokenizer.encode(task.prompt_of(example)).ids
            ids = model.tokenizer.encode(task.prompt_of(example) + text).ids
            logits = np.asarray(model.replace(params).logits([ids])[0], np.float64)
            log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            scores.append(np.mean([log_probs[i - 1, ids[i]] for i in range(len(prompt), len(ids))]))
        right += int(np.argmax(scores) == example["label"])
    return right


def test_accuracy_of_the_probes_is_trained_on(tiny_folder, tmp_path):
    model = zo.load(tiny_folder)
    batches = TaskBatches(model, TASK, EXAMPLES, batch=5, steps=1, seed=0, objective="candidates")
    counts = [accuracy_by_hand(model, params, TASK, EXAMPLES) for params in probes(model)]
    with a_run(model, tmp_path, loss=error_rate) as run:
        info = run.step(batches[0])
        assert float(info.loss) == pytest.approx(np.mean([1 - n / 5 for n in counts]))
        assert float(info.projected_gradient[0]) == pytest.approx((counts[1] - counts[0]) / 5 / (2 * 0.05), rel=1e-3)
        held_out = TaskHeldOut(model, TASK, EXAMPLES, batch=2, objective="candidates")  # the last batch has a filler
        right = accuracy_by_hand(model, run.model.params, TASK, EXAMPLES)
        assert run.evaluate(held_out) == pytest.approx(1 - right / 5)


def test_a_classifiers_accuracy():
    labels = jnp.array([1, 0, -1])
    logits = jnp.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert error_rate(logits, {"labels": labels}).tolist() == [0, 1, 1]


def length_and_a(text, references):
    """A score that most changes of a text change."""
    return len(text) / 10 + text.count("a") + token_f1(text, references)


@pytest.mark.parametrize("tied", [True, False])
def test_generated_text_is_what_each_probe_writes(tied, tiny_folder, byte_tokenizer, tmp_path):
    """Losses of both members from texts that the perturbed models write on their own, and the update that follows."""
    model = zo.load(tiny_folder)
    if not tied:
        model = replace(replace(model.config, tied=False).init(jax.random.key(5)), tokenizer=byte_tokenizer)
    objective = zo.Generated(length_and_a, tokens=6, stop=("q",))
    prompts = ["abc", "x", "hello there"]
    rows = [model.tokenizer.encode(p).ids for p in prompts]
    ids = np.zeros((3, 16), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    answers = [["a b"], ["c", "d"], []]
    batch = {"ids": ids, "lengths": np.array([len(row) for row in rows]), "answers": answers}

    def loss_of(params):
        texts = model.replace(params).generate(rows, 6, stop=("q",))
        scored = [length_and_a(t.strip(), a) for t, a in zip(texts, answers, strict=True) if a]
        return -np.mean(scored)

    losses = [loss_of(params) for params in probes(model)]
    with a_run(model, tmp_path, loss=objective) as run:
        before = run.evaluate([batch])
        assert before == pytest.approx(loss_of(model.params))
        info = run.step(batch)
        assert float(info.loss) == pytest.approx(np.mean(losses), rel=1e-6)
        expected = (losses[0] - losses[1]) / (2 * 0.05)
        assert float(info.projected_gradient[0]) == pytest.approx(expected, rel=1e-3)
        state = zo.mezo(model.loss, ESTIMATOR, zo.sgd(1e-2)).init(model.params, jax.random.key(3))
        assert_same_weights(run.model.params, zo.apply_update(model.params, info.update, state.leaf_ids))
        run.step(batch)
        run.flush()
    lines = [line for line in read_metrics(tmp_path) if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2]


def test_answers_must_fit_the_prompts(tiny_folder, tmp_path):
    batch = {"ids": np.ones((2, 4), np.int32), "lengths": np.array([4, 4]), "answers": [["a"]]}
    objective = zo.Generated(token_f1, tokens=2)
    with (
        a_run(zo.load(tiny_folder), tmp_path, loss=objective) as run,
        pytest.raises(ValueError, match="1 answers for 2 prompts"),
    ):
        run.step(batch)


def test_training_with_a_loss_resumes_and_tensorboard_follows(tmp_path):
    model = CONFIG.init(jax.random.key(0))
    batch = {"ids": np.arange(8, dtype=np.int32)[None], "scale": np.ones(1, np.float32)}
    make = partial(a_run, model, loss=weighted_squares, tensorboard=True)
    with make(tmp_path / "whole") as run:
        for _ in range(4):
            run.step(batch)
        whole = jax.tree.map(np.asarray, run.model.params)
    for _ in range(2):
        with make(tmp_path / "parts") as run:
            for _ in run.remaining([batch] * (2 + run.steps_done)):
                run.step(batch)
            run.evaluate([batch])
            run.save()
            parts = jax.tree.map(np.asarray, run.model.params)
    assert_same_weights(whole, parts)
    assert len(list((tmp_path / "parts" / "tensorboard").glob("events.*"))) == 2
    with pytest.raises(ValueError, match="loss: 'weighted_squares' there, None now"):
        a_run(model, tmp_path / "parts")


def test_events_hold_the_evaluations(tmp_path):
    from tensorboardX.proto import event_pb2

    model = CONFIG.init(jax.random.key(0))
    batch = {"ids": np.ones((2, 4), np.int32), "targets": np.ones((2, 4), np.int32)}
    with a_run(model, tmp_path, tensorboard=True) as run:
        run.step(batch)
        loss = run.evaluate([batch])
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    data, found = file.read_bytes(), {}
    while data:  # TFRecord: length (8 bytes), its checksum (4), the record, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + size :]
    assert found["eval/loss"] == (1, pytest.approx(loss, rel=1e-6))


def test_logits_of_a_model_with_a_loss_stay_logits():
    """Only losses change: without them the head gives what it gave."""
    model = CONFIG.init(jax.random.key(0))
    changed = model.with_loss(weighted_squares)
    batch = {"ids": jnp.ones((1, 4), jnp.int32), "scale": jnp.ones(1)}
    total, count = forward(model.visits(changed.blocks), changed.blocks, batch)
    assert float(count) == 1
    assert float(total) == pytest.approx(float(jnp.mean(jnp.square(model.logits(batch["ids"])))), rel=1e-6)
