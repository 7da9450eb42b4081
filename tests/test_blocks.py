"""Any model as blocks: stages of Flax and of plain JAX, in every tier the same bits; and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zo2jax as zo
from zo2jax.leaves import leaf_id
from zo2jax.models.blocks import kinds, owned_shapes

pytestmark = pytest.mark.usefixtures("quick_compilation")

WORDS, SIZE, CLASSES = 19, 8, 3


class Mixer(nnx.Module):
    """Layers in a list, whose names are numbers."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.norm = nnx.LayerNorm(SIZE, rngs=rngs)
        self.layers = nnx.List(
            [nnx.Linear(SIZE, SIZE, dtype=jnp.float32, param_dtype=jnp.bfloat16, rngs=rngs) for _ in range(2)]
        )

    def __call__(self, x):
        up, down = self.layers
        return x + down(nnx.gelu(up(self.norm(x)))).astype(jnp.float32)


def embed(params, batch):
    return params["table"][batch["ids"]] * params["scale"][0] + params["positions"][: batch["ids"].shape[1]]


def convolve(params, x):
    (kernel, shifts), bias = params
    y = jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    return x + jnp.roll(y, shifts[0], axis=1) + bias


def head(params, x):
    return x.mean(axis=1) @ params["table"][:CLASSES].T + params["bias"]


def make(tied=True, loss=None):
    """NNX, Linen, functions; an integer leaf, a matrix of three axes, 16 bits; a stage without leaves; a tied head."""
    rng = np.random.default_rng(11)

    def normal(*shape):
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    table = normal(WORDS, SIZE)
    dense = nn.Dense(SIZE)
    stages = {
        "embed": (embed, {"table": table, "scale": np.ones(1, np.float32), "positions": jnp.asarray(normal(5, SIZE))}),
        "mixer.0": Mixer(1),
        "mixer.1": Mixer(2),
        "dense": (dense, dense.init(jax.random.key(0), jnp.ones((1, SIZE)))["params"]),
        "tanh": jnp.tanh,
        "conv": (convolve, ((normal(3, SIZE, SIZE), np.ones(1, np.int32)), normal(SIZE))),
        "head": (head, {"table": table, "bias": normal(CLASSES)}),
    }
    return zo.blocks(stages, loss=loss or cross_entropy, tied={"head.table": "embed.table"} if tied else None)


def cross_entropy(logits, batch):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)[:, 0]


def batches(count=5):
    rng = np.random.default_rng(3)
    for _ in range(count):
        yield {
            "ids": rng.integers(0, WORDS, (4, 5)).astype(np.int32),
            "label": rng.integers(0, CLASSES, 4).astype(np.int32),
        }


NAMES = list(make().source)
PLANS = {
    "device": None,
    "host": zo.Plan(dict.fromkeys(NAMES, "host")),
    "disk": zo.Plan(dict.fromkeys(NAMES, "disk"), prefetch=2),
    "mixed": zo.Plan(dict(zip(NAMES, ["host", "disk", "device", "host", "disk", "host", "disk"], strict=True))),
}
ARGUMENTS = (zo.averaged(zo.two_point(1e-2), 2), zo.sgd(1e-2, 0.1))


def run_of(model, directory, tier="device", **options):
    return zo.Run(model, *ARGUMENTS, directory=directory, key=jax.random.key(5), plan=PLANS[tier], **options)


def trained(model, directory, tier):
    """(weights, losses, updates), with an evaluation in the middle."""
    with run_of(model, directory, tier) as run:
        infos = [run.step(batch) for batch in batches(3)]
        middle = run.evaluate(batches(2))
        infos += [run.step(batch) for batch in batches(2)]
        return run.state.params, [middle, *(float(i.loss) for i in infos)], [i.update for i in infos]


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), dict(a), dict(b))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def on_device(request, tmp_path_factory):
    model = make(request.param)
    return model, *trained(model, tmp_path_factory.mktemp("device"), "device")


@pytest.mark.parametrize("tier", ["host", "disk", "mixed"])
def test_tiers_change_no_bit(on_device, tier, tmp_path):
    model, weights, losses, _ = on_device
    others = trained(model, tmp_path, tier)
    assert others[1] == losses
    assert_same(others[0], weights)


