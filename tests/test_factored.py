"""Low-rank directions over matrices that are only read, against an explicit computation in float64."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_stream import FAMILIES, PLANS, batches

import zo2jax as zo
from pallas_kernels.bits import cut12
from pallas_kernels.quantized import decode, quantize
from zo2jax import pages
from zo2jax.directions import draw, lowrank
from zo2jax.factored import Factored
from zo2jax.leaves import leaf_id
from zo2jax.models.blocks import set_leaf
from zo2jax.models.layers import linear, lookup, vocabulary_losses
from zo2jax.models.opt import OptConfig
from zo2jax.pages import flat
from zo2jax.updates import folded, joined, split

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(6)
WEIGHT_DECAY = 0.1


def trained(model, directory, *, steps=12, refresh=5, plan=None, rank=2, copies=1, rounding=zo.stochastic, **options):
    """(weights, losses, updates) of a run with evaluations, flushes and a step whose g is 0."""
    estimator = zo.averaged(zo.two_point(1e-3, direction=lowrank(rank, refresh=refresh)), copies)
    optimizer = zo.sgd(optax.linear_schedule(1e-2, 1e-3, steps), WEIGHT_DECAY)
    losses, updates = [], []
    how = {"directory": directory, "key": jax.random.key(5), "plan": plan, "rounding": rounding}
    with zo.Run(model, estimator, optimizer, **how, **options) as run:
        for t, batch in enumerate(run.remaining(list(batches(steps)))):
            if t == 3:
                batch = batch | {"weights": np.zeros_like(batch["weights"])}
            info = run.step(batch)
            losses.append(float(info.loss))
            updates.append(info.update._replace(keys=jax.random.key_data(info.update.keys)))
            if t in (4, 6):
                run.evaluate([batch])
        return {block: jax.tree.map(np.asarray, run.model.params[block]) for block in run.model.params}, losses, updates


def explicit(model, updates, direction):
    """theta <- theta - decay theta + sum_k c_k Z_k in NumPy float64, Z drawn as a whole."""
    weights = {}
    keys = jax.random.wrap_key_data(jnp.stack([update.keys for update in updates]))
    for block, leaves in model.params.items():
        for name, w in flat(leaves).items():
            theta, ident = np.asarray(w, np.float64), np.uint32(leaf_id(f"{block}.{name}"))
            one = partial(draw, direction, ident=ident, shape=w.shape)
            zs = np.asarray(jax.vmap(jax.vmap(one))(keys), np.float64)
            for update, z in zip(updates, zs, strict=True):
                coefs, decay = (np.asarray(cut12(x), np.float64) for x in (update.coefs, update.decay))
                theta = theta - (decay * theta if w.ndim > 1 else 0) + np.tensordot(coefs, z, 1)
            weights[f"{block}.{name}"] = theta
    return weights


def test_a_hundred_steps_and_two_folds_are_the_explicit_computation(tmp_path):
    model = FAMILIES["opt"](True).init(jax.random.key(1))
    moved, _, updates = trained(model, tmp_path, steps=100, refresh=40)
    expected = explicit(model, updates, lowrank(2, refresh=40))
    assert expected.keys() == {f"{block}.{name}" for block in moved for name in flat(moved[block])}
    for name, theta in expected.items():
        block = max((b for b in moved if name.startswith(b + ".")), key=len)
        ours, start = (flat(tree[block])[name[len(block) + 1 :]] for tree in (moved, model.params))
        distance = np.abs(theta - np.asarray(start, np.float64)).max()
        assert distance > 1e-3, name
        np.testing.assert_allclose(ours, theta, atol=2e-5 * distance, rtol=2e-6, err_msg=name)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "plan", "rounding"),
    [
        ("llama", True, "bfloat16", "mixed", zo.residual),
        ("opt", False, "float32", "disk", zo.stochastic),
        pytest.param("qwen3", True, "bfloat16", "host deep", zo.stochastic, marks=pytest.mark.slow),
    ],
)
def test_tiers_change_no_bit(family, tied, dtype, plan, rounding, tmp_path):
    model = FAMILIES[family](tied).init(jax.random.key(1), dtype)
    weights, losses, updates = trained(model, tmp_path / "device", rounding=rounding)
    assert np.isfinite(losses).all() and float(updates[3].coefs[0]) == 0 != float(updates[4].coefs[0])
    there = trained(model, tmp_path / plan, plan=PLANS[plan], rounding=rounding)
    same((weights, losses, updates), there)
    assert any(
        (w != w0).mean() > 0.3 for w, w0 in zip(*map(jax.tree.leaves, (weights, dict(model.params))), strict=True)
    )


@pytest.mark.parametrize(("stop", "rounding"), [(4, zo.residual), (5, zo.stochastic), (6, zo.residual)])
def test_a_run_that_stops_around_a_fold_goes_on_with_the_same_bits(stop, rounding, tmp_path):
    model = FAMILIES["llama"](True).init(jax.random.key(1), "bfloat16")
    estimator = zo.two_point(1e-3, direction=lowrank(2, refresh=5))

    def run(directory, plan=None):
        how = {"directory": directory, "key": jax.random.key(5), "plan": plan, "rounding": rounding}
        return zo.Run(model, estimator, zo.sgd(1e-2, 0.1), **how)

    with run(tmp_path / "whole") as whole:
        for batch in batches(8):
            whole.step(batch)
        expected = {block: jax.tree.map(np.asarray, whole.model.params[block]) for block in whole.model.params}
    with run(tmp_path / "parts", PLANS["host"]) as first:
        for batch in itertools.islice(batches(8), stop):
            first.step(batch)
            first.flush()
        first.save()
        first.step(list(batches(8))[stop])  # is in the journal only
    with run(tmp_path / "parts") as second:
        for batch in second.remaining(list(batches(8))):
            second.step(batch)
        same(expected, {block: jax.tree.map(np.asarray, second.model.params[block]) for block in expected})


def test_losses_are_those_of_the_definition(tmp_path):
    model = FAMILIES["llama"](True).init(jax.random.key(1))
    estimator = zo.two_point(1e-3, direction=lowrank(2, refresh=4))
    _, losses, updates = trained(model, tmp_path, steps=10, refresh=4)
    algorithm = zo.mezo(model.loss, estimator, zo.sgd(1e-2))
    state = algorithm.init(model.params, jax.random.key(5))
    step = jax.jit(algorithm.step)
    for t, (batch, update) in enumerate(zip(batches(10), updates, strict=True)):
        if t != 3:
            np.testing.assert_allclose(losses[t], step(state, batch)[1].loss, rtol=1e-6)
        update = update._replace(keys=jax.random.wrap_key_data(update.keys))
        params = zo.apply_update(state.params, update, state.leaf_ids, direction=estimator.direction)
        state = state._replace(params=params, step=state.step + 1)


def test_a_factored_weight_is_its_matrix():
    """Products, rows and slabs, for members together, beside the matrix in float64."""
    w, f, v = (RNG.normal(size=s).astype(np.float32) for s in ((700, 24), (3, 700, 2), (24, 2)))
    v = np.asarray(jax.lax.reduce_precision(v, 8, 7))
    x, ids = RNG.normal(size=(3, 2, 5, 24)).astype(np.float32), RNG.integers(0, 700, (2, 5))

    def one(f, x):
        weight = Factored(jnp.asarray(w), jnp.float32, jnp.float32(0.75), f, jnp.asarray(v))
        return linear(x, weight), lookup(weight, ids), vocabulary_losses(x, weight, None, ids), weight.array()

    given = jax.jit(jax.vmap(one))(f, x)
    matrices = 0.75 * w.astype(np.float64) + np.einsum("mnr,kr->mnk", f.astype(np.float64), v)
    logits = np.einsum("mbtk,mnk->mbtn", x, matrices)
    largest = logits.max(-1, keepdims=True)
    losses = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    losses -= np.take_along_axis(logits, np.broadcast_to(ids, (3, 2, 5))[..., None], -1)[..., 0]
    for ours, expected in zip(given, (logits, matrices[:, ids], losses, matrices), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)
    lines = jax.jit(jax.vmap(lambda f, x: one(f, x)[0])).lower(f, x).as_text().splitlines()
    products = [line for line in lines if "dot_general" in line and "tensor<700x24xf32>" in line]
    assert len(products) == 1 and "tensor<3x2x5x24xf32>" in products[0], "members share one product"


def test_residuals_are_exact():
    x = np.concatenate([RNG.normal(size=1000), 2.0 ** RNG.integers(-100, 100, 1000), [0.0, -0.0, 1e-38]])
    high, low = split(jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(joined(high, low), x.astype(np.float32))
    np.testing.assert_allclose(high.astype(np.float32), x, rtol=2.0**-8)


@pytest.mark.parametrize(
    ("rounding", "arriving", "noise"),
    [(zo.residual, (0.999, 1.001), 0.01), (zo.stochastic, (0.99, 1.01), 0.2), (zo.nearest, (0.9, 0.99), 0.4)],
)
def test_what_arrives_of_small_updates(rounding, arriving, noise):
    """2000 steps of 2e-6 in one direction into bfloat16 weights ~ N(0, 0.02), folded every 50."""
    shape = (256, 192)
    u, v = (RNG.normal(size=(n, 4)).astype(np.float32) / 2**0.5 for n in shape)
    v = np.asarray(jax.lax.reduce_precision(v, 8, 7))
    w = start = jnp.asarray(0.02 * RNG.normal(size=shape), jnp.bfloat16)
    low = jnp.zeros(shape, jnp.int16)

    @jax.jit
    def fold(w, low, key):
        if rounding != zo.residual:
            return folded(w, 50 * 2e-6 * u, v, None, rounding, key), low
        return split(folded(joined(w, low), 50 * 2e-6 * u, v))

    for t in range(40):
        w, low = fold(w, low, jnp.array([t, 7], jnp.uint32))
    moved = np.asarray(joined(w, low) if rounding == zo.residual else w, np.float64) - np.asarray(start, np.float64)
    target = 2000 * 2e-6 * (u.astype(np.float64) @ v.T)
    part = (moved * target).sum() / (target**2).sum()
    assert arriving[0] <= part <= arriving[1]
    assert np.sqrt(np.mean((moved - target) ** 2) / np.mean(target**2)) < noise


def test_codes_follow_their_master():
    """The same small updates into int8 codes: through a float32 master they arrive, and without one most do not."""
    shape = (256, 192)
    u, v = (RNG.normal(size=(n, 4)).astype(np.float32) / 2**0.5 for n in shape)
    v = np.asarray(jax.lax.reduce_precision(v, 8, 7))
    start = jnp.asarray(0.02 * RNG.normal(size=shape), jnp.float32)
    target = 2000 * 2e-6 * (u.astype(np.float64) @ v.T)

    @jax.jit
    def fold(master, codes):
        add = partial(folded, p=50 * 2e-6 * u, v=v)
        return add(master), quantize(add(decode(codes, jnp.float32)), 8)

    master, alone = start, quantize(start, 8)
    before = np.asarray(decode(alone, jnp.float32), np.float64)
    for _ in range(40):
        master, alone = fold(master, alone)
    through, without = (
        ((np.asarray(decode(codes, jnp.float32)) - before) * target).sum() / (target**2).sum()
        for codes in (quantize(master, 8), alone)
    )
    assert 0.99 < through < 1.01 and without < 0.5


def test_residual_rounding_is_for_low_rank_directions(tmp_path):
    model = FAMILIES["llama"](True).init(jax.random.key(1))
    with pytest.raises(ValueError, match=r"rounding is residual, with the direction normal: expected zo2jax\.lowrank"):
        zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-3), directory=tmp_path, key=jax.random.key(5), rounding=zo.residual)
    with pytest.raises(ValueError, match=r"rounding is residual, which zo2jax\.Run keeps"):
        zo.mezo(model.loss, zo.two_point(1e-3), zo.sgd(1e-3), rounding=zo.residual)


FORMATS = {"int8": zo.int8(), "int8 by group": zo.int8(per="group", group=8), "int4": zo.int4(group=16)}


def decoded(leaves, format, block):
    """The matrices that a block's codes stand for, in NumPy float64 from the definition of codes."""
    out = {}
    for name, w in flat(leaves).items():
        w = np.asarray(w, np.float64)
        group = None if w.ndim < 2 else format.group_of(f"{block}.{name}", w.shape)
        if group is not None:
            most = {8: 127, 4: 7}[format.bits]
            groups = w.reshape(len(w), -1, group)
            scale = (np.abs(groups).max(-1).astype(np.float32) * np.float32(1 / most)).astype(np.float64)[..., None]
            w = (np.round(groups * (1 / scale)) * scale).reshape(w.shape)
        out[f"{block}.{name}"] = w
    return out


