"""A run is the same bit for bit wherever its blocks live, and, given its coefficients, the step of `zo2jax.mezo`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zo2jax as zo
from zo2jax.models.llama import LlamaConfig
from zo2jax.models.opt import OptConfig
from zo2jax.models.qwen3 import Qwen3Config
from zo2jax.plan import Plan
from zo2jax.stores import StoreError

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = {"vocabulary": 67, "size": 32, "hidden": 40, "layers": 2, "heads": 4, "context": 64}
FAMILIES = {
    "llama": lambda tied: LlamaConfig(**SHAPE, kv_heads=2, head_size=8, tied=tied),
    "qwen3": lambda tied: Qwen3Config(**SHAPE, kv_heads=2, head_size=8, tied=tied),
    "opt": lambda tied: OptConfig(**SHAPE, token_size=32, tied=tied),
}
NAMES = ["embed", "layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp", "head"]
PLANS = {
    "host": Plan(dict.fromkeys(NAMES, "host")),
    "host deep": Plan(dict.fromkeys(NAMES, "host"), prefetch=3),
    "host plain": Plan(dict.fromkeys(NAMES, "host"), prefetch=0, overlap=False, pinned=False),
    "disk": Plan(dict.fromkeys(NAMES, "disk")),
    "mixed": Plan(dict(zip(NAMES, ["host", "disk", "device", "disk", "host", "host"], strict=True))),
}


def batches(count=6, rows=2):
    rng = np.random.default_rng(3)
    for _ in range(count):
        ids = rng.integers(0, 67, (rows, 12)).astype(np.int32)
        yield {"ids": ids, "targets": np.roll(ids, -1, 1)}


def trained(model, directory, plan=None, *, estimator=None, optimizer=None, flush=False, evaluate=True):
    """(weights, losses, updates) after a few steps with an evaluation in the middle and a step whose g is 0."""
    estimator = estimator or zo.two_point(1e-3)
    optimizer = optimizer or zo.sgd(optax.linear_schedule(1e-2, 1e-3, 6), 0.1)
    losses, updates = [], []
    with zo.Run(model, estimator, optimizer, directory=directory, key=jax.random.key(5), plan=plan) as run:
        for i, batch in enumerate(batches()):
            if i == 2:  # no target counts: every loss is 0, and so is g
                batch |= {"weights": np.zeros((2, 12), np.float32)}
            info = run.step(batch)
            losses.append(float(info.loss))
            updates.append(info.update)
            if flush:
                run.flush()
            if i == 3 and evaluate:
                losses.append(run.evaluate(batches(2)))
        return run.state.params, losses, updates


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32)), a, b)


SLOW = pytest.mark.slow
CASES = [
    ("llama", False, jnp.float32, zo.normal, 1, "host"),
    ("llama", True, jnp.bfloat16, zo.rademacher, 1, "mixed"),
    ("qwen3", True, jnp.float32, zo.rademacher, 3, "disk"),
    pytest.param("qwen3", False, jnp.bfloat16, zo.normal, 1, "host deep", marks=SLOW),
    ("opt", False, jnp.bfloat16, zo.normal, 3, "disk"),
    ("opt", True, jnp.float32, zo.normal, 1, "host plain"),
    pytest.param("opt", False, jnp.float32, zo.rademacher, 1, "mixed", marks=SLOW),
    ("llama", False, jnp.bfloat16, zo.rademacher, 3, "host deep"),
]


@pytest.mark.parametrize(("family", "tied", "dtype", "direction", "copies", "tier"), CASES)
def test_tiers_change_no_bit(family, tied, dtype, direction, copies, tier, tmp_path):
    estimator = zo.two_point(1e-3, direction=direction)
    estimator = estimator if copies == 1 else zo.averaged(estimator, copies)
    model = FAMILIES[family](tied).init(jax.random.key(1), dtype)
    weights, losses, updates = trained(model, tmp_path / "device", estimator=estimator)
    others = trained(model, tmp_path / "other", PLANS[tier], estimator=estimator, flush=tier == "mixed")
    assert losses == others[1]
    assert_same(weights, others[0])
    # The plain step, in other code: given the same coefficients the same weights, bit for bit.
    expected, ids = model.params, zo.mezo(model.loss, estimator, zo.sgd(0.0)).init(model.params, jax.random.key(0))
    for update in updates:
        expected = zo.apply_update(expected, update, ids.leaf_ids, direction=direction)
    assert_same(weights, expected)
    pairs = zip(*map(jax.tree.leaves, (weights, model.params)), strict=True)
    moved = [np.mean(np.asarray(x) != np.asarray(y)) for x, y in pairs if x.ndim > 1]
    assert min(moved) > 0.5


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("opt", False)])
def test_losses_are_those_of_the_plain_step(family, tied, tmp_path):
    """Float32, over all steps, each with its own rounding of activations: to 1e-6."""
    model = FAMILIES[family](tied).init(jax.random.key(1))
    estimator, optimizer = zo.averaged(zo.two_point(1e-3), 2), zo.sgd(1e-4, 0.1)
    plain = zo.mezo(model.loss, estimator, optimizer)
    state = plain.init(model.params, jax.random.key(5))
    step = jax.jit(plain.step)
    with zo.Run(model, estimator, optimizer, directory=tmp_path, key=jax.random.key(5), plan=PLANS["host"]) as run:
        for batch in batches():
            state, info = step(state, batch)
            np.testing.assert_allclose(float(run.step(batch).loss), float(info.loss), rtol=1e-6)


def test_a_run_goes_on_in_another_tier_without_its_page_files(tmp_path):
    model = FAMILIES["opt"](False).init(jax.random.key(1))
    straight = trained(model, tmp_path / "straight", evaluate=False)[0]
    options = {"directory": tmp_path / "parts", "key": jax.random.key(5)}
    arguments = (zo.two_point(1e-3), zo.sgd(optax.linear_schedule(1e-2, 1e-3, 6), 0.1))
    steps = list(batches())
    steps[2] |= {"weights": np.zeros((2, 12), np.float32)}
    for tier, until in (("disk", 3), ("host", 5), ("device", 6)):
        with zo.Run(model, *arguments, plan=PLANS.get(tier), **options) as run:
            for batch in steps[run.steps_done : until]:
                run.step(batch)
            run.save()
            weights = run.state.params
        assert not list((tmp_path / "parts").glob("pages/*"))
    assert_same(weights, straight)


def test_too_little_host_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("zo2jax.stores.available_memory", lambda: 1000)
    with pytest.raises(StoreError, match=r"6 blocks need .* GiB of host memory, and 0.0 GiB are free"):
        trained(FAMILIES["llama"](False).init(jax.random.key(1)), tmp_path, PLANS["host"])


def test_a_page_file_that_changed_is_not_read_as_good(tmp_path):
    model = FAMILIES["llama"](False).init(jax.random.key(1))
    first, *others = batches()
    with (
        pytest.raises(StoreError, match=r"layers.0.mlp.page is not what was written.*last checkpoint"),
        zo.Run(
            model, zo.two_point(1e-3), zo.sgd(1e-3), directory=tmp_path, key=jax.random.key(5), plan=PLANS["disk"]
        ) as run,
    ):
        run.step(first)
        run.flush()
        run._stream.wait()
        with (tmp_path / "pages" / "layers.0.mlp.page").open("r+b") as file:
            file.seek(100)
            file.write(b"torn")
        run.step(others[0])
