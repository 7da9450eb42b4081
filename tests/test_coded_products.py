"""Products with matrices of codes whose activations become int8 too (`zo2jax.models.quantized.times_int8`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zo2jax as zo
from pallas_kernels.quantized import decode, quantize
from zo2jax.models.llama import LlamaConfig
from zo2jax.models.quantized import times, times_int8

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(71)


def rounded(x: np.ndarray) -> np.ndarray:
    """Rows as int8 codes times their scale, by NumPy."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)) * scale


@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(7, 36, 5), (1, 260, 130)])
def test_members_share_the_error_of_the_first(rows, n_in, n_out):
    w = quantize(jnp.asarray(RNG.normal(size=(n_out, n_in)), jnp.float32), 8)
    exact = np.asarray(decode(w, jnp.float32), np.float64).T
    x = RNG.normal(size=(1, 2, rows, n_in)) + 1e-3 * RNG.normal(size=(3, 2, rows, n_in))
    x = x.astype(np.float32)
    y = np.asarray(jax.jit(jax.vmap(times_int8, in_axes=(0, None, None)))(x, *w))
    first = rounded(x[0].astype(np.float64)) @ exact
    expected = np.stack([first, *(first + rounded((x[m] - x[0]).astype(np.float64)) @ exact for m in (1, 2))])
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-5)
    np.testing.assert_array_equal(y[0], times(jnp.asarray(x[0]), w, jnp.float32, "int8"))
    apart = np.abs((y[1] - y[0]) - (x[1] - x[0]) @ exact).max()
    assert apart < 0.02 * np.abs((x[1] - x[0]) @ exact).max(), "not in proportion to the difference"


def test_projected_gradients_in_int8_are_those_of_the_decoded_codes(tmp_path):
    config = LlamaConfig(vocabulary=97, size=32, hidden=56, layers=1, heads=4, kv_heads=2, head_size=8, context=32)
    model = config.init(jax.random.key(0))
    ids = RNG.integers(0, 97, (8, 4, 24)).astype(np.int32)
    estimator, found = zo.two_point(1e-3, direction=zo.lowrank(2, refresh=None)), []
    for compute in ("bf16", "int8"):
        coded = model.with_format(zo.int8(compute=compute))
        with zo.Run(coded, estimator, zo.sgd(0.0), directory=tmp_path / compute, key=jax.random.key(1)) as run:
            infos = [run.step({"ids": x, "targets": np.roll(x, -1, 1)}) for x in ids]
            found.append(([float(info.projected_gradient[0]) for info in infos], float(infos[0].loss)))
    (exact, loss), (gradients, coded_loss) = found
    assert abs(coded_loss / loss - 1) < 2e-3 and coded_loss != loss
    assert np.corrcoef(exact, gradients)[0, 1] > 0.99


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zo.int8(compute="fp8"), "compute is 'fp8', expected 'bf16' or 'int8'"),
        (
            lambda: zo.int8("group", compute="int8"),
            r"compute is int8 with int8\('group', group=128\): expected int8 with",
        ),
        (
            lambda: zo.formats.named("int4", compute="int8"),
            r"compute is int8 with int4\(group=64\): expected int8 with",
        ),
    ],
)
def test_what_has_no_int8_product_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
