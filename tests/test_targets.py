"""Training some leaves only: the others stay, and what comes before all of them is computed once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_saver import wait
from test_stream import FAMILIES, PLANS, batches

import zo2jax as zo
from zo2jax import visits
from zo2jax.directions import from_json
from zo2jax.leaves import leaf_ids
from zo2jax.pages import flat

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOW = pytest.mark.slow

TARGETS = {
    "biases": ("*.bias",),
    "a head and its norm": ("head.*",),
    "the last layer and some": ("layers.1.*", "head.norm.*"),
    "parts of each layer": ("*.attn.q.*", "*.mlp.norm.*"),
}


def direction_of(name, kind="normal"):
    targets = TARGETS[name]
    if kind == "lora":
        return zo.lora(2, targets=("layers.1.attn.q.*", "layers.1.mlp.*"))
    return zo.lowrank(2, refresh=3, targets=targets) if kind == "lowrank" else zo.dense(kind, targets=targets)


def trained(model, directory, direction, plan=None, steps=6):
    """(weights, losses, updates) of a run with an evaluation in the middle."""
    estimator = zo.averaged(zo.two_point(1e-3, direction=direction), 2)
    with zo.Run(model, estimator, zo.sgd(1e-2, 0.1), directory=directory, key=jax.random.key(5), plan=plan) as run:
        losses, updates = [], []
        for i, batch in enumerate(batches(steps)):
            info = run.step(batch)
            losses.append(info.losses.tolist())
            updates.append(info.update)
            if i == 2:
                losses.append([run.evaluate(batches(1))])
        return arrays(run.model.source), losses, updates


def arrays(weights):
    return {name: jax.tree.map(np.asarray, weights[name]) for name in weights}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(x.tobytes() == y.tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def changed(model, weights):
    """Names of the leaves of which most entries moved, of all that are not as they were."""
    found = set()
    for block, leaves in weights.items():
        start = flat(arrays(model.source)[block])
        for name, leaf in flat(leaves).items():
            moved = np.mean(leaf != start[name])
            assert moved == 0 or moved > 0.5, (block, name)
            found |= {f"{block}.{name}"} if moved else set()
    return found


CASES = [
    ("opt", False, "float32", "biases", "normal", "host"),
    ("opt", True, "bfloat16", "the last layer and some", "rademacher", "disk"),
    ("llama", True, "bfloat16", "parts of each layer", "lowrank", "mixed"),
    pytest.param("llama", False, "bfloat16", "a head and its norm", "normal", "mixed", marks=SLOW),
    pytest.param("llama", True, "float32", "parts of each layer", "normal", "disk", marks=SLOW),
    pytest.param("opt", False, "float32", "the last layer and some", "lowrank", "host", marks=SLOW),
    pytest.param("qwen3", True, "float32", "biases", "lora", "host", marks=SLOW),
]


@pytest.mark.parametrize(("family", "tied", "dtype", "name", "kind", "tier"), CASES)
def test_only_the_targets_move_in_every_tier(family, tied, dtype, name, kind, tier, tmp_path):
    model = FAMILIES[family](tied).init(jax.random.key(1), dtype)
    direction = direction_of(name, kind)
    weights, losses, updates = trained(model, tmp_path / "device", direction)
    others = trained(model, tmp_path / "other", direction, PLANS[tier])
    assert losses == others[1]
    assert_same(weights, others[0])
    assert_same(arrays(zo.replay(model, tmp_path / "other").source), weights)
    leaves = {f"{b}.{leaf}": x for b, tree in model.params.items() for leaf, x in flat(tree).items()}
    moved = changed(model, weights)
    assert moved == {leaf for leaf, x in leaves.items() if direction.trains(leaf, x.ndim)} and 0 < len(moved) < len(
        leaves
    )
    if kind in ("normal", "rademacher"):  # given the same coefficients, the plain update
        expected, ids = model.params, jnp.asarray(leaf_ids(model.params))
        for update in updates:
            expected = zo.apply_update(expected, update, ids, direction=direction)
        assert_same(arrays(expected), weights)


@pytest.mark.parametrize("name", ["the last layer and some", pytest.param("parts of each layer", marks=SLOW)])
def test_losses_are_those_of_the_plain_step(name, tmp_path):
    model = FAMILIES["opt"](False).init(jax.random.key(1))
    direction = direction_of(name)
    estimator = zo.averaged(zo.two_point(1e-2, direction=direction), 2)
    plain = zo.mezo(model.loss, estimator, zo.sgd(1e-3, 0.1))
    state, step = plain.init(model.params, jax.random.key(5)), jax.jit(plain.step)
    with zo.Run(model, estimator, zo.sgd(1e-3, 0.1), directory=tmp_path, key=jax.random.key(5)) as run:
        for batch in batches(5):
            state, info = step(state, batch)
            np.testing.assert_allclose(run.step(batch).losses, info.losses, rtol=1e-6)
        assert changed(model, arrays(state.params)) == changed(model, arrays(run.model.source))


def test_the_blocks_before_are_visited_once(tmp_path, monkeypatch):
    """By all members in their parts together; nothing of a block that stays goes back over the link."""
    model = FAMILIES["opt"](False).init(jax.random.key(1))
    direction = zo.dense(targets=("layers.1.mlp.*", "head.*"))
    plan = zo.Plan(dict.fromkeys(model.source, "host"), probe_batch=2)
    estimator = zo.averaged(zo.two_point(1e-2, direction=direction), 2)
    seen = []

    class Counted:
        def __init__(self, name):
            self.name, self.lower, self.call = name, getattr(visits, name).lower, getattr(visits, name)

        def __call__(self, *given, **how):
            seen.append(self.name)
            return self.call(*given, **how)

    for name in ("plain", "train", "read"):
        monkeypatch.setattr(visits, name, Counted(name))
    given = list(batches(2))
    with zo.Run(model, estimator, zo.sgd(1e-3), directory=tmp_path, key=jax.random.key(5), plan=plan) as run:
        info = run.step(given)
        layouts = run.model.source.layouts
    assert seen == ["plain"] * 2 * 4 + ["train"] * 2 * 2 * 2  # blocks before and after, by batch and part
    streamed = [layout.nbytes for layout in layouts.values()]
    assert sum(streamed) <= info.bytes_up <= sum(streamed) + 2 * max(streamed)  # each once, and what comes next
    assert info.bytes_down == layouts["layers.1.mlp"].nbytes + layouts["head"].nbytes


def test_any_pytree_trains_its_targets():
    rng = np.random.default_rng(0)
    body, head = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 4), (4, 2)))
    params = {"body": {"w": body}, "head": {"w": head, "bias": jnp.zeros(2)}}
    loss = lambda p, x: jnp.sum((x @ p["body"]["w"] @ p["head"]["w"] + p["head"]["bias"]) ** 2)  # noqa: E731
    algorithm = zo.mezo(loss, zo.two_point(1e-2, direction=zo.dense("rademacher", targets=("head.*",))), zo.sgd(1e-3))
    state = algorithm.init(params, jax.random.key(0))
    state, info = jax.jit(algorithm.step)(state, jnp.ones((2, 3)))
    assert (state.params["body"]["w"] == body).all() and (state.params["head"]["w"] != head).all()
    whole = zo.mezo(loss, zo.two_point(1e-2, direction=zo.rademacher), zo.sgd(1e-3))
    everywhere = whole.step(whole.init(params, jax.random.key(0)), jnp.ones((2, 3)))[1]
    assert float(info.projected_gradient[0]) != float(everywhere.projected_gradient[0])
    with pytest.raises(
        ValueError, match=r"targets \['tail\.\*'\] name no leaf that dense.* trains, such as body.w, head"
    ):
        zo.mezo(loss, zo.two_point(1e-2, direction=zo.dense(targets=("head.*", "tail.*"))), zo.sgd(1e-3)).init(
            params, jax.random.key(0)
        )


@pytest.mark.parametrize(
    "direction", [zo.dense("rademacher", targets=("a", "b*")), zo.lowrank(3, None, targets=("a",)), zo.dense("normal")]
)
def test_a_journal_says_what_trains(direction):
    assert from_json(direction.as_json()) == direction
    assert eval(f"zo.{direction}") == direction


def test_targets_are_checked():
    with pytest.raises(ValueError, match=r"refresh is 8, with targets \('a',\): dense directions have targets without"):
        zo.dense("normal", 8, targets=["a"])
    for make in (zo.dense, zo.lowrank, zo.lora):
        with pytest.raises(ValueError, match=r"targets is the string 'head.\*', expected a tuple of patterns: \('head"):
            make(targets="head.*")
    with pytest.raises(ValueError, match=r"targets \['tail'\] name no leaf"):
        zo.plan(
            FAMILIES["opt"](True).init(jax.random.key(1)),
            zo.two_point(1e-3, direction=zo.dense(targets=("tail",))),
            tokens=8,
        )


def test_decay_leaves_frozen_matrices_alone(tmp_path):
    """Losses, evaluation and weights of low-rank directions, over two folds, are those of the plain step."""
    model = FAMILIES["opt"](False).init(jax.random.key(1))
    direction = zo.lowrank(2, refresh=2, targets=("layers.1.*", "*.attn.q.*"))
    estimator, optimizer = zo.two_point(1e-2, direction=direction), zo.sgd(1e-2, 3.0)
    plain = zo.mezo(model.loss, estimator, optimizer)
    state, step = plain.init(model.params, jax.random.key(5)), jax.jit(plain.step)
    with zo.Run(model, estimator, optimizer, directory=tmp_path, key=jax.random.key(5)) as run:
        for batch in batches(5):
            state, info = step(state, batch)
            np.testing.assert_allclose(run.step(batch).losses, info.losses, rtol=2e-6)
        looked = run.evaluate(batches(1))
        assert looked == pytest.approx(
            float(model.replace(state.params).loss(state.params, next(batches(1)))), rel=1e-5
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), arrays(run.model.source), state.params)


@pytest.mark.parametrize("format", [None, zo.int8()], ids=["arrays", "codes"])
def test_a_checkpoint_in_the_background_goes_on_with_the_same_bits(format, tmp_path):
    """Over folds, with blocks of several steps, of which one that stays is read last; and replayed, codes too."""
    model = FAMILIES["llama"](False).init(jax.random.key(1), "bfloat16").with_format(format)
    direction = zo.lowrank(2, refresh=4, targets=("layers.1.*", "embed.*"))
    given = list(batches(12))

    def opened(name):
        estimator, optimizer = zo.two_point(1e-3, direction=direction), zo.sgd(1e-2, 5.0)
        how = {"rounding": zo.stochastic if format else zo.residual, "key": jax.random.key(5)}
        return zo.Run(model, estimator, optimizer, directory=tmp_path / name, **how)

    with opened("whole") as run:
        for batch in given:
            run.step(batch)
        whole = arrays(run.model.source)
    with opened("parts") as run:
        for batch in given[:11]:
            run.step(batch)
            if run.steps_done == 1:
                run.save(wait=False)
            wait(run)
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir() if path.name.isdigit()]
    with opened("parts") as run:
        for batch in run.remaining(given):
            run.step(batch)
        assert_same(arrays(run.model.source), whole)
    assert_same(arrays(zo.replay(model, tmp_path / "whole").source), whole)


def test_an_error_before_the_first_target_costs_no_update(tmp_path, monkeypatch):
    model, given = FAMILIES["opt"](False).init(jax.random.key(1)), list(batches(3))
    estimator = zo.two_point(1e-2, direction=zo.dense(targets=("head.*",)))
    weights = []
    for fails in (False, True):
        how = {"directory": tmp_path / str(fails), "key": jax.random.key(5)}
        with zo.Run(model, estimator, zo.sgd(1e-2), **how) as run:
            run.step(given[0])
            if fails:
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(visits, "plain", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
                    patch.setattr("zo2jax.stream.Stream._compile", lambda *_: None)
                    run.step(given[1])
            for batch in run.remaining(given):
                run.step(batch)
            weights.append(arrays(run.model.source))
    assert_same(*weights)
    assert_same(arrays(zo.replay(model, tmp_path / "True").source), weights[0])


def test_the_value_of_a_flax_variable_is_no_part_of_a_name(tmp_path):
    """Nor where a leaf has that name itself: stream, journal and plain step agree on what trains, and on V."""
    start = {"a": {"vec": np.ones((3, 3), np.float32)}, "b": {"value": np.ones((3, 3), np.float32)}}
    call = lambda p, x: x["x"] @ p["vec"] if "vec" in p else jnp.tanh(x) @ p["value"]  # noqa: E731
    model = zo.blocks({name: (call, p) for name, p in start.items()}, loss=lambda y, _: (y**2).mean(1))
    for direction in (zo.dense(targets=("b",)), zo.lowrank(1, refresh=2)):
        how = {"directory": tmp_path / str(direction.rank), "key": jax.random.key(5)}
        batch = {"x": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)}
        with zo.Run(model, zo.two_point(1e-2, direction=direction), zo.sgd(1e-2), **how) as run:
            for _ in range(3):
                run.step(batch)
            weights = arrays(run.model.source)
            expected = jnp.mean(call(weights["b"], call(weights["a"], batch)) ** 2)
            assert run.evaluate([batch]) == pytest.approx(float(expected), rel=1e-5)
        assert (weights["a"]["vec"] == 1).all() == bool(direction.targets) and (weights["b"]["value"] != 1).any()
        assert_same(arrays(zo.replay(model, how["directory"]).source), weights)
