"""Losses of heads: the fields of a batch against NumPy in float64, and losses that a user writes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import make_model, random_ids

import zo2jax as zo
from zo2jax.models.heads import CausalLM, candidate_scores

ROWS, TIME, PICKED = 9, 12, 4
LENGTHS = np.array([12, 7, 3, 12, 9, 6, 8, 5, 11])
COUNTS = np.array([4, 2, 1, 3, 1, 0, 2, 4, 0])  # tokens of each candidate: the sixth and the ninth are none


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=["llama", "opt 350m"])  # without and with a projection
def setting(request):
    """(model, its loss_sum, batch with positions, their log-probabilities in float64)."""
    rng = np.random.default_rng(0)
    positions = np.stack([rng.choice(n, PICKED) for n in LENGTHS])  # in any order, some twice
    batch = {"ids": random_ids(1, (ROWS, TIME), 31), "lengths": LENGTHS, "positions": positions}
    batch = {name: x.astype(np.int32) for name, x in batch.items()}
    batch["targets"] = random_ids(2, (ROWS, PICKED), 31).astype(np.int32)
    model = make_model(request.param)
    logits = np.asarray(model.logits(batch["ids"], LENGTHS), np.float64)
    log_probs = np.take_along_axis(log_softmax(logits), positions[:, :, None], axis=1)
    loss_sum = jax.jit(partial(model.loss_sum, model.params))
    return model, loss_sum, batch, np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_log_probs_at_positions(setting):
    model, _, batch, expected = setting
    mine = model.token_log_probs(batch)
    assert (mine.dtype, mine.shape) == (jnp.float32, (ROWS, PICKED))
    np.testing.assert_allclose(mine, expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.5


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_at_positions(setting, weighted):
    """Without weights every position counts once, whatever the lengths."""
    _, loss_sum, batch, log_probs = setting
    rng = np.random.default_rng(3)
    weights = rng.random((ROWS, PICKED)) * (rng.random((ROWS, PICKED)) < 0.6) if weighted else np.ones((ROWS, PICKED))
    assert weights.all() != weighted
    more = {"weights": weights.astype(np.float32)} if weighted else {}
    total, count = loss_sum(batch | more)
    assert (total.dtype, count.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose([total, count], [-(log_probs * weights).sum(), weights.sum()], rtol=1e-5)


def candidate_loss(log_probs, weights, labels):
    """(sum, count), one candidate and one example after the other."""
    scores = [lp[w > 0] @ w[w > 0] / w.sum() if w.any() else -np.inf for lp, w in zip(log_probs, weights, strict=True)]
    total, per = 0.0, len(scores) // len(labels)
    for i, label in enumerate(labels):
        if label >= 0:
            group = np.array(scores[i * per : (i + 1) * per])
            total -= group[label] - np.log(np.exp(group[np.isfinite(group)]).sum())
    return total, sum(label >= 0 for label in labels)


@pytest.mark.parametrize("labels", [(0, 1, 1), (2, 0, -1), (-1, -1, -1)])
def test_candidates_are_compared_by_their_mean(setting, labels):
    """Three examples of three candidates; two candidates have no token, and negative labels mark filler."""
    _, loss_sum, batch, log_probs = setting
    weights = (np.arange(PICKED) < COUNTS[:, None]).astype(np.float32)
    batch = batch | {"weights": weights.reshape(3, 3, PICKED), "labels": np.array(labels, np.int32)}
    total, count = loss_sum(batch)
    assert (total.dtype, total.shape) == (jnp.float32, ())
    np.testing.assert_allclose([total, count], candidate_loss(log_probs, weights, labels), rtol=1e-5, atol=1e-5)


def test_a_filler_example_may_be_without_any_candidate(setting):
    _, loss_sum, batch, log_probs = setting
    weights = (np.arange(PICKED) < np.where(np.arange(ROWS) < 6, COUNTS, 0)[:, None]).astype(np.float32)
    batch = batch | {"weights": weights.reshape(3, 3, PICKED), "labels": np.array([1, 0, -1], np.int32)}
    expected = candidate_loss(log_probs, weights, (1, 0, -1))
    np.testing.assert_allclose(loss_sum(batch), expected, rtol=1e-5)
    scores = candidate_scores(jnp.asarray(log_probs, jnp.float32), jnp.asarray(weights.reshape(3, 3, PICKED)))
    assert np.isneginf(scores).tolist() == [[False] * 3, [False, False, True], [True] * 3]


def test_candidates_may_share_a_row(setting):
    """Each row is an example then, its targets the tokens of its candidates: four of one token, or two of two."""
    _, loss_sum, batch, log_probs = setting
    labels = np.arange(ROWS, dtype=np.int32) % 3 - 1
    for shape in ((ROWS, PICKED, 1), (ROWS, PICKED // 2, 2)):
        weights = np.ones(shape, np.float32)
        weights[2, 1] = 0
        expected = candidate_loss(log_probs.reshape(-1, shape[2]), weights.reshape(-1, shape[2]), labels)
        mine = loss_sum(batch | {"weights": weights, "labels": labels})
        np.testing.assert_allclose(mine, expected, rtol=1e-5)


HEADS = {"lm": CausalLM(), "classification": zo.Classification(("a", "b", "c")), "spans": zo.QuestionAnswering()}
FIELDS = {
    "lm": {"targets": (ROWS, PICKED), "positions": (ROWS, PICKED), "labels": (3,)},
    "classification": {"labels": (ROWS,)},
    "spans": {"starts": (ROWS,), "ends": (ROWS,)},
}
SHAPES = {"lm": (ROWS, PICKED, 31), "classification": (ROWS, 3), "spans": (ROWS, TIME, 2)}


@pytest.mark.parametrize("head", HEADS)
def test_a_loss_of_ones_own_is_given_logits(head):
    """Whatever else the batch holds; the head's own loss is replaced, and the model left as it was."""
    model = make_model("gpt2", layers=1, head=HEADS[head])
    batch = {"ids": random_ids(4, (ROWS, TIME), 31), "lengths": LENGTHS}
    batch |= {name: np.ones(shape) for name, shape in FIELDS[head].items()} | {"extra": np.arange(ROWS)}
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
    seen = {}

    def loss(logits, given):
        seen.update(logits=(logits.dtype, logits.shape), fields=set(given))
        return jnp.mean(jnp.square(logits), axis=tuple(range(1, logits.ndim))) * given["extra"].astype(jnp.float32)

    own = model.with_loss(loss)
    total, count = jax.jit(own.loss_sum)(own.params, batch)
    assert seen == {"logits": (jnp.float32, SHAPES[head]), "fields": set(batch)}
    assert model.blocks[:-1] == own.blocks[:-1] and model.blocks[-1].objective is None
    logits = np.asarray(model.logits(batch["ids"], LENGTHS), np.float64)
    if head == "lm":
        logits = logits[:, [1] * PICKED]
    squares = (logits**2).reshape(ROWS, -1).mean(axis=1)
    np.testing.assert_allclose([total, count], [squares @ np.arange(ROWS), ROWS], rtol=1e-5)


