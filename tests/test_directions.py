"""Addresses: what z depends on, what it does not, and that it is noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from pallas_kernels import bits
from zo2jax.directions import check_key, draw, expand, factors, lowrank, normal, rademacher, step_keys
from zo2jax.leaves import leaf_id, leaf_ids, leaf_name

KEY = jax.random.key(91)


def z(direction=normal, *, key=KEY, step=0, k=0, leaf="w", shape=(1000, 999)) -> np.ndarray:
    keys = step_keys(key, jnp.uint32(step), k + 1, direction)
    return np.asarray(draw(direction, keys[k], np.uint32(leaf_id(leaf)), shape), np.float64)


def test_moments_and_distribution_of_normal():
    sample = z(shape=(4000, 1001)).ravel()
    n = sample.size
    assert abs(sample.mean()) < 5 / np.sqrt(n)
    assert sample.var() == pytest.approx(1 - 2 * 0.72 * 2.0**-11, abs=5 * np.sqrt(2 / n))
    assert (sample**3).mean() == pytest.approx(0, abs=5 * np.sqrt(15 / n))
    assert (sample**4).mean() == pytest.approx(3, abs=5 * np.sqrt(96 / n) + 0.005)
    assert stats.kstest(sample, "norm").statistic < 1.63 / np.sqrt(n) + 2.0**-11
    for bound in (2.0, 3.0, 4.0):
        expected = 2 * stats.norm.sf(bound)
        assert (np.abs(sample) > bound).mean() == pytest.approx(
            expected, abs=5 * np.sqrt(expected / n) + 4e-3 * expected
        )


def test_rademacher_is_even_signs():
    sample = z(rademacher).ravel()
    assert set(np.unique(sample)) == {-1.0, 1.0}
    assert abs(sample.mean()) < 5 / np.sqrt(sample.size)


@pytest.mark.parametrize("direction", [normal, rademacher])
@pytest.mark.parametrize(
    "other", [{"leaf": "v"}, {"step": 1}, {"k": 1}, {"key": jax.random.key(92)}, {"step": 2**31}, {"leaf": "w2"}]
)
def test_other_addresses_are_uncorrelated(direction, other):
    a, b = z(direction), z(direction, **other)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)
    assert np.mean(a == b) < (0.51 if direction is rademacher else 0.01)


@pytest.mark.parametrize(("direction", "power"), [(normal, 1), (normal, 2), (rademacher, 1)])
@pytest.mark.parametrize("lag", [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1)])
def test_neighbouring_elements_are_uncorrelated(direction, lag, power):
    sample = z(direction) ** power
    rows, columns = lag
    a, b = sample[: -rows or None, : -columns or None], sample[rows:, columns:]
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


def test_rows_alone_equal_rows_of_the_whole():
    shape, ident = (50, 37), np.uint32(leaf_id("embed.weight"))
    rows = jnp.asarray(np.random.default_rng(5).integers(0, 50, (23,)))
    whole = draw(normal, KEY, ident, shape)
    np.testing.assert_array_equal(jax.jit(lambda r: draw(normal, KEY, ident, shape, rows=r))(rows), whole[rows])


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 0), (2, 3, 5), (1, 1, 1)])
def test_every_shape(shape):
    assert draw(normal, KEY, np.uint32(1), shape).shape == shape


def test_leaf_ids_are_data_of_one_program():
    traces = []

    @jax.jit
    def program(ident):
        traces.append(1)
        return draw(normal, KEY, ident, (4, 4))

    a, b = program(np.uint32(1)), program(np.uint32(2))
    assert len(traces) == 1 and not np.array_equal(a, b)


def test_names_of_nnx_leaves_are_those_of_plain_dictionaries():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    names = {leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert names == {"kernel", "bias"}
    np.testing.assert_array_equal(leaf_ids(state), leaf_ids(nnx.to_pure_dict(state)))


def test_colliding_leaf_ids_are_refused(monkeypatch):
    monkeypatch.setattr("zo2jax.leaves.leaf_id", lambda name: 7)
    with pytest.raises(ValueError, match=r"'a' and 'b' have the same id 0x00000007"):
        leaf_ids({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)})


def test_equal_names_are_refused():
    """A dotted key and a nested one give the same name, and would share one z."""
    with pytest.raises(ValueError, match=r"'a\.b' and 'a\.b' have the same id"):
        leaf_ids({"a": {"b": np.zeros(2, np.float32)}, "a.b": np.zeros(2, np.float32)})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": np.zeros(2)}, "leaf 'w' is float64"),
        ({"w": np.zeros(2, np.complex64)}, "leaf 'w' is complex64"),
        ({"w": 1.0}, "leaf 'w' is a Python float"),
    ],
)
def test_leaves_of_other_types_are_refused(params, message):
    with pytest.raises(TypeError, match=message):
        leaf_ids(params)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        leaf_ids({"steps": np.zeros(2, np.int32)})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (jax.random.key(0, impl="rbg"), "generator 'rbg'"),
        (jax.random.key(0, impl="unsafe_rbg"), "generator 'unsafe_rbg'"),
        (jax.random.split(jax.random.key(0), 3), r"shape \(3,\)"),
        (np.zeros(4, np.uint32), r"uint32\[4\]"),
        (np.int32(0), r"int32\[\]"),
    ],
)
def test_other_keys_are_refused(key, message):
    with pytest.raises(ValueError, match=message):
        check_key(key)


def test_the_default_generator_does_not_matter():
    with jax.default_prng_impl("rbg"), pytest.raises(ValueError, match="generator 'rbg'"):
        check_key(jax.random.key(0))


@pytest.mark.parametrize(("rank", "shape"), [(1, (7, 5)), (2, (33, 12)), (3, (2, 4, 9)), (8, (5, 1))])
def test_a_low_rank_z_is_the_product_of_its_factors(rank, shape):
    direction = lowrank(rank, refresh=4)
    keys = jax.vmap(bits.fold, in_axes=(0, None))(
        jax.random.key_data(step_keys(KEY, 6, 1, direction)[0]), np.uint32(leaf_id("w"))
    )
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    u, v = (np.asarray(x, np.float64) for x in factors(direction, keys, (rows, columns)))
    got = z(direction, step=6, shape=shape)
    np.testing.assert_allclose(got.reshape(rows, columns), u @ v.T, rtol=0, atol=rank * 2.0**-20)
    assert (v == np.asarray(jnp.asarray(v, jnp.bfloat16), np.float64)).all()
    assert np.linalg.matrix_rank(got.reshape(rows, columns), tol=1e-4) == min(rank, rows, columns)
    some = draw(direction, step_keys(KEY, 6, 1, direction)[0], np.uint32(leaf_id("w")), shape, rows=jnp.array([1, 0]))
    np.testing.assert_array_equal(np.asarray(some, np.float64), got.reshape(rows, columns)[[1, 0]])


def test_u_is_new_each_step_and_v_each_period():
    direction = lowrank(1, refresh=3)
    spans = [z(direction, step=step, shape=(4, 50)) for step in range(6)]
    rows = [x[0] / np.linalg.norm(x[0]) for x in spans]
    same = np.abs(np.array(rows) @ np.array(rows).T) > 0.999
    assert (same == np.kron(np.eye(2), np.ones((3, 3)))).all()
    columns = [x[:, 0] / np.linalg.norm(x[:, 0]) for x in spans]
    assert (np.abs(np.array(columns) @ np.array(columns).T - np.eye(6)) < 0.9999).all()
    for other in ({"leaf": "v"}, {"key": jax.random.key(92)}):  # another leaf, another run: another V
        assert abs(rows[0] @ z(direction, shape=(4, 50), **other)[0]) < 0.6 * np.linalg.norm(
            z(direction, shape=(4, 50), **other)[0]
        )


def test_vectors_take_the_dense_z():
    np.testing.assert_array_equal(z(lowrank(2), shape=(101,)), z(normal, shape=(101,)))


def test_sums_over_the_rank_are_the_same_bits_in_any_program():
    rng = np.random.default_rng(4)
    p = jnp.asarray(rng.normal(size=(300, 3)), jnp.float32)  # all 24 bits
    v, w = bits.cut12(jnp.asarray(rng.normal(size=(200, 3)), jnp.float32)), jnp.ones((300, 200))
    with jax.disable_jit():
        expected = w + expand(p, v)
    np.testing.assert_array_equal(jax.jit(lambda w: w + expand(p, v))(w), expected)
    np.testing.assert_allclose(expand(p, v), np.asarray(p, np.float64) @ np.asarray(v, np.float64).T, atol=2e-6)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_low_rank_estimate_has_no_bias_and_the_variance_of_its_formula(rank):
    """On a quadratic, whose two-point g is exactly <G, Z>: E <G, Z>^2 / |G|^2 = 1.

    With t = tr((G^T G)^2) / |G|^4 (each of the rank terms u^T G v has the fourth moment 3 |G|^4 (1 + 2 t)), the
    variance is 2 + 6 t / rank; that of a dense normal z is 2.
    """
    draws, shape = 100_000, (6, 5)
    gradient = np.random.default_rng(5).normal(size=shape)
    direction = lowrank(rank, refresh=1)

    @jax.jit
    def along(step):
        one = draw(direction, step_keys(KEY, step, 1, direction)[0], np.uint32(7), shape)
        return jnp.sum(one * jnp.asarray(gradient, jnp.float32))

    products = np.asarray(jax.lax.map(along, jnp.arange(draws, dtype=jnp.uint32), batch_size=1000), np.float64)
    sample = products**2 / np.sum(gradient**2)
    t = np.trace(np.linalg.matrix_power(gradient.T @ gradient, 2)) / np.sum(gradient**2) ** 2
    assert sample.mean() == pytest.approx(1, abs=0.02)
    assert sample.var() == pytest.approx(2 + 6 * t / rank, rel=0.15)


@pytest.mark.parametrize(("arguments", "message"), [((0,), "rank is 0, expected 1 to 64"), ((2, 0), "refresh is 0")])
def test_low_rank_directions_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        lowrank(*arguments)