def test_a_run_is_the_step_of_mezo(on_device):
    model, weights, losses, updates = on_device
    plain = zo.mezo(model.loss, *ARGUMENTS)
    state, first = plain.init(model.params, jax.random.key(5)), next(batches())
    np.testing.assert_allclose(losses[1], float(jax.jit(plain.step)(state, first)[1].loss), rtol=1e-5)
    expected = model.params
    for update in updates:
        expected = zo.apply_update(expected, update, state.leaf_ids)
    assert_same(weights, expected)
    for leaf, start in zip(*map(jax.tree.leaves, (weights, model.params)), strict=True):
        if leaf.dtype == jnp.int32:
            assert leaf.tolist() == start.tolist() == [1]
        else:
            assert np.mean(np.asarray(leaf) != np.asarray(start)) > 0.4


def test_the_stages_are_called_as_they_are():
    """Against the modules and functions by themselves."""
    model, batch = make(tied=False), next(batches())
    p = model.params
    x = embed(p["embed"], batch)
    for seed in (1, 2):
        x = Mixer(seed)(x)
    x = jnp.tanh(nn.Dense(SIZE).apply({"params": p["dense"]}, x))
    x = head(p["head"], convolve(((p["conv"]["0"]["0"], p["conv"]["0"]["1"]), p["conv"]["1"]), x))
    np.testing.assert_allclose(model.outputs(batch), x, rtol=1e-5, atol=1e-6)
    assert float(model.loss(p, batch)) == pytest.approx(float(cross_entropy(x, batch).mean()), rel=1e-6)


def test_a_tied_matrix_stands_once_with_its_owner():
    model, batch = make(tied=True), next(batches())
    assert list(owned_shapes(model.blocks)["head"]) == list(model.source["head"]) == ["bias"]
    before = model.outputs(batch)
    params = model.params
    params["embed"]["table"] = params["embed"]["table"].at[:CLASSES].add(1.0)
    ids = dict(batch, ids=np.maximum(batch["ids"], CLASSES))  # rows that only the head looks at
    assert not np.allclose(model.outputs(ids), before)


def test_equal_stages_share_one_program():
    dense = [nn.Dense(4), nn.Dense(4), nn.Dense(4, use_bias=False)]
    params = [d.init(jax.random.key(i), jnp.ones((1, 4)))["params"] for i, d in enumerate(dense)]
    function = lambda w, x: x @ w  # noqa: E731
    stages = [*zip(dense, params, strict=True), *(nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2))]
    stages += [(function, np.eye(4, dtype=np.float32)), (function, jnp.eye(4)), (function, jnp.ones((4, 2)))]
    model = zo.blocks([lambda batch: batch["x"], *stages, lambda x: (x.sum(), 1)])
    _, *found, _ = kinds(model.blocks)
    assert [found.index(kind) for kind in found] == [0, 0, 2, 3, 3, 5, 5, 7]


def test_noise_is_addressed_by_dotted_names():
    model = zo.blocks({"first": (lambda p, b: b, {"a": [np.ones(2, np.float32)]}), "last": Mixer(1)})
    names = ["first.a.0", *(f"last.layers.{i}.{leaf}" for i in range(2) for leaf in ("bias", "kernel"))]
    names += ["last.norm.bias", "last.norm.scale"]
    state = zo.mezo(model.loss, *ARGUMENTS).init(model.params, jax.random.key(0))
    assert state.leaf_ids.tolist() == [leaf_id(name) for name in names]


def test_parameters_that_are_made_when_asked_for(tmp_path):
    """Traced for their shapes, made once for a run, and not at all for a run that goes on."""
    made = []

    def weights(i):
        if not isinstance(jnp.ones(()), jax.core.Tracer):
            made.append(i)
        return {"w": jax.random.normal(jax.random.key(i), (4, 4)) / 4}

    def stage(p, x):
        return x @ p["w"]

    np.save(tmp_path / "last.npy", np.ones((4, 1), np.float32))
    stages = [(stage, lambda i=i: weights(i)) for i in range(3)]
    stages.append((lambda w, x: x @ w, lambda: np.load(tmp_path / "last.npy", mmap_mode="r")))
    model = zo.blocks(stages, loss=lambda y, batch: jnp.mean(y**2))
    assert made == [] and model.parameter_count == 52
    for expected in ([0, 1, 2], []):
        plan = zo.Plan(dict.fromkeys(model.source, "host"))
        with zo.Run(model, *ARGUMENTS, directory=tmp_path / "run", key=jax.random.key(1), plan=plan) as run:
            run.step(np.ones((2, 4), np.float32))
            run.save()
        assert sorted(made) == expected
        made.clear()


