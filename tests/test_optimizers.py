"""Which transformations of the projected gradients are accepted, and what they give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zo2jax as zo
from zo2jax.optimizers import as_optimizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

G = jnp.array([3.0, -0.5], jnp.float32)

ACCEPTED = {
    "scale": (optax.scale(-0.1), [-0.3, 0.05]),
    "sgd": (optax.sgd(0.1), [-0.3, 0.05]),
    "clip": (optax.chain(optax.clip(1.0), optax.scale(-0.1)), [-0.1, 0.05]),
    "sign": (optax.chain(optax.scale_by_sign(), optax.scale(-0.1)), [-0.1, 0.1]),
    "schedule": (optax.sgd(optax.linear_schedule(0.1, 0.0, 10)), [-0.3, 0.05]),
    "clip by norm": (optax.chain(optax.clip_by_global_norm(1.0), optax.scale(-1.0)), -np.array([3, -0.5]) / 9.25**0.5),
    "declared": (zo.faithful(optax.inject_hyperparams(optax.sgd)(0.1)), [-0.3, 0.05]),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_faithful_transformations(name):
    transformation, expected = ACCEPTED[name]
    optimizer = as_optimizer(transformation)
    coefs, decay, _ = optimizer.update(G, optimizer.init(2))
    np.testing.assert_allclose(coefs, expected, rtol=1e-6)
    assert coefs.dtype == decay.dtype == jnp.float32 and float(decay) == 0


@pytest.mark.parametrize(
    ("transformation", "why"),
    [
        (optax.sgd(0.1, momentum=0.9), "floats in its state .*trace.* directions z_k change"),
        (optax.adam(1e-3), "floats in its state"),
        (optax.lion(1e-3), "floats in its state"),
        (optax.rmsprop(1e-3), "floats in its state"),
        (optax.ema(0.9), "floats in its state"),
        (optax.inject_hyperparams(optax.sgd)(0.1), "floats in its state"),
        (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), "needs the parameters .*weight_decay="),
    ],
)
def test_unfaithful_transformations_are_refused(transformation, why):
    with pytest.raises(ValueError, match=why):
        zo.mezo(lambda p, b: p, zo.two_point(1e-3), transformation)


def test_no_transformation_at_all():
    with pytest.raises(TypeError, match=r"expected zo\.sgd"):
        as_optimizer(1e-3)


def test_sgd_uses_the_learning_rate_of_its_own_step():
    optimizer = zo.sgd(optax.piecewise_constant_schedule(1.0, {2: 0.1}), weight_decay=0.5, transform=optax.clip(2.0))
    state = optimizer.init(2)
    for rate in (1.0, 1.0, 0.1, 0.1):
        coefs, decay, state = optimizer.update(G, state)
        np.testing.assert_allclose(coefs, [-2.0 * rate, 0.5 * rate], rtol=1e-6)
        assert float(decay) == pytest.approx(0.5 * rate)


def test_sgd_refuses_momentum_inside():
    with pytest.raises(ValueError, match="floats in its state"):
        zo.sgd(0.1, transform=optax.trace(0.9))


@pytest.mark.parametrize("arguments", [(-1.0,), (float("nan"),), (float("inf"),), (0.1, -0.1)])
def test_bad_rates(arguments):
    with pytest.raises(ValueError, match=r"learning_rate is|weight_decay is"):
        zo.sgd(*arguments)


def test_meazo_divides_by_the_running_root_mean_square():
    """Against the recursion in NumPy float64; steps whose g is 0 count for nothing but the schedule."""
    gs = np.random.default_rng(2).normal(size=(30, 2)) * 40
    gs[7] = 0
    optimizer = zo.meazo(optax.linear_schedule(1.0, 0.1, 30), 0.5, beta=0.9, epsilon=1e-3)
    state, second, count = optimizer.init(2), 0.0, 0
    for t, g in enumerate(gs.astype(np.float32).astype(np.float64)):
        coefs, decay, state = optimizer.update(jnp.asarray(g, jnp.float32), state)
        rate = 1 - 0.03 * t
        if t != 7:
            second, count = 0.9 * second + 0.1 * (g**2).sum(), count + 1
        root = np.sqrt(second / (1 - 0.9**count)) + 1e-3
        np.testing.assert_allclose(coefs, -rate * g / root, rtol=2e-5)
        np.testing.assert_allclose(decay, 0.5 * rate, rtol=1e-6)


def test_meazo_takes_projected_gradients_that_add_up_to_nothing():
    """As those of `leave_one_out` do: the step is as long as any other."""
    optimizer = zo.meazo(0.1)
    coefs, _, _ = optimizer.update(jnp.array([3.0, -4.0, 1.0]), optimizer.init(3))
    assert float(jnp.sqrt((coefs**2).sum())) == pytest.approx(0.1, rel=1e-5)


def test_meazo_does_not_depend_on_the_scale_of_the_loss():
    def trained(scale):
        algorithm = zo.mezo(lambda w, x: scale * jnp.sum((w - x) ** 2), zo.two_point(1e-2), zo.meazo(0.03, beta=0.9))
        step = jax.jit(algorithm.step)
        state = algorithm.init(jnp.zeros(8), jax.random.key(0))
        for _ in range(200):
            state, info = step(state, jnp.ones(8))
        return float(info.loss) / scale

    assert trained(1.0) < 0.2 and trained(1e4) == pytest.approx(trained(1.0), rel=0.05)


@pytest.mark.parametrize(("options", "message"), [({"beta": 1.0}, "beta is 1.0"), ({"epsilon": 0}, "epsilon is 0")])
def test_meazo_checks_its_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        zo.meazo(1e-3, **options)


def test_a_clip_by_running_scale():
    """Against the recursion in NumPy float64; steps whose g is 0 count for nothing."""
    gs = np.random.default_rng(3).standard_t(2, size=(200, 2)) * 40  # heavy tails
    gs[7] = 0
    optimizer = zo.sgd(1.0, transform=zo.clip_by_running_scale(1.5, beta=0.9))
    state, second, count, clipped = optimizer.init(2), 0.0, 0, 0
    for g in gs.astype(np.float32).astype(np.float64):
        coefs, _, state = optimizer.update(jnp.asarray(g, jnp.float32), state)
        bound = 1.5 * np.sqrt(second / (1 - 0.9**count)) if count else np.inf
        norm = np.sqrt((g**2).sum())
        np.testing.assert_allclose(coefs, -g * min(1.0, bound / max(norm, 1e-30)), rtol=1e-4)
        clipped += norm > bound
        if norm:
            second, count = 0.9 * second + 0.1 * min(norm, bound) ** 2, count + 1
    assert 10 < clipped < 100


@pytest.mark.parametrize(("options", "message"), [({"factor": 1.0}, "factor is 1.0"), ({"beta": 1.0}, "beta is 1.0")])
def test_a_clip_by_running_scale_checks_its_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        zo.clip_by_running_scale(**options)
