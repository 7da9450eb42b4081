"""SVRG: what it estimates, the steps that it makes, and that its anchor takes no second copy of the weights."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_population import STAGES, arrays, assert_same, batches, moments, small

import zo2jax as zo
from zo2jax.directions import draw, step_keys
from zo2jax.header import Header
from zo2jax.leaves import leaf_id
from zo2jax.replay import read_journal

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOW = pytest.mark.slow
REFRESH = 4
DIRECTION = zo.lowrank(2, refresh=REFRESH)


def svrg(own=1, of_anchor=4, eps=1e-3, direction=DIRECTION):
    return zo.svrg(zo.averaged(zo.two_point(eps, direction=direction), own), of_anchor)


# --- what it estimates, on a quadratic whose gradient is known ---

ROWS, COLUMNS, SAMPLES = 6, 5, 20_000


@pytest.mark.parametrize(("own", "of_anchor", "far"), [(1, 4, 0.3), (2, 6, 3.0)])
def test_bias_and_variance_on_a_quadratic(own, of_anchor, far):
    """At a fixed distance from the anchor, over fresh periods: E|x|^2 of d = G - G_0 along K z and of G_0 along J."""
    rng = np.random.default_rng(4)
    linear = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    root = rng.normal(size=(ROWS * COLUMNS,) * 2).astype(np.float32) / 8
    hessian = root @ root.T
    there = far * rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    estimator = svrg(own, of_anchor, 2.0**-8)

    def loss(w):
        return jnp.vdot(linear, w) + jnp.vdot(w.ravel(), hessian @ w.ravel()) / 2

    def probed(w, z, probes):
        return jax.vmap(lambda row: loss(w + jnp.tensordot(row, z, 1)))(probes)

    def estimate(period):
        keys = step_keys(jax.random.key(7), period * REFRESH + 1, own + of_anchor, DIRECTION, of_anchor)
        z = jax.vmap(lambda key: draw(DIRECTION, key, np.uint32(3), (ROWS, COLUMNS)))(jax.random.key_data(keys))
        first = estimator.projected_gradient(probed(jnp.zeros_like(linear), z[own:], estimator.full.probes), period)
        losses = [probed(w, z[:own], estimator.probes) for w in (there, jnp.zeros_like(linear))]
        return jnp.tensordot(estimator.projected_gradient(jnp.concatenate(losses), period, first), z, 1)

    sample = jax.jit(lambda periods: jax.lax.map(estimate, periods, batch_size=1000))
    found = np.asarray(sample(jnp.arange(SAMPLES, dtype=jnp.uint32)), np.float64)
    before = linear.astype(np.float64)
    gained = (hessian.astype(np.float64) @ there.ravel()).reshape(ROWS, COLUMNS)
    error = found.std(axis=0).max() / math.sqrt(SAMPLES)
    np.testing.assert_allclose(found.mean(axis=0), before + gained, atol=6 * error, rtol=1e-3)
    kappa, shared = moments(DIRECTION)
    expected = 2 * shared * (before * gained).sum()
    for part, n in ((before, of_anchor), (gained, own)):
        expected += (kappa / n + (1 - 1 / n) * shared) * (part**2).sum()
    assert (found**2).sum(axis=(1, 2)).mean() == pytest.approx(expected, rel=0.03)


# --- its steps, against the definition in float64 ---

RATE, DECAY = 5e-3, 2.0


class Plain:
    """`small` and its steps in NumPy float64, with a copy of the weights as the anchor."""

    def __init__(self, model, estimator):
        self.estimator, self.key = estimator, jax.random.key(5)
        self.theta = {
            f"{block}.{name}": np.asarray(leaf, np.float64)
            for block, leaves in model.source.items()
            for name, leaf in leaves.items()
        }

    def z(self, key):
        return {
            name: np.asarray(draw(DIRECTION, key, np.uint32(leaf_id(name)), w.shape), np.float64)
            for name, w in self.theta.items()
        }

    def loss(self, p, given):
        total = count = 0.0
        for batch in given:
            x = np.tanh(batch["x"] @ p["first.w"] + p["first.bias"])
            y = (x + np.einsum("bi,ijk->bk", x, p["second.cube"])) @ p["first.w"].T
            total += (batch["weights"] * ((y - batch["x"]) ** 2).mean(1)).sum()
            count += batch["weights"].sum()
        return total / count

    def estimates(self, theta, zs, given):
        """(loss(theta + eps z) - loss(theta - eps z)) / (2 eps), of each z."""
        eps = float(self.estimator.probes[0, 0])
        pairs = [[{n: w + e * z[n] for n, w in theta.items()} for e in (eps, -eps)] for z in zs]
        return [(self.loss(a, given) - self.loss(b, given)) / (2 * eps) for a, b in pairs]

    def step(self, t, given):
        own, of_anchor = self.estimator.probes.shape[1], self.estimator.full.directions
        keys = [step_keys(self.key, jnp.uint32(s), n, DIRECTION) for s, n in ((t, own), (t - t % REFRESH, of_anchor))]
        mine, full = ([self.z(key) for key in jax.random.key_data(found)] for found in keys)
        if t % REFRESH == 0:
            self.anchor = dict(self.theta)
            self.found = self.estimates(self.theta, full, given)
            terms = [(g / of_anchor, z) for g, z in zip(self.found, full, strict=True)]
        else:
            both = zip(*(self.estimates(p, mine, given) for p in (self.theta, self.anchor)), strict=True)
            terms = [((now - then) / own, z) for (now, then), z in zip(both, mine, strict=True)]
            terms += [(g / of_anchor, z) for g, z in zip(self.found, full, strict=True)]
        for name, w in self.theta.items():
            moved = w - (RATE * DECAY * w if w.ndim > 1 else 0)
            self.theta[name] = moved - RATE * sum(g * z[name] for g, z in terms)


@pytest.mark.parametrize(("own", "of_anchor"), [(1, 4), pytest.param(2, 6, marks=SLOW)])
def test_ten_steps_are_those_of_the_definition(own, of_anchor, tmp_path):
    """With a fold in between, a list of batches and a single one, and weight decay."""
    model, estimator, data = small(), svrg(own, of_anchor, 2.0**-4), batches(30)
    steps = [data[3 * t : 3 * t + 3] if t % REFRESH == 0 else [data[3 * t]] for t in range(10)]
    plain, optimizer = Plain(model, estimator), zo.sgd(RATE, DECAY)
    start = dict(plain.theta)
    with zo.Run(model, estimator, optimizer, directory=tmp_path, key=jax.random.key(5)) as run:
        for t, given in enumerate(steps):
            info = run.step(given)
            plain.step(t, given)
            members = 2 * of_anchor if t % REFRESH == 0 else 4 * own
            assert info.losses.shape == (members,) and info.projected_gradient.shape == (own + of_anchor,)
            present = info.losses if t % REFRESH == 0 else info.losses[: 2 * own]
            assert float(info.loss) == pytest.approx(float(present.mean()), rel=1e-6)
        found = {f"{block}.{n}": x for block, leaves in arrays(run.model.source).items() for n, x in leaves.items()}
    for name, theta in plain.theta.items():
        distance = np.abs(theta - start[name]).max()
        assert distance > 0.02, name
        np.testing.assert_allclose(found[name], theta, atol=1e-3 * distance, err_msg=name)  # coefficients of 12 bits


# --- what holds for every estimator ---

PLANS = {tier: zo.Plan(dict.fromkeys(STAGES, tier)) for tier in ("host", "disk")}


def model16():
    return small(jnp.bfloat16)


def opened(directory, estimator=None, plan=None, model=None, **options):
    optimizer = zo.sgd(1e-2, 0.1, momentum=0.5)
    how = {"directory": directory, "key": jax.random.key(5), "plan": plan, "rounding": zo.residual, **options}
    return zo.Run(model or model16(), estimator or svrg(), optimizer, **how)


def kept(run):
    """All that a run keeps, the anchor's vectors among it."""
    run.flush()
    return jax.tree.map(np.asarray, dict(run._kept.entries(run._stream)))


