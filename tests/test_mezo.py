"""The step: against an independent float64 MeZO, in the user's own programs, and where losses are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zo2jax as zo
from zo2jax.directions import draw, step_keys
from zo2jax.leaves import leaf_ids

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(23)
N_IN, HIDDEN, ROWS = 12, 16, 64


def problem(dtype=jnp.float32):
    params = {
        "in": jnp.asarray(RNG.normal(size=(HIDDEN, N_IN)) * 0.5, dtype),
        "bias": jnp.asarray(RNG.normal(size=HIDDEN) * 0.1, jnp.float32),
        "out": jnp.asarray(RNG.normal(size=(3, HIDDEN)) * 0.5, dtype),
    }
    x = RNG.normal(size=(ROWS, N_IN)).astype(np.float32)
    y = RNG.normal(size=(ROWS, 3)).astype(np.float32)
    return params, (x, y)


def loss_fn(params, batch):
    x, y = batch
    with jax.default_matmul_precision("highest"):  # float32 on a GPU too
        h = jnp.tanh(x @ params["in"].astype(jnp.float32).T + params["bias"])
        return jnp.mean((h @ params["out"].astype(jnp.float32).T - y) ** 2)


def loss64(params, batch):
    x, y = (np.asarray(a, np.float64) for a in batch)
    h = np.tanh(x @ params["in"].T + params["bias"])
    return np.mean((h @ params["out"].T - y) ** 2)


def float64_mezo(params, batches, key, *, eps, schedule, weight_decay, copies, direction):
    """MeZO as in the paper's algorithm 1, on its own: NumPy, float64, only z is shared."""
    theta = {name: np.asarray(w, np.float64) for name, w in params.items()}
    ids = dict(zip(sorted(params), leaf_ids(params), strict=True))
    for t, batch in enumerate(batches):
        total = dict.fromkeys(theta, 0.0)
        for direction_key in step_keys(key, jnp.uint32(t), copies, direction):
            z = {n: np.asarray(draw(direction, direction_key, ids[n], w.shape), np.float64) for n, w in theta.items()}
            plus = loss64({n: w + eps * z[n] for n, w in theta.items()}, batch)
            minus = loss64({n: w - eps * z[n] for n, w in theta.items()}, batch)
            for name in theta:
                total[name] = total[name] + (plus - minus) / (2 * eps) * z[name] / copies
        rate = schedule(t)
        for name, w in theta.items():
            kept = 1 - rate * weight_decay if w.ndim >= 2 else 1.0
            theta[name] = kept * w - rate * total[name]
    return theta


@pytest.mark.parametrize("direction", [zo.normal, zo.rademacher, zo.lowrank(2, refresh=7)])
@pytest.mark.parametrize("copies", [1, 3])
def test_against_float64(direction, copies):
    params, batch = problem()
    key, eps, weight_decay = jax.random.key(77), 2.0**-6, 0.3
    batches = [tuple(np.roll(a, t, axis=0) for a in batch) for t in range(20)]
    estimator = zo.averaged(zo.two_point(eps, direction=direction), copies)
    algorithm = zo.mezo(loss_fn, estimator, zo.sgd(optax.linear_schedule(0.05, 0.01, 20), weight_decay))
    state, step = algorithm.init(params, key), jax.jit(algorithm.step)
    for b in batches:
        state, _ = step(state, b)
    expected = float64_mezo(
        params,
        batches,
        key,
        eps=eps,
        schedule=lambda t: 0.05 - 0.002 * t,
        weight_decay=weight_decay,
        copies=copies,
        direction=direction,
    )
    for name, w in expected.items():
        start, ours = np.asarray(params[name], np.float64), np.asarray(state.params[name], np.float64)
        distance = np.linalg.norm(w - start)
        assert distance > 0.05
        assert np.linalg.norm(ours - w) <= 1e-3 * distance
        assert np.mean(ours != start) >= 0.5


