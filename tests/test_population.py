"""Estimators of several probes: what they estimate, in which parts, and one step of several batches."""

import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from killing import MODEL

import zo2jax as zo
from zo2jax.leaves import leaf_ids
from zo2jax.metrics import read_metrics
from zo2jax.replay import read_journal

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOW = pytest.mark.slow

ESTIMATORS = {
    "averaged": lambda direction, eps=1e-3: zo.averaged(zo.two_point(eps, direction=direction), 3),
    "one_sided": lambda direction, eps=1e-3: zo.one_sided(8, eps, direction=direction),
    "leave_one_out": lambda direction, eps=1e-3: zo.leave_one_out(4, eps, direction=direction),
}
DIRECTIONS = {"normal": zo.normal, "rademacher": zo.rademacher, "lowrank": zo.lowrank(2, refresh=1)}


# --- what they estimate, on a quadratic whose gradient is known ---

ROWS, COLUMNS, SAMPLES = 6, 5, 20_000


def sampled(estimator, gradient, hessian):
    """Estimates of the gradient of <G, W> + W H W / 2 at 0, float64 [samples, rows, columns]: what steps move."""
    algorithm = zo.mezo(
        lambda w, _: jnp.vdot(gradient, w) + jnp.vdot(w.ravel(), hessian @ w.ravel()) / 2, estimator, zo.sgd(1.0)
    )
    state = algorithm.init(jnp.zeros((ROWS, COLUMNS)), jax.random.key(7))
    moved = lambda i: -algorithm.step(state._replace(step=i), None)[0].params  # noqa: E731
    one = jax.jit(lambda steps: lax.map(moved, steps, batch_size=1000))
    return np.asarray(one(jnp.arange(SAMPLES, dtype=jnp.uint32)), np.float64)


def moments(direction):
    """(E |z <z, G>|^2, E |E[z <z, G> | V]|^2) / |G|^2: the second one is 1 where nothing is shared by directions."""
    m, n, r = ROWS, COLUMNS, direction.rank
    if r:  # Z = U V^T: by Wick's theorem, with E[(V V^T)^2] = r (n + r + 1) I
        return m * n + 2 * m / r + 2 * (n + r + 1) / r, (n + r + 1) / r
    return m * n + (2 if direction == zo.normal else 0), 1.0


def one_sided_moments(n, d):
    """(E <g, G> / |G|, E |g|^2) of FZOO's estimate with dense normal z and a linear loss.

    The losses are normal, so that their mean and the sample deviation s are independent.
    """
    gamma = math.gamma((n - 2) / 2) / math.gamma((n - 1) / 2)
    s = math.sqrt(2 / (n - 1)) * math.gamma(n / 2) / math.gamma((n - 1) / 2)
    inverse, inverse2 = math.sqrt((n - 1) / 2) * gamma, (n - 1) / (n - 3)
    across = (d - 1) * (n - 1 + inverse2)
    return (n - 1) / n * s + inverse / n, (across + (n - 1) ** 2 + 2 * (n - 1) + 3 * inverse2) / n**2


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_bias_and_variance_on_a_quadratic(name, direction):
    rng = np.random.default_rng(4)
    gradient = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    root = rng.normal(size=(ROWS * COLUMNS,) * 2).astype(np.float32) / 8
    z, d = DIRECTIONS[direction], ROWS * COLUMNS
    estimator = ESTIMATORS[name](z, 2.0**-8)
    found, g = sampled(estimator, gradient, root @ root.T), gradient.astype(np.float64)
    mean, error = found.mean(axis=0), found.std(axis=0).max() / math.sqrt(SAMPLES)
    second, square = (found**2).sum(axis=(1, 2)), (g**2).sum()
    if name == "one_sided":
        along = (mean * g).sum() / math.sqrt(square)
        if direction == "normal":
            expected, expected_second = one_sided_moments(8, d)
            assert second.mean() == pytest.approx(expected_second, rel=0.02)
            assert along == pytest.approx(expected, rel=0.02)
        across = mean - along * g / math.sqrt(square)
        # Factors that all directions share bend it to where V is; the others' points along the gradient.
        assert np.abs(across).max() < (0.1 if direction == "lowrank" else 6 * error)
        return
    np.testing.assert_allclose(mean, g, atol=6 * error, rtol=5e-4)
    (kappa, shared), n = moments(z), estimator.directions
    if name == "averaged":
        expected = kappa / n + (1 - 1 / n) * shared
    elif direction == "rademacher":
        expected = (d - 1 + (d + 1) / (n - 1)) / n + 1
    else:
        expected = (kappa + (n - 2) * shared) / (n - 1)
    assert second.mean() / square == pytest.approx(expected, rel=0.03)


