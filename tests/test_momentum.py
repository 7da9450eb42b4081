"""Momentum in the factors of low-rank directions (LOZO-M), against momentum of whole matrices in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_factored import same

import zo2jax as zo
from pallas_kernels.bits import cut12
from zo2jax.directions import draw, lowrank
from zo2jax.factored import Basis, basis_of, projected
from zo2jax.leaves import leaf_id
from zo2jax.pages import flat

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(8)
BETA, DECAY = 0.8, 0.02
PLANS = {tier: zo.Plan(dict.fromkeys("abc", tier)) for tier in ("host", "disk")}


def small(dtype=np.float32):
    """Three stages with ragged matrices, one of three dimensions, one shared, and vectors."""

    def first(p, batch):
        return jnp.tanh(batch["x"] @ p["w"].astype(jnp.float32) + p["bias"])

    def second(p, x):
        return x + jnp.einsum("bi,ijk,bj->bk", x, p["cube"].astype(jnp.float32), x) * p["gain"]

    def third(p, x):
        return x @ p["w"].astype(jnp.float32).T

    shapes = {"a": {"w": (5, 7), "bias": (7,)}, "b": {"cube": (7, 7, 7), "gain": (7,)}, "c": {"w": (5, 7)}}
    leaves = {
        block: {k: (0.3 * RNG.normal(size=n)).astype(dtype if len(n) > 1 else np.float32) for k, n in named.items()}
        for block, named in shapes.items()
    }
    stages = {name: (call, leaves[name]) for name, call in zip("abc", (first, second, third), strict=True)}
    return zo.blocks(stages, loss=lambda y, batch: ((y - batch["x"]) ** 2).mean(1), tied={"c.w": "a.w"})


def batches(count):
    return [{"x": np.random.default_rng(t).normal(size=(3, 5)).astype(np.float32)} for t in range(count)]


def run(model, directory, *, refresh, steps=100, plan=None, copies=1, rounding=zo.stochastic):
    estimator = zo.averaged(zo.two_point(1e-3, direction=lowrank(2, refresh=refresh)), copies)
    optimizer = zo.sgd(optax.linear_schedule(3e-3, 1e-3, steps), DECAY, momentum=BETA)
    how = {"directory": directory, "key": jax.random.key(5), "plan": plan, "rounding": rounding}
    return zo.Run(model, estimator, optimizer, **how)


def weights(run):
    return {block: jax.tree.map(np.asarray, run.model.params[block]) for block in run.model.params}


def broken(batch):
    """A batch whose loss is not finite."""
    return {"x": np.full_like(batch["x"], np.nan)}


@partial(jax.jit, static_argnames=("shape", "refresh"))
def drawn(keys, ident, shape, refresh):
    return jax.vmap(jax.vmap(lambda key: draw(lowrank(2, refresh=refresh), key, ident, shape)))(keys)


def explicit(w, name, updates, refresh):
    """M <- beta M + (1 - beta) sum_k c_k Z_k, W <- W - decay W + M, with Z and M as whole matrices in float64.

    Where V changes M is multiplied by V' V'^T / n_in. Vectors take their updates as they are.
    """
    ident = np.uint32(leaf_id(name))
    keys = jax.random.wrap_key_data(jnp.stack([update.keys for update in updates]))
    zs = np.asarray(drawn(keys, ident, w.shape, refresh), np.float64)
    theta, mean = np.asarray(w, np.float64), np.zeros(w.shape)
    for t, (update, z) in enumerate(zip(updates, zs, strict=True)):
        coefs, decay, fresh = (np.asarray(x, np.float64) for x in (update.coefs, update.decay, update.fresh))
        if w.ndim < 2:
            theta = theta + np.tensordot(coefs, z, 1)
            continue
        if t and t % refresh == 0:
            basis = Basis(jax.random.wrap_key_data(update.keys[0, 1]), jnp.float32(0))
            v = np.asarray(basis_of(basis, ident, w.shape, lowrank(2, refresh=refresh)), np.float64)
            mean = mean @ v @ v.T / len(v)
        if fresh:
            mean = (1 - fresh) * mean + np.tensordot(np.asarray(cut12(fresh * coefs), np.float64), z, 1)
            theta = theta - decay * theta + mean
    return theta


def test_ninety_steps_and_two_folds_are_momentum_of_whole_matrices_in_every_tier(tmp_path):
    model = small()

    def trained(directory, plan, flushed):
        updates = []
        with run(model, directory, refresh=40, steps=90, plan=plan, copies=2) as training:
            for t, batch in enumerate(batches(90)):
                info = training.step(broken(batch) if t in (7, 40) else batch)
                updates.append(info.update._replace(keys=jax.random.key_data(info.update.keys)))
                if t in flushed:
                    training.flush()
            return weights(training), updates

    moved, updates = trained(tmp_path / "device", None, ())
    same((moved, updates), trained(tmp_path / "disk", PLANS["disk"], (4, 6, 7, 39, 40, 60)))
    assert [t for t, update in enumerate(updates) if not update.fresh] == [7, 40]
    for block, leaves in moved.items():
        for name, ours in flat(leaves).items():
            start = flat(model.params[block])[name]
            theta = explicit(start, f"{block}.{name}", updates, 40)
            distance = np.abs(theta - np.asarray(start, np.float64)).max()
            assert distance > 1e-3, name
            np.testing.assert_allclose(ours, theta, atol=2e-5 * distance, rtol=2e-6, err_msg=name)


def test_a_run_that_stops_around_a_fold_goes_on_with_the_same_bits(tmp_path):
    model = small(jnp.bfloat16)
    given = [broken(batch) if t == 3 else batch for t, batch in enumerate(batches(8))]
    with run(model, tmp_path / "whole", refresh=5, rounding=zo.residual) as whole:
        for batch in given:
            whole.step(batch)
        expected = weights(whole)
    for stop in (5, 6):
        directory = tmp_path / str(stop)
        with run(model, directory, refresh=5, plan=PLANS["host"], rounding=zo.residual) as first:
            for batch in given[:stop]:
                first.step(batch)
            first.save()
            first.step(given[stop])  # is in the journal only
        with run(model, directory, refresh=5, rounding=zo.residual) as second:
            for batch in second.remaining(given):
                second.step(batch)
            same(expected, weights(second))


def test_on_a_quadratic_momentum_is_stable_where_plain_steps_are_not(tmp_path):
    target = {"t": RNG.normal(size=(8, 6)).astype(np.float32)}
    start = {"w": np.zeros((8, 6), np.float32)}
    model = zo.blocks([(lambda p, _: p["w"], start)], loss=lambda w, batch: 0.5 * jnp.sum((w - batch["t"]) ** 2))
    losses = {}
    for beta in (0.0, 0.9):
        estimator, optimizer = zo.two_point(1e-3, direction=lowrank(2, refresh=10)), zo.sgd(0.04, momentum=beta)
        how = {"directory": tmp_path / str(beta), "key": jax.random.key(0), "tensorboard": False}
        with zo.Run(model, estimator, optimizer, **how) as training:
            losses[beta] = [training.step(target).loss for _ in range(250)]
    assert max(losses[0.9]) < 2 * losses[0.9][0] and losses[0.9][-1] < losses[0.9][0]
    assert losses[0.0][-1] > 100 * losses[0.0][0]


def test_projection_is_that_of_the_matrix_that_momentum_stands_for():
    """N V^T V' / n_in, by the definition."""
    n, v, *new = (np.round(RNG.normal(size=(rows, 2)) * 16).astype(np.float32) / 16 for rows in (5, *[9] * 21))
    for x in new:
        ours = projected(*map(jnp.asarray, (n, v, x)))
        np.testing.assert_allclose(ours, n.astype(np.float64) @ v.T @ x / 9, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model, directory: zo.mezo(model.loss, zo.two_point(1e-3), zo.sgd(0.1, momentum=0.9)), "is for zo2jax"),
        (
            lambda model, directory: zo.Run(
                model, zo.two_point(1e-3), zo.sgd(0.1, momentum=0.9), directory=directory, key=jax.random.key(0)
            ),
            r"sgd\(0.1, weight_decay=0.0, momentum=0.9\): momentum is in factors, expected zo2jax.lowrank",
        ),
        (lambda model, directory: zo.sgd(0.1, momentum=1.0), r"momentum is 1.0, expected a number in \[0, 1\)"),
    ],
)
def test_momentum_is_for_low_rank_directions(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(small(), tmp_path)


def test_an_update_with_momentum_is_not_one_of_weights_alone():
    update = zo.Update(jax.random.split(jax.random.key(0), (1, 2)), jnp.zeros(1), jnp.zeros(()), jnp.zeros(()))
    with pytest.raises(ValueError, match=r"the update lacks its momentum"):
        zo.apply_update({"w": jnp.ones((2, 2))}, update, jnp.zeros(1, jnp.uint32), direction=lowrank(2))
