"""Adapters beside matrices that stay as they are, against an explicit computation in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_factored import same
from test_stream import FAMILIES, PLANS, batches

import zo2jax as zo
from pallas_kernels.bits import draw, fold, normal_pair
from zo2jax.directions import draw as draw_z
from zo2jax.directions import lora, step_keys
from zo2jax.leaves import leaf_id
from zo2jax.models.blocks import set_leaf
from zo2jax.pages import flat
from zo2jax.updates import perturb

pytestmark = pytest.mark.usefixtures("quick_compilation")

RANK, ALPHA, TARGETS = 3, 6, ("*.q.*", "*.down.*", "embed.*")
DIRECTION = lora(RANK, ALPHA, targets=TARGETS)
STEPS, EPS, DECAY = 8, 1e-2, 0.1


def run(model, directory, direction=DIRECTION, plan=None, momentum=0.0):
    optimizer = zo.sgd(optax.linear_schedule(1e-2, 1e-3, STEPS), DECAY, momentum=momentum)
    estimator = zo.averaged(zo.two_point(EPS, direction=direction), 2)
    return zo.Run(model, estimator, optimizer, directory=directory, key=jax.random.key(5), plan=plan)


def weights(run):
    return {block: jax.tree.map(np.asarray, run.model.params[block]) for block in run.model.params}


@partial(jax.jit, static_argnums=2)
def drawn(key, ident, rows):
    return draw(normal_pair, fold(key, ident), jnp.arange(rows, dtype=jnp.uint32), RANK)


class Explicit:
    """A and B of each matrix in NumPy float64, and the model with W + alpha / rank B A of them."""

    def __init__(self, model):
        self.model, self.adapters = model, {}
        basis = jax.random.key_data(step_keys(jax.random.key(5), 0, 1, DIRECTION)[0, 1])
        for block, leaves in model.params.items():
            for leaf, w in flat(leaves).items():
                name = f"{block}.{leaf}"
                if w.ndim > 1 and DIRECTION.trains(name):
                    start = self.noise(basis, name, w.shape[1]) / np.sqrt(3 * w.shape[1])
                    start = np.asarray(jax.lax.reduce_precision(start.astype(np.float32), 8, 7), np.float64)
                    self.adapters[name] = np.zeros((w.shape[0], RANK)), start

    @staticmethod
    def noise(key, name, rows):
        return np.asarray(drawn(key, np.uint32(leaf_id(name)), rows), np.float64)

    def moved(self, keys, coefs, decay=0.0):
        """B and A^T after a step; z of the one lies above that of the other."""
        out = {}
        for name, (b, a) in self.adapters.items():
            z = sum(c * self.noise(key[0], name, len(b) + len(a)) for key, c in zip(keys, coefs, strict=True))
            out[name] = b - decay * b + z[: len(b)], a - decay * a + z[len(b) :]
        return out

    def params(self, adapters):
        params = {block: jax.tree.map(lambda x: x, leaves) for block, leaves in self.model.params.items()}
        for name, (b, a) in adapters.items():
            block = max((x for x in params if name.startswith(x + ".")), key=len)
            w = np.asarray(flat(params[block])[name[len(block) + 1 :]], np.float64) + ALPHA / RANK * b @ a.T
            set_leaf(params[block], name[len(block) + 1 :], jnp.asarray(w, jnp.float32))
        return params


def test_losses_and_weights_are_those_of_explicit_adapters_in_every_tier(tmp_path):
    model = FAMILIES["llama"](True).init(jax.random.key(1))
    explicit, loss = Explicit(model), jax.jit(model.loss)

    def trained(directory, plan, flushed):
        with run(model, directory, plan=plan) as training:
            infos = []
            for t, batch in enumerate(batches(STEPS)):
                infos.append(training.step(batch))
                if t in flushed:
                    training.flush()
            return weights(training), [float(info.loss) for info in infos], [info.update for info in infos]

    moved, losses, updates = trained(tmp_path / "device", None, ())
    there = trained(tmp_path / "mixed", PLANS["mixed"], (1, 2))
    same((moved, losses), there[:2])
    for t, (batch, update) in enumerate(zip(batches(STEPS), updates, strict=True)):
        keys, (coefs, decay) = jax.random.key_data(update.keys), (np.asarray(x, np.float64) for x in update[1:3])
        if t in (0, STEPS - 1):
            rows = np.asarray(zo.averaged(zo.two_point(EPS), 2).probes, np.float64)
            probes = [loss(explicit.params(explicit.moved(keys, row)), batch) for row in rows]
            np.testing.assert_allclose(losses[t], np.mean(probes), rtol=2e-6)
        explicit.adapters = explicit.moved(keys, coefs, decay)
    expected = explicit.params(explicit.adapters)
    for block, leaves in moved.items():
        for leaf, ours in flat(leaves).items():
            theta, start = (np.asarray(flat(tree[block])[leaf]) for tree in (expected, model.params))
            distance = np.abs(theta - start).max()
            assert (distance > 1e-4) == (f"{block}.{leaf}" in explicit.adapters), leaf
            np.testing.assert_allclose(ours, theta, atol=2e-5 * distance, err_msg=leaf)


def test_a_run_goes_on_with_the_same_bits_and_the_base_stays(tmp_path):
    """Codes, and matrices without an adapter among them, with momentum."""
    model = FAMILIES["opt"](False).init(jax.random.key(1), "bfloat16").with_format(zo.int8(keep=("head.*",)))
    direction, momentum = lora(RANK, targets=("*.attn.q.*", "head.*", "embed.weight")), 0.8
    with run(model, tmp_path / "whole", direction, momentum=momentum) as whole:
        before = {block: whole._stream.stored(block) for block in model.params}
        for batch in batches(STEPS):
            whole.step(batch)
        expected = weights(whole)
        same(before, {block: whole._stream.stored(block) for block in model.params})
        exported = zo.load(whole.export(tmp_path / "model"))
        same(expected, {block: jax.tree.map(np.asarray, exported.params[block]) for block in expected})
        held = whole.evaluate(batches(2))
    with run(model, tmp_path / "parts", direction, PLANS["host"], momentum) as first:
        for batch in list(batches(STEPS))[:5]:
            first.step(batch)
        first.save()
    with run(model, tmp_path / "parts", direction, momentum=momentum) as second:
        for batch in second.remaining(list(batches(STEPS))):
            second.step(batch)
        same(expected, weights(second))
        assert second.evaluate(batches(2)) == held


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model, path: zo.mezo(model.loss, zo.two_point(1e-3, direction=lora(2)), zo.sgd(0.1)), "are for zo2jax"),
        (lambda model, path: draw_z(lora(2), jax.random.key(0), np.uint32(1), (3, 4)), "are for zo2jax"),
        (
            lambda model, path: perturb({}, jax.random.key(0), jnp.ones(1), jnp.ones(0), direction=lora(2)),
            "are for zo2jax",
        ),
        (
            lambda model, path: run(model, path, lora(2, targets=("*.w",))),
            r"targets \['\*\.w'\] name no leaf that lora",
        ),
        (lambda model, path: lora(2, 0), "alpha is 0, expected a positive number"),
        (lambda model, path: lora(0), "rank is 0, expected 1 to 64"),
    ],
)
def test_refusals(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(FAMILIES["llama"](True).init(jax.random.key(1)), tmp_path)


def test_a_plan_counts_adapters():
    model = FAMILIES["llama"](False).init(jax.random.key(1))
    bytes_of = {
        d: zo.plan(model, zo.two_point(1e-3, direction=d), tokens=8).budget.resident
        for d in (lora(2), lora(4), zo.lowrank(2))
    }
    matrices = [w.shape for leaves in model.params.values() for w in jax.tree.leaves(leaves) if w.ndim > 1]
    assert bytes_of[lora(4)] - bytes_of[lora(2)] == 8 * sum(map(sum, matrices))
    assert bytes_of[lora(2)] - bytes_of[zo.lowrank(2)] == 8 * sum(columns for _, columns in matrices)