def same_coefficients(dtype):
    """A loss whose bits do not depend on the program: it is a multiple of 1/8 read from the batch."""

    def loss(params, batch):
        anchor = sum(jnp.sum(w.astype(jnp.float32)) for w in jax.tree.leaves(params))
        return batch + jnp.where(jnp.isfinite(anchor), jnp.float32(0), jnp.float32(1))

    params, _ = problem(dtype)
    algorithm = zo.mezo(loss, zo.two_point(1e-3), zo.sgd(1e-3, 0.1))
    return algorithm, algorithm.init(params, jax.random.key(5))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    ("direction", "dtype"),
    [
        (zo.normal, jnp.float32),
        (zo.rademacher, jnp.bfloat16),
        (zo.lowrank(3, refresh=2), jnp.bfloat16),
        pytest.param(zo.normal, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(zo.rademacher, jnp.float32, marks=pytest.mark.slow),
        pytest.param(zo.lowrank(3, refresh=2), jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_user_jit_scan_eager_and_donation_agree_in_every_bit(dtype, direction):
    params, batch = problem(dtype)
    algorithm = zo.mezo(loss_fn, zo.averaged(zo.two_point(1e-3, direction=direction), 2), zo.sgd(1e-2, 0.1))
    start = algorithm.init(params, jax.random.key(5))
    updates = []
    state, step = start, jax.jit(algorithm.step)
    for _ in range(4):
        state, info = step(state, batch)
        updates.append(info.update)

    # Given these coefficients, every other form gives the same weights.
    def replay(apply):
        p = jax.tree.map(jnp.copy, params)
        for update in updates:
            p = apply(p, update)
        return p

    def apply(p, update):
        return zo.apply_update(p, update, start.leaf_ids, direction=direction)

    scanned, infos = jax.jit(lambda s: jax.lax.scan(lambda s, _: algorithm.step(s, batch), s, None, length=4))(start)
    forms = {"eager": replay(apply), "donated": replay(jax.jit(apply, donate_argnums=0))}
    for form, moved in forms.items():
        for name in params:
            np.testing.assert_array_equal(moved[name], state.params[name], err_msg=f"{form}: {name}")
    # In a scan another program computes the losses, whose last bits may differ; its own coefficients give its weights.
    np.testing.assert_allclose(infos.update.coefs, np.stack([u.coefs for u in updates]), rtol=2e-2)
    updates = [jax.tree.map(lambda a, t=t: a[t], infos.update) for t in range(4)]
    jax.tree.map(np.testing.assert_array_equal, scanned.params, replay(apply))


def test_step_is_a_pure_function_of_its_state():
    params, batch = problem()
    algorithm = zo.mezo(loss_fn, zo.two_point(1e-3), zo.sgd(1e-2))
    state = algorithm.init(params, jax.random.key(1))
    a, _ = jax.jit(algorithm.step)(state, batch)
    b, _ = jax.jit(algorithm.step)(state, batch)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert int(a.step) == 1 and int(state.step) == 0


def test_steps_use_new_directions():
    algorithm, state = same_coefficients(jnp.float32)
    keys = []
    for _ in range(3):
        state, info = algorithm.step(state, jnp.float32(1))
        keys.append(jax.random.key_data(info.update.keys[0]).tolist())
    assert len({tuple(k) for k in keys}) == 3


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_loss_that_is_not_finite_is_skipped(bad, dtype):
    algorithm, state = same_coefficients(dtype)
    step = jax.jit(algorithm.step)
    after, info = step(state, jnp.float32(bad))
    assert bool(info.skipped) and int(after.step) == 1
    for name in state.params:
        np.testing.assert_array_equal(after.params[name], state.params[name])
    assert np.asarray(info.update.coefs).tolist() == [0.0] and float(info.update.decay) == 0
    _, info = step(after, jnp.float32(2))
    assert not bool(info.skipped)


@pytest.mark.parametrize(
    ("losses", "rate"),
    [((2.998e38, 3.002e38), 1.0), ((1.0, 2.0), jnp.nan), ((1.0, 2.0), jnp.inf)],
    ids=["g overflows", "rate is NaN", "rate is infinite"],
)
def test_coefficients_that_are_not_finite_are_skipped(losses, rate):
    params, _ = problem()
    estimator = zo.Estimator(
        "test",
        np.array([[1e-3], [-1e-3]]),
        lambda _: jnp.asarray([(np.float32(losses[0]) - np.float32(losses[1])) * np.float32(1e5)]),
    )
    algorithm = zo.mezo(lambda p, b: b, estimator, zo.sgd(lambda step: rate, 0.5))
    state = algorithm.init(params, jax.random.key(0))
    with np.errstate(over="ignore"):
        after, info = algorithm.step(state, jnp.float32(1))
    assert bool(info.skipped)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_a_schedule_counts_skipped_steps():
    """The learning rate belongs to the step's number, whatever happened in the steps before."""
    params, _ = problem()
    algorithm = zo.mezo(lambda p, b: b, zo.two_point(1e-3), zo.sgd(optax.linear_schedule(1.0, 0.0, 4), 0.5))
    state, decays = algorithm.init(params, jax.random.key(0)), []
    for loss in (1.0, jnp.nan, 1.0):
        state, info = algorithm.step(state, jnp.float32(loss))
        decays.append(float(info.update.decay))
    np.testing.assert_allclose(decays, [0.5, 0.0, 0.25], rtol=1e-3)


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (lambda p, b: jnp.bfloat16(1), r"bfloat16\[\]"),
        (lambda p, b: jnp.zeros(3), r"float32\[3\]"),
        (lambda p, b: 1.0, "1.0"),
        (lambda p, b: (jnp.float32(1), jnp.float32(1)), "expected a float32 scalar"),
    ],
)
def test_losses_of_other_types_are_refused(loss, what):
    algorithm = zo.mezo(loss, zo.two_point(1e-3), zo.sgd(0.1))
    with pytest.raises(TypeError, match=what):
        algorithm.step(algorithm.init({"w": jnp.zeros(2)}, jax.random.key(0)), None)


def test_info_reports_the_step():
    params, batch = problem()
    algorithm = zo.mezo(loss_fn, zo.two_point(1e-3), zo.sgd(0.5))
    state = algorithm.init(params, jax.random.key(0))
    _, info = algorithm.step(state, batch)
    assert info.losses.shape == (2,) and info.losses.dtype == info.projected_gradient.dtype == jnp.float32
    assert float(info.loss) == pytest.approx(float(jnp.mean(info.losses)))
    np.testing.assert_allclose(info.update.coefs, -0.5 * info.projected_gradient, rtol=2.0**-11)
    gradient = jax.grad(loss_fn)(params, batch)
    z = {
        name: draw(zo.normal, info.update.keys[0], ident, params[name].shape)
        for name, ident in zip(sorted(params), leaf_ids(params), strict=True)
    }
    slope = sum(float(jnp.vdot(gradient[name], z[name])) for name in params)
    assert float(info.projected_gradient[0]) == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_integer_leaves_pass_through():
    params = {"w": jnp.ones((2, 2)), "steps": jnp.arange(3)}
    algorithm = zo.mezo(lambda p, b: jnp.sum(p["w"] ** 2), zo.two_point(1e-3), zo.sgd(0.1))
    state, _ = algorithm.step(algorithm.init(params, jax.random.key(0)), None)
    assert state.params["steps"].tolist() == [0, 1, 2] and not np.array_equal(state.params["w"], params["w"])


def to_host(tree):
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), tree))


