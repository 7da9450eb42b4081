"""The one function that moves weights: against float64, in every program, in every dtype."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import zo2jax as zo
from pallas_kernels.bits import cut12
from zo2jax import updates
from zo2jax.directions import draw
from zo2jax.leaves import leaf_ids
from zo2jax.updates import perturb

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {"m": (67, 33), "n": (67, 33), "v": (129,), "t": (3, 5, 7), "s": (), "e": (0, 4), "i": (2, 2)}
RNG = np.random.default_rng(17)


def make_params(dtype, scale=0.02):
    params = {name: jnp.asarray(RNG.normal(size=shape) * scale, dtype) for name, shape in SHAPES.items()}
    return params | {"i": jnp.arange(4, dtype=jnp.int32).reshape(2, 2), "v": params["v"].astype(jnp.float32)}


def make_update(k=3, coef=1e-3, decay=0.0):
    coefs = jnp.asarray(RNG.normal(size=k) * coef, jnp.float32)
    return zo.Update(jax.random.split(jax.random.key(int(RNG.integers(2**31))), k), coefs, jnp.float32(decay))


def exact(params, update, direction=zo.normal):
    """The formula in NumPy float64, with the same z."""
    ids = leaf_ids(params)
    coefs, decay = (np.asarray(cut12(x), np.float64) for x in (update.coefs, update.decay))
    out = {}
    for ident, (name, w) in zip(ids, sorted(params.items()), strict=True):
        w64 = np.asarray(w, np.float64)
        if name != "i":
            zs = (np.asarray(draw(direction, key, ident, w.shape), np.float64) for key in update.keys)
            w64 = w64 * (1 - (decay if w.ndim >= 2 else 0)) + sum(c * z for c, z in zip(coefs, zs, strict=True))
        out[name] = w64
    return out


@pytest.mark.parametrize("direction", [zo.normal, zo.rademacher])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_float32_against_float64(direction, k, decay):
    params, update = make_params(jnp.float32), make_update(k, decay=decay)
    moved = zo.apply_update(params, update, leaf_ids(params), direction=direction)
    for name, expected in exact(params, update, direction).items():
        np.testing.assert_allclose(moved[name], expected, rtol=3e-7, atol=3e-10 * k)
        assert moved[name].dtype == params[name].dtype
    assert np.mean(np.asarray(moved["m"]) != np.asarray(params["m"])) > 0.5
    np.testing.assert_array_equal(moved["i"], params["i"])


@pytest.mark.parametrize("direction", [zo.normal, zo.rademacher, zo.lowrank(2)])
@pytest.mark.parametrize("rounding", [zo.nearest, zo.stochastic])
def test_several_updates_from_one_read_equal_one_by_one(direction, rounding):
    params, sequence = make_params(jnp.bfloat16), [make_update(2, decay=0.1) for _ in range(3)]
    if direction.rank:
        sequence = [update._replace(keys=jnp.stack([update.keys] * 2, 1)) for update in sequence]
    stacked, ids = jax.tree.map(lambda *x: jnp.stack(x), *sequence), leaf_ids(params)
    step = jax.jit(updates.move, static_argnames=("direction", "rounding"))
    how, moved = {"direction": direction, "rounding": rounding}, params
    for count, update in enumerate(sequence):
        first = step(params, ids, stacked, count=jnp.int32(count), **how)[0]
        jax.tree.map(np.testing.assert_array_equal, first, moved)
        moved = step(moved, ids, update, **how)[0]
    jax.tree.map(np.testing.assert_array_equal, step(params, ids, stacked, **how)[0], moved)
    assert np.mean(np.asarray(moved["m"] != params["m"])) > 0.3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_nearest_is_the_float32_result_rounded_once(dtype):
    params, update = make_params(dtype), make_update(2, decay=0.1)
    wide = zo.apply_update(
        jax.tree.map(lambda w: w.astype(jnp.float32) if w.dtype == dtype else w, params), update, leaf_ids(params)
    )
    moved = zo.apply_update(params, update, leaf_ids(params), rounding=zo.nearest)
    for name in params:
        np.testing.assert_array_equal(moved[name], wide[name].astype(params[name].dtype))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_has_no_bias(dtype):
    """Means over 4096 updates reach the exact sum; round to nearest would lose most of a small step."""
    ids, w = np.array([5], np.uint32), jnp.asarray(RNG.normal(size=(40, 25)) * 0.02, dtype)

    def one(key):
        update = zo.Update(key[None], jnp.array([2e-6], jnp.float32), jnp.float32(0))
        return zo.apply_update(w, update, ids), perturb(w.astype(jnp.float32), key[None], update.coefs, ids)

    rounded, moved = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 4096))
    rounded, moved = np.asarray(rounded, np.float64), np.asarray(moved, np.float64)
    error = (rounded - moved).mean(axis=0) / ((rounded - moved).std(axis=0) / 64)  # in standard deviations
    assert np.abs(error).max() < 5.5 and abs(error.mean()) < 5 / np.sqrt(error.size)
    nearest = np.asarray(jnp.asarray(moved[0], jnp.float32).astype(dtype))
    assert np.mean(nearest != np.asarray(w)) < 0.3  # the updates are so small that round to nearest loses most


def test_stochastic_rounding_probability_bit_by_bit():
    """Every 16-bit uniform rounds one float32 between two bf16 or fp16 neighbours, normal, subnormal and huge."""
    noise = jnp.arange(65536, dtype=jnp.uint32)
    for dtype, values in {
        jnp.bfloat16: [1.00123, -3.7e-5, 2.5e-38, 0.0, 3.1e38, -1.5],
        jnp.float16: [1.00123, -3.7e-5, 5.0123e-8, 0.0, 60001.3, -6.1e-5, 7e-6],
    }.items():
        for value in np.array(values, np.float32):
            x = jnp.full(65536, value)
            rounded = np.asarray(updates.stochastic.apply(x, dtype, lambda: noise), np.float64)
            low, high = rounded.min(), rounded.max()
            assert low <= value <= high
            assert np.mean(rounded) == pytest.approx(
                float(value), rel=1e-6, abs=1e-9 if dtype == jnp.float16 else 1e-42
            )
            if low != high:
                neighbours = np.nextafter(np.asarray(low, dtype), np.asarray(np.inf, dtype))
                assert float(neighbours) == high


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_keeps_what_is_not_finite(value, dtype):
    x = updates.stochastic.apply(jnp.array([value], jnp.float32), dtype, lambda: jnp.array([65535], jnp.uint32))
    np.testing.assert_array_equal(np.asarray(x, np.float32), [value])


@pytest.mark.parametrize(("decay", "tolerance"), [(1e-7, 0.1), (3.3e-6, 0.02)])
def test_a_small_decay_is_not_lost(decay, tolerance):
    """1 - 1e-7 has no 12-bit neighbour but 1 - 2.4e-4: the decay must be kept as the fraction that goes."""
    w = jnp.asarray(RNG.normal(size=(300, 300)), jnp.float32)
    params = {"w": w}
    update = zo.Update(jax.random.split(jax.random.key(0), 1), jnp.zeros(1), jnp.float32(decay))
    moved = params
    for _ in range(50):
        moved = zo.apply_update(moved, update, leaf_ids(params))
    lost = float(np.sum((np.asarray(w, np.float64) - np.asarray(moved["w"], np.float64)) * np.asarray(w, np.float64)))
    assert lost / float(np.sum(np.asarray(w, np.float64) ** 2)) / 50 == pytest.approx(decay, rel=tolerance)


def test_decay_skips_vectors():
    params = {"m": jnp.ones((2, 2)), "v": jnp.ones(2)}
    update = zo.Update(jax.random.split(jax.random.key(0), 1), jnp.zeros(1), jnp.float32(0.5))
    moved = zo.apply_update(params, update, leaf_ids(params))
    assert moved["m"].tolist() == [[0.5, 0.5], [0.5, 0.5]] and moved["v"].tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    ("direction", "dtype"),
    [
        (zo.normal, jnp.float32),
        (zo.rademacher, jnp.bfloat16),
        pytest.param(zo.normal, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(zo.rademacher, jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_every_program_moves_every_bit_alike(dtype, direction):
    """Eager, op by op, jitted, fused into a larger program, in a scan, with donation, leaf by leaf."""
    params, ids = make_params(dtype), leaf_ids(make_params(dtype))
    updates_ = [make_update(2, decay=1e-3) for _ in range(2)]
    stacked = zo.Update(
        jnp.stack([u.keys for u in updates_]),
        jnp.stack([u.coefs for u in updates_]),
        jnp.stack([u.decay for u in updates_]),
    )

    def apply(p, update):
        return zo.apply_update(p, update, ids, direction=direction)

    def in_turn(f):
        p = jax.tree.map(jnp.copy, params)
        for update in updates_:
            p = f(p, update)
        return p

    reference = in_turn(apply)
    with jax.disable_jit():
        op_by_op = in_turn(apply)
    ways = {
        "op by op": op_by_op,
        "jit": in_turn(jax.jit(apply)),
        "donated": in_turn(jax.jit(apply, donate_argnums=0)),
        "one program of constants": jax.jit(in_turn, static_argnums=0)(apply),
        "fused with a loss": in_turn(
            jax.jit(lambda p, u: (lambda q: jax.tree.map(lambda w: w + 0 * w, q))(apply(p, u)))
        ),
        "scan": jax.jit(lambda p: jax.lax.scan(lambda q, u: (apply(q, u), None), p, stacked)[0])(params),
    }
    for way, moved in ways.items():
        for name in params:
            np.testing.assert_array_equal(moved[name], reference[name], err_msg=f"{way}: {name}")


def test_grouping_equal_leaves_changes_no_bit(monkeypatch):
    params, update = make_params(jnp.bfloat16), make_update(2)
    together = zo.apply_update(params, update, leaf_ids(params))
    monkeypatch.setattr(updates, "_SMALL_LEAF", 0)
    alone = zo.apply_update(params, update, leaf_ids(params))
    for name in params:
        np.testing.assert_array_equal(together[name], alone[name])


def test_a_probe_is_not_an_update_and_rounds_to_nearest():
    params = {"w": jnp.asarray(RNG.normal(size=(64, 64)) * 0.02, ml_dtypes.bfloat16)}
    keys, ids = jax.random.split(jax.random.key(8), 1), leaf_ids(params)
    probe = perturb(params, keys, jnp.array([1e-3]), ids)
    wide = np.asarray(params["w"], np.float32) + np.float32(cut12(jnp.float32(1e-3))) * np.asarray(
        draw(zo.normal, keys[0], ids[0], (64, 64))
    )
    np.testing.assert_array_equal(np.asarray(probe["w"]), wide.astype(ml_dtypes.bfloat16))


def test_zero_coefficients_change_nothing():
    for dtype in (jnp.float32, jnp.bfloat16):
        params, update = make_params(dtype), make_update(2)._replace(coefs=jnp.zeros(2))
        moved = zo.apply_update(params, update, leaf_ids(params))
        for name in params:
            np.testing.assert_array_equal(moved[name], params[name])


def test_leaves_in_host_memory_move_like_any():
    """Equal leaves, one of them in host memory; as operations one by one, and in a program."""
    params, update = make_params(jnp.bfloat16), make_update(2, decay=0.1)
    hosted = {name: w for name, w in params.items() if name in ("m", "v", "i", "e", "s")}
    hosted = jax.device_put(hosted, jax.tree.map(lambda w: w.sharding.with_memory_kind("pinned_host"), hosted))
    mixed, ids, keys = params | hosted, leaf_ids(params), jax.random.split(jax.random.key(8), 2)
    moved = zo.apply_update(params, update, ids)
    probe = perturb(params, keys, jnp.array([1e-2, 2e-2]), ids)
    for way in (lambda f: f, jax.jit):
        ours = way(lambda p: zo.apply_update(p, update, ids))(mixed)
        probed = way(lambda p: perturb(p, keys, jnp.array([1e-2, 2e-2]), ids))(mixed)
        for name in params:
            np.testing.assert_array_equal(ours[name], moved[name])
            np.testing.assert_array_equal(probed[name], probe[name])
            assert jax.typeof(ours[name]).memory_space == jax.typeof(mixed[name]).memory_space
            assert jax.typeof(probed[name]).memory_space == jax.memory.Space.Device