def test_parameters_that_change_are_refused():
    sizes = iter([3, 4])
    model = zo.blocks([(lambda w, x: (w.sum(), 1), lambda: np.ones(next(sizes), np.float32))])
    with pytest.raises(ValueError, match=r"parameters of stage '0' are .*4.* now, expected .*3.* as before"):
        model.source["0"]


def test_a_run_goes_on_in_another_tier(tmp_path):
    model, steps = make(), list(batches(3))
    with run_of(model, tmp_path / "straight") as run:
        for batch in steps:
            run.step(batch)
        straight = run.state.params
    for tier, until in (("disk", 1), ("mixed", 3)):
        with run_of(model, tmp_path / "parts", tier) as run:
            for batch in run.remaining(steps[:until]):
                run.step(batch)
            run.save()
            weights = run.state.params
            outputs = run.model.outputs(steps[0])
    assert_same(weights, straight)
    np.testing.assert_allclose(outputs, make(False).replace(untied(weights)).outputs(steps[0]), rtol=1e-5)


def untied(weights):
    return {**weights, "head": {"table": jnp.array(weights["embed"]["table"]), **weights["head"]}}


LOSSES = {
    "each example": cross_entropy,
    "sum and count": lambda y, batch: (cross_entropy(y, batch).sum(), len(y)),
    "int32 count": lambda y, batch: (cross_entropy(y, batch).sum(), jnp.int32(len(y))),
    "mean": lambda y, batch: cross_entropy(y, batch).mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, tmp_path):
    """Those of `blocks`, and those that a run is given in its place."""
    batch, table = next(batches()), np.linspace(-1, 1, WORDS * CLASSES, dtype=np.float32).reshape(WORDS, CLASSES)
    stages = [(lambda w, batch: w[batch["ids"]].sum(1), table)]
    expected = float(cross_entropy(table[batch["ids"]].sum(1), batch).mean())
    model = zo.blocks(stages, loss=LOSSES[loss])
    assert float(model.loss(model.params, batch)) == pytest.approx(expected, rel=1e-6)
    other = zo.blocks(stages, loss=lambda y, batch: jnp.zeros(1))
    with run_of(other, tmp_path, loss=LOSSES[loss]) as run:
        assert run.evaluate([batch, batch]) == pytest.approx(expected, rel=1e-6)
        assert float(run.step(batch).loss) == pytest.approx(expected, rel=0.1)


def test_a_count_may_be_less_than_the_batch():
    model = make(
        loss=lambda y, batch: (
            jnp.sum(jnp.where(batch["label"] == 1, cross_entropy(y, batch), 0)),
            jnp.sum(batch["label"] == 1),
        )
    )
    batch = next(batches())
    _, count = model.loss_sum(model.params, batch)
    assert count.dtype == jnp.float32 and int(count) == np.sum(batch["label"] == 1) > 0
    none = dict(batch, label=np.zeros(4, np.int32))
    assert float(model.loss(model.params, none)) == 0


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (lambda y, batch: y, r"float32\[4, 3\], expected \(sum float32 \[\], count \[\]\) or float32 \[examples\]"),
        (lambda y, batch: y[:, 0].astype(jnp.bfloat16), r"bfloat16\[4\]"),
        (lambda y, batch: (y[:, 0], 4), r"\(float32\[4\], 4\)"),
        (lambda y, batch: (y.sum(), y[0]), r"\(float32\[\], float32\[3\]\)"),
        (lambda y, batch: (y.sum(), 1, 2), r"\(float32\[\], 1, 2\)"),
        (lambda y, batch: 1.0, "loss is 1.0"),
    ],
)
def test_other_losses_are_refused(loss, what):
    model = zo.blocks([(lambda w, batch: batch @ w, np.ones((2, 3), np.float32))], loss=loss)
    with pytest.raises(TypeError, match=what):
        model.loss(model.params, jnp.ones((4, 2)))


def test_outputs_are_not_taken_for_losses():
    model = zo.blocks([(lambda w, batch: batch @ w, np.ones(3, np.float32))])
    with pytest.raises(TypeError, match=r"loss is float32\[2\], expected .* give blocks\(...\) a loss of the outputs"):
        model.loss(model.params, jnp.ones((2, 3)))


