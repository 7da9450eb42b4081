"""The generator against published vectors, jax's own threefry, float64, and statistics."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from pallas_kernels import bits

RNG = np.random.default_rng(20240607)
ALL_RADII = np.arange(65536, dtype=np.uint32) << 16
ALL_ANGLES = np.arange(65536, dtype=np.uint32)


def u32(*values: int) -> list[jax.Array]:
    return [jnp.array([v], jnp.uint32) for v in values]


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # known answers of Random123's kat_vectors for threefry2x32, 20 rounds
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_published_vectors(key, counter, expected):
    words = bits.threefry2x32(*u32(*key), *u32(*counter))
    assert tuple(int(w[0]) for w in words) == expected


@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 5, 11)])
def test_words_equal_jax(shape):
    key = jnp.asarray(RNG.integers(0, 2**32, 2, dtype=np.uint32))
    x0, x1 = (jnp.asarray(RNG.integers(0, 2**32, shape, dtype=np.uint32)) for _ in range(2))
    ours = bits.threefry2x32(key[0], key[1], x0, x1)
    theirs = threefry_2x32(key, jnp.concatenate([x0.ravel(), x1.ravel()]))
    np.testing.assert_array_equal(np.concatenate([np.ravel(w) for w in ours]), theirs)


@pytest.mark.parametrize("data", [0, 1, 2**31, 2**32 - 1])
def test_fold_equals_jax(data):
    key = jax.random.key(int(RNG.integers(2**31)))
    folded = bits.fold(jax.random.key_data(key), jnp.uint32(data))
    np.testing.assert_array_equal(folded, jax.random.key_data(jax.random.fold_in(key, np.uint32(data))))


def float64_pair(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box-Muller as the docstring states it, with library functions in float64."""
    radius = np.sqrt(-2 * np.log(((words >> 16) + 0.5) / 65536))
    offset = ((words & 0x3FFF) + 0.5) / 2**14 * 2 - 1
    cosine = np.cos(np.pi / 4 * offset) * np.where(words & (1 << 14), -1, 1)
    sine = np.sin(np.pi / 4 * offset)
    swap = (words & (1 << 15)) != 0
    return radius * np.where(swap, sine, cosine), radius * np.where(swap, cosine, sine)


@pytest.mark.parametrize("words", [ALL_RADII, ALL_ANGLES, RNG.integers(0, 2**32, 10**6, dtype=np.uint32)])
def test_normal_pair_against_float64(words):
    """The error is below two units of the 12th bit: one for the cut of the radius, one for that of z."""
    for ours, exact in zip(bits.normal_pair(jnp.asarray(words)), float64_pair(words), strict=True):
        error = np.abs(np.asarray(ours, np.float64) / exact - 1)
        assert error.max() < 2 * 2.0**-11 + 2.0**-15


def test_every_angle_is_on_the_circle_and_even():
    x, y = (np.asarray(v, np.float64) for v in bits.normal_pair(jnp.asarray(ALL_ANGLES | (1 << 31))))
    angles = np.sort(np.arctan2(y, x))
    np.testing.assert_allclose(np.diff(angles), 2 * np.pi / 65536, atol=1.1e-3)
    np.testing.assert_allclose(np.hypot(x, y), np.sqrt(-2 * np.log(0.5)), rtol=8e-4)


def test_values_have_12_bits_and_stay_within_the_stated_bound():
    for z in bits.normal_pair(jnp.asarray(np.concatenate([ALL_RADII, ALL_ANGLES]))):
        assert not (np.asarray(z).view(np.uint32) & 0xFFF).any()
        assert np.abs(z).max() < 4.86


def test_the_bits_are_those_of_every_other_version():
    """One hash for all platforms: a change of one bit of the generator breaks replay of every journal."""
    digest = hashlib.sha256()
    for words in (ALL_RADII, ALL_ANGLES, np.arange(2**20, dtype=np.uint32) * np.uint32(2654435761)):
        for z in jax.jit(bits.normal_pair)(jnp.asarray(words)):
            digest.update(np.asarray(z).tobytes())
    assert digest.hexdigest() == "1779b369b922fd02b67d612ac4129c25ef58ac55753c88282663ab792099f55c"


def test_eager_jit_vmap_and_scan_agree_in_every_bit():
    key, rows = jnp.asarray(RNG.integers(0, 2**32, (5, 2), dtype=np.uint32)), jnp.arange(67, dtype=jnp.uint32)

    coef = bits.cut12(jnp.float32(0.123))

    def noisy(k: jax.Array) -> jax.Array:  # inside a sum, where a fused multiply-add would show
        return 1.0 + coef * bits.draw(bits.normal_pair, k, rows, 33)

    with jax.disable_jit():
        eager = np.stack([noisy(k) for k in key])
    np.testing.assert_array_equal(eager, np.stack([jax.jit(noisy)(k) for k in key]))
    z = np.stack([bits.draw(bits.normal_pair, k, rows, 33) for k in key])
    for transformed in (
        jax.vmap(lambda k: bits.draw(bits.normal_pair, k, rows, 33))(key),
        jax.lax.map(lambda k: bits.draw(bits.normal_pair, k, rows, 33), key),
    ):
        np.testing.assert_array_equal(z, transformed)


@pytest.mark.parametrize("pair", [bits.normal_pair, bits.rademacher_pair, bits.uniform16_pair])
@pytest.mark.parametrize(("n_rows", "columns"), [(1, 1), (3, 2), (5, 4), (4, 7), (9, 130)])
def test_any_rows_and_any_width_are_the_same_noise(pair, n_rows, columns):
    key = jnp.asarray(RNG.integers(0, 2**32, 2, dtype=np.uint32))
    whole = np.asarray(bits.draw(pair, key, jnp.arange(n_rows, dtype=jnp.uint32), 132))
    rows = RNG.permutation(n_rows)[: max(1, n_rows // 2)].astype(np.uint32)
    np.testing.assert_array_equal(bits.draw(pair, key, jnp.asarray(rows), columns), whole[rows, :columns])


def test_draw_is_made_of_threefry_words():
    """Column c of row r is half c % 2 of word (c % 4) // 2 of the counter (r, c // 4)."""
    key = jnp.asarray([11, 22], jnp.uint32)
    drawn = bits.draw(bits.uniform16_pair, key, jnp.arange(2, 5, dtype=jnp.uint32), 9, stream=bits.ROUNDING_STREAM)
    for r in range(3):
        for c in range(9):
            word = threefry_2x32(key, jnp.array([r + 2, c // 4 + 2**31], jnp.uint32))[(c % 4) // 2]
            assert int(drawn[r, c]) == int(word) >> (16 * (1 - c % 2)) & 0xFFFF


def test_cut12_products_are_exact():
    wide = (RNG.normal(size=10**5) * 10.0 ** RNG.integers(-8, 8, 10**5) for _ in range(2))
    a, b = (np.asarray(bits.cut12(jnp.asarray(x, jnp.float32))) for x in wide)
    np.testing.assert_array_equal((a * b).astype(np.float64), a.astype(np.float64) * b.astype(np.float64))
    assert float(bits.cut12(jnp.float32(-3.14159274))) == -3.140625