@pytest.mark.parametrize(
    "loss, what",
    [
        (lambda logits, batch: jnp.mean(logits), r"float32\[\]"),
        (lambda logits, batch: logits[:, 0], r"float32\[2, 31\]"),
        (lambda logits, batch: logits[:, 0, 0].astype(jnp.bfloat16), r"bfloat16\[2\]"),
        (lambda logits, batch: batch["ids"][:, 0], r"int32\[2\]"),
        (lambda logits, batch: 1.5, r"1\.5"),
        (lambda logits, batch: None, "None"),
    ],
)
def test_a_loss_that_is_no_float32_of_examples_is_refused(loss, what):
    model = make_model("gpt2", layers=1).with_loss(loss)
    with pytest.raises(TypeError, match=f"the loss function returned {what}, expected float32 \\[examples\\]"):
        jax.eval_shape(model.loss, model.params, {"ids": jnp.ones((2, 3), jnp.int32)})


def test_answers_beyond_the_row_are_left_out():
    """Those that a row was cut before, or that are marked by a negative number, count 0."""
    model = make_model("gpt2", head=zo.QuestionAnswering())
    ids, lengths = jnp.ones((4, 9), jnp.int32), jnp.array([9, 9, 5, 9])
    spans = {"starts": jnp.array([2, 7, 4, 0]), "ends": jnp.array([3, 9, 5, -1])}
    total, count = model.loss_sum(model.params, {"ids": ids, "lengths": lengths, **spans})
    alone = {"ids": ids[:1], "starts": jnp.array([2]), "ends": jnp.array([3])}
    assert (float(count), float(total)) == (1, pytest.approx(float(model.loss(model.params, alone)), rel=1e-5))