def test_a_model_of_one_stage_sees_the_whole_batch(tmp_path):
    model = zo.blocks([(lambda w, batch: batch["anything"] @ w, np.ones((3, 1), np.float32))])
    batch = {"anything": np.ones((2, 3), np.float32), "labels": -np.ones(2, np.float32)}
    loss = lambda y, batch: (y[:, 0] - batch["labels"]) ** 2  # noqa: E731
    with run_of(model, tmp_path, loss=loss) as run:
        assert run.evaluate([batch]) == pytest.approx(16)  # labels below zero are labels like any others


def test_text_is_not_for_any_model():
    model = zo.blocks([lambda batch: (batch["x"].sum(), 1)])
    with pytest.raises(ValueError, match="knows no tokens"):
        model.logits(np.ones((1, 2), np.int32))
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate("", 1)


class Dropout(nnx.Module):
    def __init__(self):
        self.drop = nnx.Dropout(0.1, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.drop(x))


W = np.ones((2, 2), np.float32)
SHARED = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
PAIR = (lambda w, x: x, W)


class Settings(nn.Module):
    table: np.ndarray

    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("stages", "tied", "error", "what"),
    [
        ([], {}, ValueError, "no stages"),
        ([Dropout()], {}, ValueError, r"drop.rngs.count \(RngCount\).*norm.mean \(BatchStat\).*\(function, params\)"),
        ([nn.Dense(2)], {}, TypeError, r"stage '0' is Dense.*\(Linen module, params\)"),
        (
            [(nn.Dense(2), {"params": {}, "batch_stats": {}})],
            {},
            ValueError,
            r"\['batch_stats', 'params'\].*\[\"params\"\]",
        ),
        ([(nn.Dense(2),)], {}, TypeError, "expected a Flax NNX module"),
        ([(SHARED, {})], {}, TypeError, "expected a Flax NNX module"),
        ([W], {}, TypeError, "expected a Flax NNX module"),
        ([(Settings(W), {})], {}, TypeError, "stage '0' cannot be hashed.*keep arrays among its parameters"),
        ([(abs, {"w": 1.0})], {}, TypeError, "leaf 'w' of stage '0' is 1.0, expected an array of numbers"),
        ([(abs, {"w": jax.random.key(0)})], {}, TypeError, "leaf 'w' of .*key.*, expected an array of numbers"),
        ([(abs, W[:0])], {}, ValueError, r"leaf 'weight' of stage '0' has the shape \(0, 2\)"),
        ([(abs, np.ones(2))], {}, TypeError, "leaf 'weight' of stage '0' is float64: cast it to float32 first"),
        ([nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))], {}, TypeError, "is ShapeDtypeStruct of float32"),
        ([(abs, {"a": {"b": W}, "a.b": W})], {}, ValueError, "two leaves of the name 'a.b'"),
        ([(abs, {"a": W, "a.b": W})], {}, ValueError, "'a.b' and 'a': rename one"),
        ([(abs, {"": {"b": W}})], {}, ValueError, "named '.b'"),
        ({"a/b": abs}, {}, ValueError, "named 'a/b', expected a text that can be a folder's name"),
        ({1: abs}, {}, ValueError, "named 1"),
        ({"a": abs, "a.b": abs}, {}, ValueError, "stages are named 'a.b' and 'a'"),
        ([SHARED, SHARED], {}, ValueError, r"'0' and '1' share the variable .*tied=\{\"1\."),
        ([PAIR, PAIR], {"1.w": "0.weight"}, ValueError, "no leaf '1.w' to tie, only 0.weight, 1.weight"),
        ([PAIR, PAIR], {"1.weight": "0.w"}, ValueError, "no leaf '0.w' to tie"),
        ([PAIR, PAIR], {"0.weight": "1.weight"}, ValueError, "expected a leaf that an earlier stage owns"),
        ([PAIR] * 3, {"1.weight": "0.weight", "2.weight": "1.weight"}, ValueError, "an earlier stage owns"),
        (
            [PAIR, (abs, np.ones((2, 3), np.float32))],
            {"1.weight": "0.weight"},
            ValueError,
            "two matrices that are alike",
        ),
        ([(abs, W[0]), (abs, W[0])], {"1.weight": "0.weight"}, ValueError, "two matrices that are alike"),
    ],
)
def test_what_cannot_be_streamed_is_refused(stages, tied, error, what):
    with pytest.raises(error, match=what):
        zo.blocks(stages, tied=tied)
