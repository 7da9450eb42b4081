"""Probes in another dtype than the weights: what is multiplied, what moves, in every tier and implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_marks import each_implementation
from test_stream import FAMILIES, PLANS, batches
from test_targets import arrays, assert_same, trained

import zo2jax as zo
from pallas_kernels import bits
from pallas_kernels.perturb import Probes, perturb
from zo2jax.config import Config, ConfigError
from zo2jax.directions import draw, from_json
from zo2jax.leaves import leaf_ids

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOW = pytest.mark.slow
RNG = np.random.default_rng(7)


@each_implementation
@pytest.mark.parametrize(("dtype", "wide"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")])
def test_members_are_rounded_once_to_their_dtype(dtype, wide, implementation):
    w = jnp.asarray(RNG.normal(size=(33, 12)), wide)
    keys = jnp.asarray(RNG.integers(0, 2**32, (2, 2), dtype=np.uint32))
    matrix = bits.cut12(jnp.asarray(RNG.normal(size=(3, 2)) * 1e-2, jnp.float32))
    moved, members = perturb(w, None, Probes(keys, matrix), dtype, implementation=implementation)
    z = [bits.draw(bits.normal_pair, key, jnp.arange(33, dtype=jnp.uint32), 12) for key in keys]
    exact = jnp.stack([w.astype(jnp.float32) + (row[0] * z[0] + row[1] * z[1]) for row in matrix])
    assert members.dtype == dtype and moved.dtype == wide
    np.testing.assert_array_equal(np.asarray(members, np.float32), np.asarray(exact.astype(dtype), np.float32))


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "kind", "of_probes", "tier"),
    [
        ("opt", True, "float32", "normal", "bfloat16", "host"),
        pytest.param("llama", False, "bfloat16", "rademacher", "float32", "mixed", marks=SLOW),
        pytest.param("qwen3", True, "float32", "normal", "float16", "disk", marks=SLOW),
    ],
)
def test_tiers_replay_and_the_update_itself(family, tied, dtype, kind, of_probes, tier, tmp_path):
    model = FAMILIES[family](tied).init(jax.random.key(1), dtype)
    direction = zo.dense(kind, perturb_dtype=of_probes)
    weights, losses, updates = trained(model, tmp_path / "device", direction, steps=3)
    others = trained(model, tmp_path / "other", direction, PLANS[tier], steps=3)
    assert losses == others[1]
    assert_same(weights, others[0])
    assert_same(arrays(zo.replay(model, tmp_path / "other").source), weights)
    expected, ids = model.params, jnp.asarray(leaf_ids(model.params))
    for update in updates:  # weights move in their own dtype, as along any z
        expected = zo.apply_update(expected, update, ids, direction=zo.dense(kind))
    assert_same(arrays(expected), weights)


@pytest.mark.parametrize("of_probes", ["bfloat16", pytest.param("float16", marks=SLOW)])
def test_losses_are_those_of_rounded_probes(of_probes, tmp_path):
    model = FAMILIES["opt"](False).init(jax.random.key(1))
    estimator = zo.two_point(1e-2, direction=zo.dense(perturb_dtype=of_probes))
    plain = zo.mezo(model.loss, estimator, zo.sgd(1e-3))
    state = plain.init(model.params, jax.random.key(5))
    batch = next(iter(batches(1)))
    info = jax.jit(plain.step)(state, batch)[1]
    with zo.Run(model, estimator, zo.sgd(1e-3), directory=tmp_path, key=jax.random.key(5)) as run:
        losses = np.asarray(run.step(batch).losses)
    np.testing.assert_allclose(losses, info.losses, rtol=1e-6)
    leaves, tree = jax.tree.flatten(model.params)
    ids = leaf_ids(model.params)
    for member, eps in enumerate(np.asarray(estimator.probes)[:, 0]):
        probe = [(w + eps * draw(zo.normal, info.update.keys[0], i, w.shape)) for w, i in zip(leaves, ids, strict=True)]
        rounded = [p.astype(of_probes).astype(jnp.float32) if p.ndim > 1 else p for p in probe]
        np.testing.assert_allclose(losses[member], model.loss(jax.tree.unflatten(tree, rounded), batch), rtol=2e-6)
        exact = float(model.loss(jax.tree.unflatten(tree, probe), batch))
        assert abs(losses[member] / exact - 1) > 1e-6  # what is rounded is seen


def test_it_is_named_recorded_and_refused():
    direction = zo.dense("rademacher", perturb_dtype="bfloat16")
    assert str(direction) == "dense('rademacher', perturb_dtype='bfloat16')"
    assert from_json(direction.as_json()) == direction
    assert "perturb_dtype" not in zo.normal.as_json()
    with pytest.raises(ValueError, match="perturb_dtype is 'int8', expected one of float32, bfloat16, float16"):
        zo.dense(perturb_dtype="int8")
    with pytest.raises(ValueError, match="refresh is 8, with perturb_dtype 'float16'"):
        zo.dense(refresh=8, perturb_dtype="float16")
    with pytest.raises(ConfigError, match="perturb_dtype=float16, direction=lora: expected direction=normal"):
        Config(model="m", data="d", direction="lora", perturb_dtype="float16")
    assert Config(model="m", data="d", perturb_dtype="float16").make_direction().perturb_dtype == "float16"
    assert "perturb_dtype" not in Config(model="m", data="d").as_json()