def test_one_sided_skips_a_step_whose_losses_are_equal():
    algorithm = zo.mezo(lambda w, _: jnp.float32(3) + 0 * w.sum(), zo.one_sided(3, 1e-3), zo.sgd(1.0))
    state, info = algorithm.step(algorithm.init(jnp.ones(4), jax.random.key(0)), None)
    assert bool(info.skipped) and (state.params == 1).all()


SCHEDULED = {
    "two_point": lambda eps: zo.averaged(zo.two_point(eps), 2),
    "one_sided": lambda eps: zo.one_sided(3, eps),
    "leave_one_out": lambda eps: zo.leave_one_out(3, eps),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_of_eps_is_another_estimator_at_each_step(name):
    make, eps = SCHEDULED[name], optax.exponential_decay(0.25, 1, 0.7)
    scheduled, w = make(eps), jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    loss = lambda w, x: jnp.sum((w - x) ** 2)  # noqa: E731
    algorithm = zo.mezo(loss, scheduled, zo.sgd(0.01))
    step = jax.jit(algorithm.step)
    state = algorithm.init(w, jax.random.key(2))
    assert str(scheduled) == str(make(0.5)).replace("0.5", "schedule")
    for t in range(4):
        plain = zo.mezo(loss, make(float(eps(t))), zo.sgd(0.01))
        expected, wanted = plain.step(state, jnp.ones(3))
        state, info = step(state, jnp.ones(3))
        np.testing.assert_allclose(info.losses, wanted.losses, rtol=1e-5)
        np.testing.assert_allclose(info.projected_gradient, wanted.projected_gradient, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.params, expected.params, rtol=1e-3)


# --- in a stream ---


STAGES = ("first", "second")


def small(dtype=jnp.float32):
    """Two stages, which soon compile, with a ragged matrix that they share, another array, and a vector."""
    rng = np.random.default_rng(8)
    shapes = {"w": (5, 7), "bias": (7,)}, {"cube": (7, 3, 7), "w": (5, 7)}
    leaves = [
        {k: (0.3 * rng.normal(size=n)).astype(dtype if len(n) > 1 else np.float32) for k, n in named.items()}
        for named in shapes
    ]

    def first(p, batch):
        return jnp.tanh(batch["x"] @ p["w"].astype(jnp.float32) + p["bias"])

    def second(p, x):
        return (x + jnp.einsum("bi,ijk->bk", x, p["cube"].astype(jnp.float32))) @ p["w"].astype(jnp.float32).T

    def loss(y, batch):
        return jnp.sum(batch["weights"] * ((y - batch["x"]) ** 2).mean(1)), jnp.sum(batch["weights"])

    stages = dict(zip(STAGES, zip((first, second), leaves, strict=True), strict=True))
    return zo.blocks(stages, loss=loss, tied={"second.w": "first.w"})


def batches(count, rows=6):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(count, rows, 5)).astype(np.float32)
    weights = (rng.random((count, rows)) < rng.uniform(0.4, 1, (count, 1))).astype(np.float32)
    return [dict(zip(("x", "weights"), batch, strict=True)) for batch in zip(x, weights, strict=True)]


def texts(count):
    rng = np.random.default_rng(3)
    found = []
    for _ in range(count):
        ids = rng.integers(0, 67, (2, 12)).astype(np.int32)
        weights = (rng.random(ids.shape) < rng.uniform(0.2, 1)).astype(np.float32)
        found.append({"ids": ids, "targets": np.roll(ids, -1, 1), "weights": weights})
    return found


def trained(directory, estimator, data, plan=None, model=None):
    """(model, weights, infos) of a run."""
    model = model or small(jnp.bfloat16)
    with zo.Run(model, estimator, zo.sgd(1e-2, 0.1), directory=directory, key=jax.random.key(5), plan=plan) as run:
        infos = [run.step(batch) for batch in run.remaining(data)]
        return model, arrays(run.model.source), infos


