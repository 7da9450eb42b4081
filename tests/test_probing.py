"""Linear probing: the fit against Newton's method on features of transformers, and where it is put."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import LABELS, make_model, make_reference, random_ids
from test_targets import arrays, assert_same, changed

import zo2jax as zo
from zo2jax.models.blocks import Source
from zo2jax.models.hub import export

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEAD = zo.Classification(LABELS)


def examples(count, vocabulary, seed):
    """Rows of several lengths with labels, some of which are to be left out."""
    rng = np.random.default_rng(seed)
    ids = random_ids(seed, (count, 9), vocabulary).astype(np.int32)
    lengths = rng.integers(4, 10, count).astype(np.int32)
    return ids, lengths, np.where(np.arange(count) % 10 == 9, -1, rng.integers(0, 3, count)).astype(np.int32)


def in_batches(ids, lengths, labels, size=16):
    for i in range(0, len(ids), size):
        part = slice(i, i + size)
        yield {"ids": ids[part], "lengths": lengths[part], "labels": labels[part]}


def penalized(w, x, labels, l2):
    """(loss, gradient, Hessian), float64, of all entries of W in a row."""
    z = x @ w.T
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    one_hot, n = np.eye(w.shape[0])[labels], len(x)
    gradient = (p - one_hot).T @ x / n + l2 * w
    curved = np.einsum("ia,ab->iab", p, np.eye(w.shape[0])) - np.einsum("ia,ib->iab", p, p)
    hessian = np.einsum("iab,ij,ik->ajbk", curved, x, x).reshape(w.size, w.size) / n + l2 * np.eye(w.size)
    return -np.log((p * one_hot).sum(axis=1)).mean() + l2 / 2 * (w**2).sum(), gradient.ravel(), hessian


@pytest.mark.parametrize(("case", "l2"), [("opt 350m", 1e-2), ("llama", 1e-3)])
def test_the_fit_is_the_optimum_of_features_of_transformers(case, l2, tmp_path):
    torch = pytest.importorskip("torch")
    reference = make_reference(case, "SequenceClassification", tmp_path)
    model = zo.load(tmp_path)
    ids, lengths, labels = examples(90, 67, 0)
    with torch.no_grad():  # rows one by one, without padding
        states = [
            reference.model(torch.tensor(row[None, :n])).last_hidden_state[0, -1]
            for row, n in zip(ids, lengths, strict=True)
        ]
    x, known = torch.stack(states).double().numpy()[labels >= 0], labels[labels >= 0]
    w = np.zeros((3, x.shape[1]))
    for _ in range(30):
        _, gradient, hessian = penalized(w, x, known, l2)
        w = w - np.linalg.solve(hessian, gradient).reshape(w.shape)
    best, gradient, _ = penalized(w, x, known, l2)
    assert np.abs(gradient).max() < 1e-12
    found = zo.probed(model, in_batches(ids, lengths, labels), l2=l2)
    ours = np.asarray(found.source["head"]["weight"], np.float64)
    assert penalized(ours, x, known, l2)[0] == pytest.approx(best, rel=1e-7)
    np.testing.assert_allclose(ours, w, atol=1e-3 * np.abs(w).max())
    assert changed(model, arrays(found.source)) == {"head.weight"}


def test_held_out_accuracy_and_steps_from_there(tmp_path):
    """Of a model whose blocks are read one at a time, of a stream, and of one with a prefix."""
    model, seen, rng = make_model("qwen3", head=HEAD), [], np.random.default_rng(0)
    other = {"weight": jnp.asarray(rng.standard_normal((3, 24)), jnp.float32)}
    teacher = model.replace(model.params | {"head": model.params["head"] | other})

    def taught(seed):
        ids, lengths, _ = examples(160, 31, seed)
        return ids, lengths, np.asarray(teacher.logits(ids, lengths)).argmax(axis=1).astype(np.int32)

    def accuracy(model):
        return np.mean(np.asarray(model.logits(ids, lengths)).argmax(axis=1) == labels)

    given, (ids, lengths, labels) = taught(1), taught(2)
    source = Source({n: (lambda n=n: seen.append(n) or model.params[n]) for n in model.source})
    found = zo.probed(replace(model, source=source), in_batches(*given))
    assert seen == [block.name for block in model.blocks]
    assert accuracy(found) > max(accuracy(model), 0.8)
    direction = zo.dense(targets=("head.*",))
    with zo.Run(found, zo.two_point(1e-3, direction=direction), zo.sgd(1e-4), directory=tmp_path, key=jax.random.key(0),
                plan=zo.Plan({"layers.0.attn": "disk", "layers.1.mlp": "host"})) as run:  # fmt: skip
        info = run.step(next(in_batches(ids, lengths, labels)))
        assert float(info.loss) < float(model.loss(model.params, next(in_batches(ids, lengths, labels))))
        again = zo.probed(run.model, in_batches(*given))
        np.testing.assert_allclose(again.source["head"]["weight"], found.source["head"]["weight"], atol=1e-3)
    wide = zo.with_prefix(make_model("qwen3", head=HEAD), [3, 1, 4])
    assert changed(wide, arrays(zo.probed(wide, in_batches(*given)).source)) == {"head.weight"}


def test_a_folder_of_its_own_head(tmp_path):
    """The matrix in a file is not read in its place, in the disk tier either, and other leaves are."""
    model = replace(make_model("llama", head=HEAD), tokenizer=None)
    loaded = zo.load(export(model, tmp_path / "model"))
    found = zo.probed(loaded, in_batches(*examples(40, 31, 1)))
    with zo.Run(found, zo.two_point(1e-3, direction=zo.lowrank(2, None)), zo.sgd(0.0), directory=tmp_path / "run",
                key=jax.random.key(0), plan=zo.Plan(dict.fromkeys(model.source, "disk"))) as run:  # fmt: skip
        assert "layers.0.attn" in run.in_files
        assert_same(arrays(run.model.source)["head"], arrays(found.source)["head"])
    assert (np.asarray(found.source["head"]["weight"]) != np.asarray(model.params["head"]["weight"])).all()


def test_what_cannot_be_fitted_is_refused():
    model, batch = make_model("llama", head=HEAD), next(in_batches(*examples(4, 31, 0)))
    for call, message in (
        (lambda: zo.probed(make_model("llama"), [batch]), r"the model's head is CausalLM\(\): expected one of zo2jax"),
        (lambda: zo.probed(model, [batch], l2=0), r"l2 is 0, expected a positive number, such as 1e-3"),
        (
            lambda: zo.probed(model, [batch | {"labels": jnp.full(4, -1)}]),
            "the largest label is -1, expected one",
        ),
        (
            lambda: zo.probed(model, [batch | {"labels": jnp.full(4, 9)}]),
            "the largest label is 9, expected one",
        ),
        (lambda: zo.probed(model, []), "the largest label is -1, expected one"),
        (lambda: zo.probed(model, [{"ids": batch["ids"]}]), "a batch has no labels: expected 'ids' and 'labels'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