def broken(batch):
    """A batch whose loss is not finite."""
    return batch | {"weights": np.full_like(batch["weights"], np.nan)}


DATA = batches(11)
DATA[6] = broken(DATA[6])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(All that is kept, journal) of eleven steps that nothing happens to."""
    directory = tmp_path_factory.mktemp("straight")
    with opened(directory) as run:
        for batch in DATA:
            run.step(batch)
        found = kept(run)
    return found, (directory / "journal").read_bytes(), directory


@pytest.mark.parametrize("tier", ["host", pytest.param("disk", marks=SLOW)])
def test_tiers_and_replay_give_the_same_bits(tier, straight, tmp_path):
    whole, journal, directory = straight
    with opened(tmp_path, plan=PLANS[tier]) as run:
        for t, batch in enumerate(run.remaining(DATA)):
            run.step(batch)
            if t in (2, 3, 7):
                run.evaluate(batches(1))
        assert_same(kept(run), whole)
        weights = arrays(run.model.source)
    assert (tmp_path / "journal").read_bytes() == journal
    assert_same(arrays(zo.replay(model16(), directory).source), weights)
    start = arrays(model16().source)
    moved = zip(*map(jax.tree.leaves, (weights, start)), strict=True)
    assert all((x != y).mean() > 0.5 for x, y in moved)


@pytest.mark.parametrize("saved", [1, 7, *(pytest.param(n, marks=SLOW) for n in (4, 5))])
def test_a_run_goes_on_with_its_anchor(saved, straight, tmp_path):
    """From a checkpoint in a period, at its end, or of the period before; the step after it is in the journal only."""
    whole, journal, _ = straight
    with opened(tmp_path, plan=PLANS["host"]) as run:
        for batch in DATA[: saved + 1]:
            run.step(batch)
            if run.steps_done == saved:
                run.save()
    (tmp_path / "metrics.jsonl").unlink()
    with opened(tmp_path) as run:
        assert run.steps_done == saved + 1
        for batch in run.remaining(DATA):
            run.step(batch)
        assert_same(kept(run), whole)
    assert (tmp_path / "journal").read_bytes() == journal
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    gradients = {line["step"]: line["train/projected_gradient"] for line in lines}
    assert sorted(gradients) == list(range(1, 12)) and gradients[1][0] == gradients[5][0] == 0
    assert gradients[2][1:] == gradients[1][1:] and gradients[2][0] != 0 and gradients[6][1:] == gradients[5][1:]


def test_a_checkpoint_in_the_background_holds_the_anchor(straight, tmp_path):
    """Its blocks are of several steps, of two periods."""
    with opened(tmp_path) as run:
        for batch in DATA[:3]:
            run.step(batch)
        run.save(wait=False)
        for batch in DATA[3:10]:
            run.step(batch)
            while run._saver._background._handed.full():  # until the writer has taken its block
                pass
        run._saver._background.join()
        assert run._files.snapshots.last == 3
        assert sorted(run._files.snapshots.steps(3).of.values()) == [3, 4]
    with opened(tmp_path) as run:
        run.step(DATA[10])
        assert_same(kept(run), straight[0])


def test_after_a_skipped_first_step_the_period_has_no_anchor(tmp_path):
    data = batches(6)
    data[4] = broken(data[4])
    infos = []
    with opened(tmp_path) as run:
        for batch in data[:5]:
            infos.append(run.step(batch))
    with opened(tmp_path) as run:  # which knows of it from the journal
        infos.append(run.step(data[5]))
    assert [bool(info.skipped) for info in infos] == [False, False, False, False, True, False]
    now = svrg().coefficients(infos[5].losses[:2])
    np.testing.assert_allclose(infos[5].projected_gradient, [*np.asarray(now), 0, 0, 0, 0], rtol=1e-6)


def test_parts_are_those_of_the_estimator_at_most(straight, tmp_path):
    found = read_journal(straight[2])
    for size, expected in ((1, 1), (3, 3), (4, 4), (5, 4), (8, 4)):
        parts = svrg(2, 4).parts(size)
        assert {max(len(rows) for _, rows in some) for some in parts.values()} == {expected}
        assert [sum(len(rows) for _, rows in some) for some in parts.values()] == [8, 4]
    with opened(tmp_path, plan=zo.Plan(probe_batch=1)) as run:
        for t, batch in enumerate(DATA[:2]):
            losses = run.step(batch).losses
            np.testing.assert_allclose(losses, found.record(t).losses[: len(losses)], rtol=1e-4)


def test_no_second_copy_of_the_weights(tmp_path):
    """Beside the factors there are vectors, an empty P, and what a step is told."""
    size, before = 512, {id(x) for x in jax.live_arrays()}
    start = {"w": np.eye(size, dtype=np.float32), "bias": np.zeros(size, np.float32)}
    stages = [(lambda p, batch: batch["x"] @ p["w"] + p["bias"], start)]
    model = zo.blocks(stages, loss=lambda y, batch: jnp.square(y - 1).sum())
    with zo.Run(model, svrg(), zo.sgd(1e-4), directory=tmp_path, key=jax.random.key(5)) as run:
        for _ in range(REFRESH + 2):
            run.step({"x": np.ones((1, size), np.float32)})
        run.flush()
        held = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
    assert 4 * size * size < held < 1.1 * 4 * size * size


@SLOW
def test_generated_text_is_scored_for_both(tiny_folder, tmp_path):
    """A run that does not move has the anchor's losses: those of another run's anchor, at every step."""
    model = zo.load(tiny_folder)
    rows = [model.tokenizer.encode(prompt).ids for prompt in ("abc", "xyz")]
    batch = {"ids": np.array(rows, np.int32), "lengths": np.array([3, 3]), "answers": [["a"], ["b"]]}
    objective = zo.Generated(lambda text, _: sum(map(ord, text)) % 97 / 97, tokens=8, stop=())
    found = []
    for rate in (0.0, 0.1):
        how = {"directory": tmp_path / str(rate), "key": jax.random.key(3), "loss": objective}
        with zo.Run(model, svrg(1, 2, 0.05), zo.sgd(rate), **how) as run:
            found.append(np.stack([run.step(batch).losses for _ in range(3)]))
    still, moved = found
    np.testing.assert_array_equal(still[1:, :2], still[1:, 2:])
    np.testing.assert_array_equal(moved[1:, 2:], still[1:, 2:])
    assert (moved[1:, :2] != moved[1:, 2:]).any() and np.ptp(still) > 0


@pytest.mark.parametrize("case", [pytest.param("codes", marks=SLOW), pytest.param("targets", marks=SLOW)])
def test_codes_and_some_leaves(case, tmp_path):
    """A run that does not move has twice the same losses, and one that moves has the same ones of its anchor."""
    direction = zo.lowrank(2, refresh=REFRESH, targets=("second.*",) if case == "targets" else ())
    model = small().with_format(zo.int8()) if case == "codes" else small()
    found = []
    for rate in (0.0, 1e-2):
        how = {"directory": tmp_path / str(rate), "key": jax.random.key(3), "plan": PLANS["host"]}
        with zo.Run(model, svrg(1, 2, 0.1, direction), zo.sgd(rate), **how) as run:
            found.append(np.stack([run.step(batch).losses for batch in batches(4)]))
            weights = arrays(run.model.source)
        assert_same(arrays(zo.replay(model, how["directory"]).source), weights)
    still, moved = found
    np.testing.assert_array_equal(still[1:, :2], still[1:, 2:])
    np.testing.assert_array_equal(moved[1:, 2:], still[1:, 2:])
    assert (moved[1:, :2] != moved[1:, 2:]).all()


# --- what is written, and what is refused ---


def test_the_journal_knows_its_steps(straight):
    found = read_journal(straight[2])
    assert (found.header.members, found.header.directions, found.header.anchor_directions) == (8, 5, 4)
    assert found.record(5).losses[4:].tolist() == [0] * 4 and (found.record(4).losses != 0).all()
    losses = np.stack([found.record(t).losses[:2] for t in (0, 10)]).mean(axis=1)
    assert f"{losses[0]:.4f} to {losses[1]:.4f}" in str(found)
    keys = jax.random.key_data(found.updates(4, 8, 4).keys)
    np.testing.assert_array_equal(keys[2, 1:], keys[0, 1:])
    np.testing.assert_array_equal(keys[0, 0], keys[0, 1])
    assert (keys[2, 0, 0] != keys[2, 1:, 0]).any(axis=1).all()


def test_headers_of_other_runs_are_as_they_were():
    plain = Header(key=(0, 7))
    assert "anchor_directions" not in plain.as_json()
    other = Header(key=(0, 7), anchor_directions=4)
    assert Header.from_json(other.as_json()) == other
    assert (
        other.differences(plain)
        == ["anchor_directions: 4 there, 0 here"]
        == [x.replace("0 there, 4 here", "4 there, 0 here") for x in plain.differences(other)]
    )


def test_a_run_is_not_gone_on_with_by_another_estimator(straight):
    with pytest.raises(ValueError, match="anchor_directions: 4 there, 6 here"):
        opened(straight[2], svrg(1, 6))


def test_the_plan_counts_the_first_step():
    model, data = small(), batches(1)
    plain, mine = (
        zo.plan(model, estimator, batch=data[0]).budget
        for estimator in (zo.two_point(1e-3, direction=DIRECTION), svrg(1, 10))
    )
    assert (mine.members, mine.parts, mine.probes) == (20, 10, plain.probes)
    assert mine.operations == 10 * plain.operations and mine.resident > plain.resident


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zo.svrg(zo.two_point(1e-3), 4), "the direction is normal: expected zo2jax.lowrank with a refresh"),
        (lambda: svrg(direction=zo.lowrank(2, refresh=None)), "refresh=None"),
        (lambda: svrg(direction=zo.dense("normal", refresh=4)), "expected zo2jax.lowrank"),
        (lambda: svrg(direction=zo.lora(2)), r"the direction is lora\(2"),
        (lambda: svrg(2, 5), "directions is 5, expected a multiple of 2, at least 4"),
        (lambda: svrg(2, 2), "directions is 2, expected a multiple of 2, at least 4"),
        (lambda: zo.svrg(svrg(), 4), "has an anchor already"),
        (lambda: zo.averaged(svrg(), 2), r"expected svrg around averaged\(..\), not in it"),
        (lambda: zo.mezo(lambda w, _: w.sum(), svrg(), zo.sgd(0.1)), "its anchor is for zo2jax.Run"),
    ],
)
def test_what_has_no_anchor(make, message):
    with pytest.raises(ValueError, match=message):
        make()