def arrays(weights):
    return {name: jax.tree.map(np.asarray, leaves) for name, leaves in weights.items()}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(x.tobytes() == y.tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


BATTERY = [("averaged", zo.lowrank(2, refresh=3)), ("one_sided", zo.normal), ("leave_one_out", zo.rademacher)]
OTHERS = [
    pair for pair in itertools.product(ESTIMATORS, (zo.normal, zo.rademacher, BATTERY[0][1])) if pair not in BATTERY
]
BATTERY += [pytest.param(*pair, marks=SLOW) for pair in OTHERS]


@pytest.mark.parametrize(("name", "direction"), BATTERY, ids=str)
def test_tiers_and_replay_give_the_same_bits(name, direction, tmp_path):
    estimator, data = ESTIMATORS[name](direction), batches(5)
    model, weights, infos = trained(tmp_path / "device", estimator, data)
    plan = zo.Plan(dict.fromkeys(STAGES, "host"))
    _, others, other_infos = trained(tmp_path / "host", estimator, data, plan)
    assert_same(weights, others)
    assert [info.losses.tolist() for info in infos] == [info.losses.tolist() for info in other_infos]
    assert not any(bool(info.skipped) for info in infos)
    assert_same(arrays(zo.replay(model, tmp_path / "host").source), weights)
    moved = zip(*map(jax.tree.leaves, (weights, arrays(model.source))), strict=True)
    assert all((x != y).mean() > 0.5 for x, y in moved if x.ndim > 1)


def test_chunks_are_the_population():
    rng = np.random.default_rng(6)
    probes = rng.normal(size=(7, 5)) * (rng.random((7, 5)) < 0.3)
    estimator = zo.Estimator("test", probes, lambda losses: losses)
    for size in (1, 2, 3, 7, 9, None):
        chunks = estimator.chunks(size)
        back = np.zeros((7, 5), np.float32)
        at = 0
        for k, rows in chunks:
            back[at : at + len(rows), k] = rows
            at += len(rows)
            assert len(set(k.tolist())) == len(k) and len(rows) <= (size or 7)
        np.testing.assert_array_equal(back, estimator.probes)
        assert len({rows.shape[1] for _, rows in chunks}) == 1
    with pytest.raises(ValueError, match="probe_batch is 0"):
        estimator.chunks(0)
    with pytest.raises(ValueError, match="probe_batch is 0"):
        zo.Plan(probe_batch=0)


CHUNKED = [zo.normal, zo.lowrank(2, refresh=2)]
CHUNKED += [pytest.param(other, marks=SLOW) for other in (zo.dense("normal", refresh=2), zo.lora(2))]


@pytest.mark.parametrize("direction", CHUNKED, ids=str)
def test_a_population_in_parts(direction, tmp_path):
    """The same losses, up to rounding, and given the same coefficients the same weights."""
    estimator, data, model = zo.one_sided(3, 1e-2, direction=direction), batches(3), small()
    _, _, expected = trained(tmp_path / "all", estimator, data, model=model)
    plan = zo.Plan(dict.fromkeys(STAGES, "host"), probe_batch=3)  # and one member alone
    _, weights, infos = trained(tmp_path / "parts", estimator, data, plan, model)
    np.testing.assert_allclose(infos[0].losses, expected[0].losses, rtol=1e-6)
    np.testing.assert_allclose([x.losses for x in infos], [x.losses for x in expected], rtol=1e-4)
    assert_same(arrays(zo.replay(model, tmp_path / "parts").source), weights)


def test_lines_that_the_metrics_lack_are_those_of_their_steps(tmp_path):
    """Projected gradients too, with an eps that is another at each step."""
    estimator = zo.two_point(optax.linear_schedule(1e-3, 1e-1, 4))
    trained(tmp_path, estimator, batches(4))
    names, lines = ("step", "train/loss", "train/projected_gradient"), read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    trained(tmp_path, estimator, batches(4))
    again = read_metrics(tmp_path)
    assert [[line[name] for name in names] for line in again] == [[line[name] for name in names] for line in lines]


def test_a_run_keeps_to_its_parts_and_its_schedule(tmp_path):
    eps = optax.linear_schedule(1e-3, 1e-1, 6)
    estimator, data, plan = zo.leave_one_out(5, eps), batches(6), zo.Plan(probe_batch=2)
    _, whole, infos = trained(tmp_path / "whole", estimator, data, plan)
    spread = [float(np.std(info.losses)) for info in infos]
    assert spread[5] > 10 * spread[0]
    trained(tmp_path / "half", estimator, data[:3], plan)
    _, weights, _ = trained(tmp_path / "half", estimator, data)
    assert_same(weights, whole)
    assert_same(arrays(zo.replay(small(jnp.bfloat16), tmp_path / "half").source), whole)
    tight = replace(zo.plan(small(), batch=data[0]), probe_batch=1)
    with pytest.warns(UserWarning, match=r"the run evaluates 2 members at once, .* give zo.plan\(probe_batch=2\)"):
        trained(tmp_path / "half", estimator, data, tight)
    trained(tmp_path / "other", estimator, data[:1])
    found = [read_journal(tmp_path / name) for name in ("half", "other")]
    assert found[0].differs(found[1]).startswith("probe_batch: 2 and None")
    assert "2 members at once" in str(found[0]) and "at once" not in str(found[1])


@pytest.mark.parametrize("direction", [zo.normal, pytest.param(zo.lowrank(2, refresh=2), marks=SLOW)])
def test_half_the_memory_takes_smaller_parts(direction, tmp_path):
    model = small()
    estimator, data = zo.averaged(zo.two_point(1e-2, direction=direction), 8), batches(2, rows=32)
    made = zo.plan(model, estimator, batch=data[0])
    half = zo.plan(model, estimator, batch=data[0], device_memory=made.budget.peak // 2)
    assert made.probe_batch is None and 1 <= half.probe_batch <= 8 and half.budget.peak <= made.budget.peak // 2
    assert half.budget.parts > made.budget.parts == 1 and half.budget.operations == made.budget.operations
    _, _, infos = trained(tmp_path / "half", estimator, data, half, model)
    _, _, expected = trained(tmp_path / "all", estimator, data, made, model)
    np.testing.assert_allclose(infos[0].losses, expected[0].losses, rtol=1e-6)
    more = zo.plan(model, estimator, batch=data[0], batches=4).budget
    assert made.budget.activations < more.activations < 4 * made.budget.activations
    assert more.operations == 4 * made.budget.operations


@pytest.mark.parametrize("case", ["normal", "lowrank", pytest.param("llama", marks=SLOW)])
def test_batches_of_one_step_are_one_batch(case, tmp_path):
    """Four batches with unequal numbers of targets, against all their rows at once."""
    direction = zo.lowrank(2, refresh=2) if case == "lowrank" else zo.normal
    model, data = (MODEL.init(jax.random.key(1)), texts(8)) if case == "llama" else (small(), batches(8))
    estimator = zo.averaged(zo.two_point(0.5, direction=direction), 2)
    steps = [data[:4], data[4:]]
    joined = [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in steps]
    _, _, expected = trained(tmp_path / "joined", estimator, joined[:1], model=model)
    plan = zo.Plan(dict.fromkeys(model.source, "host"), probe_batch=3)
    _, weights, infos = trained(tmp_path / "apart", estimator, steps, plan, model)
    np.testing.assert_allclose(infos[0].losses, expected[0].losses, rtol=1e-6)
    np.testing.assert_allclose(infos[0].update.coefs, expected[0].update.coefs, atol=1e-6)
    assert infos[0].tokens == expected[0].tokens
    assert_same(arrays(zo.replay(model, tmp_path / "apart").source), weights)
    if direction == zo.normal:  # the plain update, given the same coefficients
        moved = {name: leaves for name, leaves in arrays(model.source).items() if leaves}
        ids = jnp.asarray(leaf_ids(moved))
        for info in infos:
            moved = zo.apply_update(moved, info.update, ids)
        assert_same(arrays(moved), {name: leaves for name, leaves in weights.items() if leaves})


def test_a_step_of_no_batches(tmp_path):
    with zo.Run(small(), zo.two_point(1e-3), zo.sgd(1e-3), directory=tmp_path, key=jax.random.key(0)) as run:
        with pytest.raises(ValueError, match="a step of no batches"):
            run.step([])
        assert run.steps_done == 0
        run.step(batches(1)[0])


def test_a_batch_among_others_that_the_model_cannot_take(tmp_path):
    """Nothing of the step is done, and the one before is not done twice."""
    good, estimator = batches(2), zo.leave_one_out(3, 1e-3)
    bad = {"x": np.ones((2, 4), np.float32), "weights": np.ones(2, np.float32)}
    model, weights, _ = trained(tmp_path / "good", estimator, [good, good])
    how = {"directory": tmp_path / "bad", "key": jax.random.key(5), "plan": zo.Plan(probe_batch=3)}
    with zo.Run(model, estimator, zo.sgd(1e-2, 0.1), **how) as run:
        run.step(good)
        with pytest.raises(TypeError, match="same shape"):
            run.step([good[0], bad])
        assert run.steps_done == 1
        run.step(good)
        assert_same(arrays(run.model.source), weights)