def spaces(tree):
    return [jax.typeof(x).memory_space for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def kinds_last():
    """Whether results have the memory kind of their type; on CPUs, jax 0.10 says "device", and aborts on donation."""
    same = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Host))(jnp.ones(2))
    return same.sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_parameters_in_host_memory(dtype, kinds_last):
    """The same bits after five steps, and the new parameters are where the old ones were; those that were not, too."""
    params, batch = problem(dtype)
    params |= {"again": params["in"] + 1, "count": jnp.arange(3), "key": jnp.ones((2, 2))}

    def loss(p, batch):
        assert set(spaces(p)) == {jax.memory.Space.Device}
        p = {**p, "in": p["in"] + p["again"]}
        return loss_fn(p, batch) + jnp.sum(p["key"]) + jnp.sum(p["count"]).astype(jnp.float32)

    algorithm = zo.mezo(loss, zo.averaged(zo.two_point(2.0**-6), 2), zo.sgd(1e-2, 0.1))
    start = algorithm.init(params, jax.random.key(5))
    hosted = to_host({name: jnp.array(w) for name, w in params.items() if name != "again"})
    state = algorithm.init({**params, **hosted}, jax.random.key(5))
    where = spaces(state.params)
    assert where.count(jax.memory.Space.Host) == 5 and len(where) == 6
    step = jax.jit(algorithm.step, donate_argnums=0 if kinds_last else ())
    expected, first = start, state.params
    for _ in range(5):
        expected, _ = jax.jit(algorithm.step)(expected, batch)
        state, _ = step(state, batch)
        assert spaces(state.params) == where
        if kinds_last:
            kinds = [w.sharding.memory_kind for w in jax.tree.leaves(state.params)]
            assert kinds.count("pinned_host") == 5 and kinds.count("device") == 1
            assert first["in"].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
    assert np.mean(np.asarray(state.params["in"]) != np.asarray(params["in"])) > 0.5


def test_parameters_in_host_memory_within_a_scan():
    params, batch = problem()
    algorithm = zo.mezo(loss_fn, zo.two_point(2.0**-6), zo.sgd(1e-2))
    many = jax.jit(lambda s: jax.lax.scan(lambda s, _: algorithm.step(s, batch), s, None, length=3)[0])
    state = many(algorithm.init(to_host(params), jax.random.key(5)))
    assert set(spaces(state.params)) == {jax.memory.Space.Host}
    expected = many(algorithm.init(params, jax.random.key(5)))
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)


def test_on_a_gpu_leaves_move_one_by_one():
    """What a GPU is told: each leaf goes up for the probes, in their loop, and for the update; and down once."""
    params, batch = problem()
    algorithm = zo.mezo(loss_fn, zo.two_point(1e-3), zo.sgd(1e-2))
    state = algorithm.init(to_host(params | {"count": jnp.arange(3)}), jax.random.key(5))
    text = jax.jit(algorithm.step).trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()
    moves = [text.count(f'_xla_buffer_placement = "{kind}"') for kind in ("device", "pinned_host")]
    assert moves == [2 * 3, 3]  # and integers that the loss does not look at stay
    assert text.count('mhlo.memory_kind = "pinned_host"') == 2 * 4  # of the old state and the new


def test_construction_refuses_other_generators():
    algorithm = zo.mezo(loss_fn, zo.two_point(1e-3), zo.sgd(0.1))
    with pytest.raises(ValueError, match="generator 'rbg'"):
        algorithm.init(problem()[0], jax.random.key(0, impl="rbg"))