@pytest.mark.parametrize(
    ("name", "refresh", "plan"),
    [
        ("int8", 5, "mixed"),
        pytest.param("int4", None, "host", marks=pytest.mark.slow),
        pytest.param("int8 by group", None, "disk", marks=pytest.mark.slow),
    ],
)
def test_codes_are_the_matrices_that_they_stand_for(name, refresh, plan, tmp_path):
    """Losses and weights are those of decoded codes; up to a fold, after which codes are made of the masters anew."""
    config = OptConfig(vocabulary=67, size=32, hidden=48, layers=2, heads=4, context=64, token_size=32, tied=True)
    model, format = config.init(jax.random.key(1)), FORMATS[name]
    weights, losses, updates = trained(model.with_format(format), tmp_path / "device", refresh=refresh)
    same(
        (weights, losses, updates),
        trained(model.with_format(format), tmp_path / plan, refresh=refresh, plan=PLANS[plan]),
    )
    blocks = {block: decoded(model.params[block], format, block) for block in model.params}
    values = {k: v for block in blocks.values() for k, v in block.items()}
    params = {b: jax.tree.map(lambda x: x, leaves) for b, leaves in model.params.items()}
    for block, leaves in params.items():
        for leaf in flat(leaves):
            set_leaf(leaves, leaf, jnp.asarray(values[f"{block}.{leaf}"], jnp.float32))
    plain = trained(model.replace(params), tmp_path / "plain", refresh=refresh)
    count = refresh or len(losses)
    np.testing.assert_allclose(losses[:count], plain[1][:count], rtol=1e-6)
    expected = explicit(model.replace(params) if refresh is None else model, updates, lowrank(2, refresh=refresh))
    for leaf, theta in expected.items():
        block = max((b for b in weights if leaf.startswith(b + ".")), key=len)
        ours = flat(weights[block])[leaf[len(block) + 1 :]]
        group = None if theta.ndim < 2 else format.group_of(leaf, theta.shape)
        coded = 0 if refresh is None or group is None else np.abs(theta).max() / 127 * 0.6
        np.testing.assert_allclose(ours, theta, atol=coded + 1e-5 * np.abs(theta).max(), err_msg=leaf)


