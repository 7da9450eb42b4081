"""Probe matrices, and the maps from losses to coefficients."""

import jax.numpy as jnp
import numpy as np
import pytest

import zo2jax as zo

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_two_point_is_the_central_difference():
    estimator = zo.two_point(1e-3)
    eps = float(estimator.probes[0, 0])
    assert abs(eps / 1e-3 - 1) < 2.0**-11 and estimator.probes.tolist() == [[eps], [-eps]]
    g = estimator.coefficients(jnp.array([2.5, 2.25], jnp.float32))
    assert g.dtype == jnp.float32 and float(g[0]) == pytest.approx(0.25 / (2 * eps), rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_averaged_is_the_mean_of_copies(n):
    one, many = zo.two_point(0.01), zo.averaged(zo.two_point(0.01), n)
    losses = np.random.default_rng(n).normal(size=(n, 2)).astype(np.float32)
    expected = [float(one.coefficients(jnp.asarray(pair))[0]) / n for pair in losses]
    np.testing.assert_allclose(many.coefficients(jnp.asarray(losses.ravel())), expected, rtol=1e-6)
    for k in range(n):  # copy k perturbs direction k alone
        block = np.zeros((2, n), np.float32)
        block[:, k] = one.probes[:, 0]
        np.testing.assert_array_equal(many.probes[2 * k : 2 * k + 2], block)


def test_averaging_composes():
    nested, flat = zo.averaged(zo.averaged(zo.two_point(0.01), 2), 3), zo.averaged(zo.two_point(0.01), 6)
    losses = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)
    np.testing.assert_array_equal(nested.probes, flat.probes)
    np.testing.assert_allclose(nested.coefficients(losses), flat.coefficients(losses), rtol=1e-6)


def test_sparse_probes_are_the_probe_matrix():
    rng = np.random.default_rng(3)
    dense = rng.normal(size=(6, 5)) * (rng.random((6, 5)) < 0.4)
    dense[2] = 0  # the unperturbed member of a one-sided estimator
    estimator = zo.Estimator("test", dense, lambda losses: losses)
    indices, values = estimator.sparse_probes()
    back = np.zeros_like(estimator.probes)
    np.add.at(back, (np.arange(6)[:, None], indices), values)
    np.testing.assert_array_equal(back, estimator.probes)
    assert indices.shape[1] == (dense != 0).sum(axis=1).max()


@pytest.mark.parametrize("eps", [0, -1e-3, float("nan"), float("inf"), 1e-40])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match="eps is"):
        zo.two_point(eps)


@pytest.mark.parametrize("make", [zo.one_sided, zo.leave_one_out])
def test_too_few_directions(make):
    with pytest.raises(ValueError, match="n is 1, expected at least 2 directions"):
        make(1, 1e-3)
    with pytest.raises(ValueError, match=r"eps is -0\.1"):
        make(2, -0.1)


def test_bad_copies_and_bad_matrix():
    with pytest.raises(ValueError, match="n is 0"):
        zo.averaged(zo.two_point(1e-3), 0)
    with pytest.raises(ValueError, match="finite matrix"):
        zo.Estimator("test", np.array([[np.nan]]), lambda losses: losses)


def test_names_say_what_they_are():
    assert str(zo.averaged(zo.two_point(0.5, direction=zo.rademacher), 2)) == (
        "averaged(two_point(0.5, direction=rademacher), 2)"
    )
