"""Dense directions over matrices that are only read, codes or arrays, against an explicit computation in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_factored import decoded, explicit, same
from test_stream import FAMILIES, PLANS, batches

import zo2jax as zo
from zo2jax.leaves import leaf_id
from zo2jax.models.blocks import set_leaf
from zo2jax.pages import flat, layouts_of
from zo2jax.pending import Pending, after

pytestmark = pytest.mark.usefixtures("quick_compilation")

SLOW = pytest.mark.slow
STEPS, REFRESH = 12, 5


def opened(model, directory, *, direction=None, plan=None, copies=1, rounding=zo.stochastic):
    direction = direction or zo.dense("normal", refresh=REFRESH)
    estimator = zo.averaged(zo.two_point(1e-3, direction=direction), copies)
    optimizer = zo.sgd(optax.linear_schedule(1e-2, 1e-3, STEPS), 0.1)
    how = {"directory": directory, "key": jax.random.key(5), "plan": plan, "rounding": rounding}
    return zo.Run(model, estimator, optimizer, **how)


def stepped(run, steps=STEPS, looking=True):
    """(losses, updates) of the steps that remain, with a step whose g is 0, and with evaluations if ``looking``."""
    losses, updates = [], []
    start = run.steps_done
    for t, batch in enumerate(run.remaining(list(batches(steps))), start):
        if t == 3:
            batch = batch | {"weights": np.zeros_like(batch["weights"])}
        info = run.step(batch)
        losses.append(float(info.loss))
        updates.append(info.update._replace(keys=jax.random.key_data(info.update.keys)))
        if looking and t in (4, 6):
            losses.append(run.evaluate([batch]))
    return losses, updates


def weights(run):
    return {block: jax.tree.map(np.asarray, leaves) for block, leaves in run.model.params.items()}


def by_name(params):
    return {f"{block}.{name}": np.asarray(w) for block in params for name, w in flat(params[block]).items()}


def of_codes(model, format, params=None):
    """The model, in float32, of the matrices that codes stand for; ``params`` are what the codes are made of."""
    params = model.params if params is None else params
    out = {block: jax.tree.map(lambda x: x, leaves) for block, leaves in params.items()}
    for block, leaves in out.items():
        for name, w in decoded(leaves, format, block).items():
            set_leaf(leaves, name[len(block) + 1 :], jnp.asarray(w, jnp.float32))
    return model.replace(out)


@pytest.mark.parametrize(
    ("family", "tied", "format", "name", "copies"),
    [
        ("llama", True, zo.int8(keep=("*.q.*",)), "rademacher", 1),
        pytest.param("opt", False, zo.int4(group=8, keep=("head.*", "*.k.*")), "normal", 2, marks=SLOW),
    ],
)
def test_two_folds_are_the_explicit_computation(family, tied, format, name, copies, tmp_path):
    """Masters take every update; weights are what codes, made at the last fold, stand for, and the updates since."""
    model = FAMILIES[family](tied).init(jax.random.key(1))
    direction = zo.dense(name, refresh=REFRESH)
    with opened(model.with_format(format), tmp_path, direction=direction, copies=copies) as run:
        losses, updates = stepped(run, looking=False)
        moved = by_name(run.model.params)
        stored = {block: run._stream.stored(block) for block in run._stream}
    masters, start = by_name(stored), by_name(model.params)
    lasting = 2 * REFRESH
    nothing = [u._replace(coefs=0 * u.coefs, decay=0 * u.decay) for u in updates]  # so that all have one length
    expected = explicit(model, updates[:lasting] + nothing[lasting:], direction)
    final = explicit(model, updates, direction)
    coded = {leaf for leaf, w in start.items() if w.ndim == 2 and format.group_of(leaf, w.shape)}
    assert len(coded) >= 8 and (len(coded) < sum(w.ndim == 2 for w in start.values())) == bool(format.keep)
    since = explicit(of_codes(model, format, stored), nothing[:lasting] + updates[lasting:], direction)
    for leaf, theta in expected.items():
        distance = np.abs(final[leaf] - start[leaf].astype(np.float64)).max()
        near = {"rtol": 2e-6, "atol": 2e-4 * distance, "err_msg": leaf}
        assert distance > 1e-3, leaf
        if leaf in coded:
            np.testing.assert_allclose(masters[leaf], theta, **near)
            np.testing.assert_allclose(moved[leaf], since[leaf], **near)
        else:
            np.testing.assert_allclose(moved[leaf], final[leaf], **near)
    # The first losses are those of the plain step on decoded matrices.
    plain = of_codes(model, format)
    algorithm = zo.mezo(plain.loss, zo.averaged(zo.two_point(1e-3, direction=direction), copies), zo.sgd(1e-2))
    _, info = jax.jit(algorithm.step)(algorithm.init(plain.params, jax.random.key(5)), next(batches(1)))
    np.testing.assert_allclose(losses[0], info.loss, rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "dtype", "format", "name", "plan", "rounding"),
    [
        ("llama", "float32", zo.int8(keep=("*.q.*",)), "rademacher", "mixed", zo.stochastic),
        pytest.param("opt", "bfloat16", None, "rademacher", "host", zo.residual, marks=SLOW),
        pytest.param("qwen3", "bfloat16", zo.int8(keep=("*.q.*",)), "normal", "disk", zo.stochastic, marks=SLOW),
    ],
)
def test_tiers_and_looking_change_no_bit(family, dtype, format, name, plan, rounding, tmp_path):
    """Nor does saving within a period and going on."""
    model = FAMILIES[family](True).init(jax.random.key(1), dtype).with_format(format)
    how = {"rounding": rounding, "direction": zo.dense(name, refresh=REFRESH)}
    with opened(model, tmp_path / "device", **how) as run:
        losses, updates = stepped(run)
        whole = weights(run)
    assert np.isfinite(losses).all() and float(updates[3].coefs[0]) == 0 != float(updates[4].coefs[0])
    pairs = zip(*map(jax.tree.leaves, (whole, dict(model.params))), strict=True)
    assert any((w != w0).mean() > 0.3 for w, w0 in pairs)
    with opened(model, tmp_path / "parts", plan=PLANS[plan], **how) as run:
        for batch in itertools.islice(batches(), 3):
            run.step(batch)
        run.save()
        stepped(run, 4, looking=False)  # of these, one is in the journal only
    for stop in (2 * REFRESH, STEPS):
        with opened(model, tmp_path / "parts", plan=PLANS[plan] if stop == STEPS else None, **how) as run:
            stepped(run, stop, looking=False)
            run.save()
            there = weights(run)
    same(whole, there)


def test_terms_that_change_nothing_are_not_kept():
    keys = jax.random.split(jax.random.key(1), 2)
    one = zo.Update(keys, jnp.array([1.0, 0.0]), jnp.float32(0))
    none, off = one._replace(coefs=jnp.zeros(2)), one._replace(decay=jnp.float32(0.5))
    pending = Pending.none(4, jax.random.key(0))
    for update in (none, one, none, off):
        pending = after(pending, update)
    assert int(pending.used) == 4 and pending.coefs.tolist() == [0.5, 0, 1, 0] and float(pending.gone) == 0.5
    np.testing.assert_array_equal(pending.keys, np.tile(jax.random.key_data(keys), (2, 1)))
    leaf = pending.of_leaves(jnp.array([leaf_id("a"), leaf_id("b")], jnp.uint32))
    assert leaf.keys.shape == (2, 4, 2) and not (leaf.keys[0] == leaf.keys[1]).all(-1).any()


@pytest.mark.parametrize("rounding", [zo.nearest, zo.stochastic])
def test_a_fold_of_16_bits_rounds_once(rounding):
    start = jnp.asarray(0.02 * np.random.default_rng(1).normal(size=(64, 128)), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(1), 2)
    pending = Pending.none(4, jax.random.key(3))
    for c in (3e-5, -1e-5):
        pending = after(pending, zo.Update(keys, jnp.array([c, c / 2]), jnp.float32(2.0**-10)))
    (terms,) = pending.terms(jnp.array([7], jnp.uint32))
    ours = (terms.folded(w, jnp.int32(5), zo.rademacher, rounding) for w in (start, start.astype(jnp.float32)))
    moved, wide = (np.asarray(w, np.float64) for w in ours)
    spacing = np.spacing(np.maximum(*np.abs((moved, wide))).astype(start.dtype)).astype(np.float64)
    off = (moved - wide) / spacing
    assert np.abs(off).max() <= (0.501 if rounding == zo.nearest else 1.0) and np.abs(off.mean()) < 0.02
    if rounding == zo.nearest:
        np.testing.assert_array_equal(
            moved, np.asarray(jnp.asarray(wide, jnp.float32).astype(jnp.bfloat16), np.float64)
        )
    else:
        assert np.abs(off).max() > 0.9


def test_a_visit_reads_the_pages(tmp_path):
    """Nothing of a page leaves a training visit, and between folds none goes back."""
    model = FAMILIES["llama"](True).init(jax.random.key(1)).with_format(zo.int8(keep=("*.q.*",)))
    direction = zo.dense("rademacher", refresh=REFRESH)
    with opened(model, tmp_path, plan=PLANS["host"], direction=direction) as run:
        infos = [run.step(batch) for batch in batches(REFRESH + 1)]
    layouts = layouts_of(model.blocks, model.format)
    streamed = sum(layouts[name].nbytes for name in layouts if name.startswith("layers"))
    assert [info.bytes_down for info in infos] == [0] * (REFRESH + 1) and infos[2].bytes_up == streamed


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: zo.dense("cauchy", 8), "direction 'cauchy': expected 'normal'"), (lambda: zo.dense(refresh=0), "is 0")],
)
def test_directions_check_their_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_codes_need_a_refresh(tmp_path):
    model = FAMILIES["llama"](True).init(jax.random.key(1)).with_format(zo.int8())
    message = (
        r"the format is int8\(\), with the direction rademacher: expected zo2jax\.lowrank, or zo2jax\.dense with a"
    )
    with pytest.raises(ValueError, match=message):
        opened(model, tmp_path, direction=zo.rademacher)
    coded = model.with_format(zo.int8(compute="int8"))
    with pytest.raises(ValueError, match=r"compute='int8'\): products by codes are for zo2jax\.lowrank"):
        opened(coded, tmp_path)
