"""Baselines move weights as `jax.grad` of the whole model and optax do."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zo2jax.bench.backpropagation import Adapters, Offloaded, Whole, backpropagate
from zo2jax.bench.baselines import METHODS, Baseline, measure_baseline
from zo2jax.bench.shapes import SHAPES, Work
from zo2jax.directions import lora
from zo2jax.models.blocks import owned_shapes
from zo2jax.pages import flat

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS, RATE = 3, 1e-2
TINY = Baseline("opt-tiny", "adam", layers=2, rows=2, tokens=8, steps=1, warm_ups=0)


def model_of(shape, dtype=jnp.float32):
    """Weights of their own in each layer, and biases and norms that are no constants."""
    model = replace(SHAPES[shape], vocabulary=64, size=16, hidden=24).init(jax.random.key(0), dtype)
    rng = np.random.default_rng(1)
    leaves = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), owned_shapes(model.blocks))
    return model.replace(leaves)


BATCH = Work(tokens=8, rows=2).batch(64)


def by_optax(loss, params, optimizer):
    """(losses, parameters) of steps of the whole at once."""
    losses = []
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        for _ in range(STEPS):
            found, gradient = jax.jit(jax.value_and_grad(loss))(params)
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(found))
    return losses, params


def close(a, b, moved, atol=2e-3):
    """Differences of weights are a small part of what these have moved by, which Adam makes RATE for each."""
    for (path, x), y, z in zip(jax.tree_util.tree_leaves_with_path(a), *map(jax.tree.leaves, (b, moved)), strict=True):
        if (name := jax.tree_util.keystr(path)).endswith("['k']['bias']"):  # no loss depends on a bias of keys
            continue
        assert np.abs(np.asarray(y, np.float64) - np.asarray(z, np.float64)).max() > RATE / 2, name
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), atol=atol * RATE, rtol=0)


LLAMA = pytest.param("tiny", Offloaded, marks=pytest.mark.slow)


@pytest.mark.parametrize(("shape", "how"), [("opt-tiny", Whole), ("opt-tiny", Offloaded), LLAMA])
def test_all_weights_move_as_by_optax(shape, how):
    model = model_of(shape)
    before = jax.tree.map(np.asarray, model.params)
    learner, losses = how(model, optax.adam(RATE, eps=1e-4)), []
    for _ in range(STEPS):
        losses.append(float(backpropagate(model.blocks, learner, BATCH)))
    expected, params = by_optax(lambda p: model.loss(p, BATCH), model.params, optax.adam(RATE, eps=1e-4))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close(learner.weights, params, before)


def test_masters_keep_what_16_bits_lose():
    """Small steps are lost in bfloat16; masters have them, and the weights are their rounding."""
    model = model_of("opt-tiny", jnp.bfloat16)
    began = jax.tree.map(lambda x: np.asarray(x, np.float32), model.params)
    away, here = (how(model, optax.sgd(1e-5, momentum=0.0)) for how in (Offloaded, Whole))
    for _ in range(STEPS):
        for learner in (away, here):
            backpropagate(model.blocks, learner, BATCH)
    name = "layers.0.mlp"
    masters = flat(away.kept[name][0])["fc1.weight"]
    assert masters.dtype == jnp.float32 and masters.sharding.memory_kind == "pinned_host"
    masters = jnp.asarray(np.asarray(masters))
    moved = np.abs(np.asarray(masters) - flat(began[name])["fc1.weight"])
    assert moved.max() > 0
    weights = flat(away.weights[name])["fc1.weight"]
    assert weights.dtype == jnp.bfloat16 and (weights == masters.astype(jnp.bfloat16)).all()
    assert {x.dtype for x in jax.tree.leaves(here._states)} == {jnp.dtype("float32")}
    lost = np.asarray(flat(here.weights[name])["fc1.weight"], np.float32) == flat(began[name])["fc1.weight"]
    assert (lost & (moved > 0)).any()


def test_adapters_move_as_by_optax():
    """Against W + s B A in the place of W."""
    model, direction = model_of("opt-tiny"), lora(2, 6.0, targets=("*.attn.q.*", "*.attn.v.*"))
    learner = Adapters(model, optax.adam(RATE, eps=1e-4), direction)
    began = jax.tree.map(np.asarray, learner.adapters)
    assert {(b, n) for b, own in began.items() for n in own} == {
        (f"layers.{i}.attn", f"{x}.weight") for i in range(2) for x in "qv"
    }

    def loss(adapters):
        params = {block: dict(leaves) for block, leaves in model.params.items()}
        for block, own in adapters.items():
            for name, (b, a) in own.items():
                part = name.split(".")[0]
                params[block][part] = params[block][part] | {"weight": params[block][part]["weight"] + 3.0 * b @ a}
        return model.loss(params, BATCH)

    losses = [float(backpropagate(model.blocks, learner, BATCH)) for _ in range(STEPS)]
    expected, adapters = by_optax(loss, jax.tree.map(jnp.asarray, began), optax.adam(RATE, eps=1e-4))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close(learner.adapters, adapters, began, atol=5e-3)


def test_tied_models_are_refused():
    model = replace(SHAPES["opt-tiny"], layers=1, tied=True).init(jax.random.key(0))
    with pytest.raises(ValueError, match="head shares leaves with another block"):
        backpropagate(model.blocks, Whole(model, optax.adam(RATE)), BATCH)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured(method):
    found = measure_baseline(replace(TINY, method=method, layers=1))
    assert found["ms"] == found["times_ms"][0] > 0 and found["first_step_s"] > 0
    assert found["tokens_per_s"] == pytest.approx(2 * 8 / found["ms"] * 1e3)
    assert {"device", "versions", "parameters", "peak_device_gib", "peak_host_gib"} < set(found)
    json.dumps(found)


def test_what_a_baseline_needs():
    """2 bytes a weight, and 8 of Adam's state; or 12 of masters and state in host memory, which XLA must be allowed."""
    parts = Baseline("opt-6.7b", "adam").parts
    n, largest = sum(parts), max(parts)
    assert n / 1e9 == pytest.approx(6.66 + 50272 * 4096 / 1e9, rel=0.01)
    assert Baseline("opt-6.7b", "lora").needs() == (2 * n, 0)
    assert Baseline("opt-6.7b", "adam").needs() == (10 * n + 10 * largest, 0)
    device, host = Baseline("opt-6.7b", "adam-offload").needs()
    assert device == 2 * n + 3 * 12 * largest and 12 * n + 3 * 12 * largest < host < 96 * 2**30
    limit = Baseline("opt-6.7b", "adam-offload").environment()["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]
    assert int(limit) * 2**30 == host
    assert Baseline("opt-6.7b", "adam").environment() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "adamw"}, "method is 'adamw', expected one of mezo, lora, adam, adam-offload"),
        ({"model": "opt-1b"}, "model is 'opt-1b', expected one of"),
        ({"steps": 0}, "steps is 0, expected 1 or more"),
    ],
)
def test_baselines_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