@pytest.mark.parametrize("refresh", [5, pytest.param(None, marks=pytest.mark.slow)])
def test_a_run_of_codes_goes_on_with_the_same_bits(refresh, tmp_path, monkeypatch):
    """Also where matrices have pages of their own for a while."""
    model = FAMILIES["llama"](True).init(jax.random.key(1), "bfloat16").with_format(zo.int8(keep=("head.*", "*.k.*")))
    expected = trained(model, tmp_path / "whole", steps=8, refresh=refresh)
    monkeypatch.setattr(pages, "APART", 1000)
    half = zo.averaged(zo.two_point(1e-3, direction=lowrank(2, refresh=refresh)), 1)
    optimizer = zo.sgd(optax.linear_schedule(1e-2, 1e-3, 8), WEIGHT_DECAY)
    with zo.Run(model, half, optimizer, directory=tmp_path / "parts", key=jax.random.key(5), plan=PLANS["host"]) as run:
        for t, batch in enumerate(itertools.islice(batches(8), 6)):
            run.step(batch | ({"weights": np.zeros_like(batch["weights"])} if t == 3 else {}))
        run.save()
        assert len(run.model.source.layouts["layers.0.mlp"].pages) > 3
    monkeypatch.undo()
    same(expected[0], trained(model, tmp_path / "parts", steps=8, refresh=refresh)[0])


def test_the_stream_can_wait_for_visits_that_only_read(tmp_path):
    """What it waits for must not be given away to a later visit, or blocks would heap up on the device."""
    model = FAMILIES["llama"](False).init(jax.random.key(1))
    options = {"directory": tmp_path, "key": jax.random.key(5), "plan": PLANS["host"]}
    with zo.Run(model, zo.two_point(1e-3, direction=lowrank(2)), zo.sgd(1e-3), **options) as run:
        run.step(next(batches(1)))
        waiting = run._stream._conveyor._last
        assert waiting and all(results and not results[0].is_deleted() for results in waiting.values())


def test_formats_are_for_low_rank_directions(tmp_path):
    model = FAMILIES["llama"](True).init(jax.random.key(1)).with_format(zo.int8())
    with pytest.raises(ValueError, match=r"the format is int8\(\), with the direction normal: expected"):
        zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-3), directory=tmp_path, key=jax.random.key(5))
