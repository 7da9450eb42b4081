"""The generator against published vectors, jax's own threefry, float64, and statistics."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from scipy import stats

from pallas_kernels import bits

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(20240607)
ALL_RADII = np.arange(65536, dtype=np.uint32) << 16
ALL_ANGLES = np.arange(65536, dtype=np.uint32)
RADIUS_MARGIN, CIRCLE_MARGIN = 1.62e-7, 4.3e-7


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


def circle(words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scaled radius, the cosine and the sine that the docstring of `bits.normal_pair` states, in float64."""
    radius = bits.RADIUS_SCALE * np.sqrt(-2 * np.log(((words >> 16) + 0.5) / 65536))
    angle = (words & 0xFFFF).astype(np.uint16).view(np.int16) * (2 * np.pi / 65536)
    return radius, np.cos(angle), np.sin(angle)


def exact_pair(words: np.ndarray, errors: tuple[float, float] = (0, 0)) -> tuple[np.ndarray, np.ndarray]:
    """Both values of each word by library functions in float64, the radius and the circle off by relative errors."""
    radius, *point = circle(words)
    radius = np.rint(radius * (1 + errors[0]) * 2**9) / 2**9
    scaled = (np.rint(x * (1 + errors[1]) * np.float64(np.float32(0.8551145)) * 2**10) / 2**10 for x in point)
    first, second = ((radius * x).astype(np.float32).view(np.uint32) & np.uint32(0xFFFFF000) for x in scaled)
    return first.view(np.float32), second.view(np.float32)


def assert_equal(ours, expected):
    for a, b in zip(ours, expected, strict=True):  # zero is +0, which a library's sin(pi) is not
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("words", [ALL_RADII, ALL_ANGLES, RNG.integers(0, 2**32, 10**6, dtype=np.uint32)])
def test_normal_pair_is_float64_on_its_grids(words):
    """Exactly, for every radius and every angle, eager and fused."""
    expected = exact_pair(words)
    assert_equal(jax.jit(bits.normal_pair)(jnp.asarray(words)), expected)
    with jax.disable_jit():
        assert_equal(bits.normal_pair(jnp.asarray(words)), expected)


def in_float64(x, grid):
    return np.rint(x / grid) * grid


@pytest.mark.parametrize("snap", [bits._snap, in_float64])
def test_box_muller_is_the_stated_rounding(snap):
    for words in (ALL_RADII, ALL_ANGLES):
        inputs = circle(words) if snap is in_float64 else (jnp.asarray(x, jnp.float32) for x in circle(words))
        assert_equal(bits.box_muller(*inputs, snap), exact_pair(words))


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_small_errors_of_radius_and_circle_change_nothing(signs):
    """The margin that makes z the same everywhere: relative errors up to these, whatever evaluates them."""
    errors = (signs[0] * RADIUS_MARGIN, signs[1] * CIRCLE_MARGIN)
    for words in (ALL_RADII, ALL_ANGLES):
        assert_equal(exact_pair(words, errors), exact_pair(words))
        radius, cosine, sine = circle(words)
        moved = (radius * (1 + errors[0]), cosine * (1 + errors[1]), sine * (1 + errors[1]))
        assert_equal(bits.box_muller(*moved, in_float64), exact_pair(words))


def test_few_radii_have_the_smallest_margin():
    """Of 65536 radii, 4 have a relative margin below 2e-7; none less than one unit of the last place."""
    radius = circle(ALL_RADII)[0]
    margin = np.abs(radius * 2**9 % 1 - 0.5) / 2**9 / radius
    assert [int((margin < bound).sum()) for bound in (RADIUS_MARGIN, 2e-7)] == [0, 4]


def test_every_angle_is_on_the_circle_and_even():
    x, y = (np.asarray(v, np.float64) for v in bits.normal_pair(jnp.asarray(ALL_ANGLES | (1 << 31))))
    angles = np.unwrap(np.arctan2(y, x))
    np.testing.assert_allclose(angles, np.arange(65536) * 2 * np.pi / 65536, atol=1.2e-3)
    np.testing.assert_allclose(np.hypot(x, y), np.sqrt(-2 * np.log(0.5)), rtol=2e-3)


def test_opposite_angles_are_opposite_values():
    """No bias, not even of rounding: the circle is symmetric in every bit."""
    words = RNG.integers(0, 2**32, 10**5, dtype=np.uint32)
    for z, opposite in zip(bits.normal_pair(words), bits.normal_pair(words ^ np.uint32(1 << 15)), strict=True):
        np.testing.assert_array_equal(z, -opposite)


def test_values_have_12_bits_and_stay_within_the_stated_bound():
    for z in bits.normal_pair(jnp.asarray(np.concatenate([ALL_RADII, ALL_ANGLES]))):
        assert not (np.asarray(z).view(np.uint32) & 0xFFF).any()
        assert np.abs(z).max() <= 4.8554688
    assert float(bits.normal_pair(jnp.uint32(0))[0]) == np.float32(4.8554688)


def test_normal_moments():
    """Over words that hold every radius and every angle equally often, so that the sampling error is small."""
    words = np.concatenate([ALL_RADII | RNG.permutation(ALL_ANGLES) for _ in range(64)])
    z = np.concatenate(jax.jit(bits.normal_pair)(jnp.asarray(words))).astype(np.float64)
    assert abs(z.mean()) < 5 / np.sqrt(z.size) and abs((z**3).mean()) < 5 * np.sqrt(15 / z.size)
    assert z.var() == pytest.approx(0.99993, abs=1e-5)
    assert (z**4).mean() == pytest.approx(3, abs=4e-3)
    assert (z == 0).mean() == pytest.approx(3.36e-4, rel=0.05)


def test_normal_distribution():
    words = RNG.integers(0, 2**32, 5 * 10**5, dtype=np.uint32)
    z = np.concatenate(jax.jit(bits.normal_pair)(jnp.asarray(words))).astype(np.float64)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    for bound in (1.0, 2.0, 3.0, 4.0):
        expected = 2 * stats.norm.sf(bound)
        assert (np.abs(z) > bound).mean() == pytest.approx(expected, abs=5 * np.sqrt(expected / z.size))


def test_the_bits_are_those_of_every_other_version():
    """One hash for all platforms: a change of one bit of the generator breaks replay of every journal."""
    digest = hashlib.sha256()
    for words in (ALL_RADII, ALL_ANGLES, np.arange(2**20, dtype=np.uint32) * np.uint32(2654435761)):
        for z in jax.jit(bits.normal_pair)(jnp.asarray(words)):
            digest.update(np.asarray(z).tobytes())
    assert digest.hexdigest() == "b5d6355cf8077c5815c8eb35d086711bdc530622c0865a7b9e1b5206f46cafc0"


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


@pytest.mark.parametrize("pair", [bits.normal_pair, bits.rademacher_pair, bits.rounding_pair])
@pytest.mark.parametrize(("n_rows", "columns"), [(1, 1), (3, 2), (5, 4), (4, 7), (9, 130)])
def test_any_rows_and_any_width_are_the_same_noise(pair, n_rows, columns):
    key = jnp.asarray(RNG.integers(0, 2**32, 2, dtype=np.uint32))
    draw = jax.jit(bits.draw, static_argnums=(0, 3))
    whole = np.asarray(draw(pair, key, jnp.arange(n_rows, dtype=jnp.uint32), 132))
    rows = RNG.permutation(n_rows)[: max(1, n_rows // 2)].astype(np.uint32)
    np.testing.assert_array_equal(draw(pair, key, jnp.asarray(rows), columns), whole[rows, :columns])


def test_draw_is_made_of_threefry_words():
    """Column c of row r is half c % 2 of word (c % 4) // 2 of the counter (r, c // 4)."""
    key = jnp.asarray([11, 22], jnp.uint32)
    drawn = bits.draw(bits.uniform16_pair, key, jnp.arange(2, 5, dtype=jnp.uint32), 9)
    for r in range(3):
        for c in range(9):
            word = threefry_2x32(key, jnp.array([r + 2, c // 4], jnp.uint32))[(c % 4) // 2]
            assert int(drawn[r, c]) == int(word) >> (16 * (1 - c % 2)) & 0xFFFF


def test_rounding_is_not_correlated_with_the_direction():
    """The bits of stochastic rounding come from the words of z, mixed."""
    words = jnp.arange(2**22, dtype=jnp.uint32) * np.uint32(1024) + np.uint32(77)
    z = np.stack(jax.jit(bits.normal_pair)(words)).astype(np.float64)
    noise = (np.stack(jax.jit(bits.rounding_pair)(words)).astype(np.float64) + 0.5) / 65536 - 0.5
    limit = 4.5 / 2**11  # standard deviations of a mean over 2**22
    for a in (z, z**2 - 1, np.abs(z) - np.abs(z).mean(), np.sign(z)):
        for b in (noise, noise[::-1]):
            assert np.all(np.abs(np.mean(a * b, axis=1)) < limit * np.sqrt(np.mean(a**2) / 12))
    assert np.all(np.abs(noise.mean(axis=1)) < limit / np.sqrt(12)) and abs(np.mean(noise**2) - 1 / 12) < limit
    for half in (words >> np.uint32(16), words & np.uint32(0xFFFF)):  # the radius and the angle, in sixteen parts each
        parts = np.asarray(half) >> 12
        for row in noise:
            counts = np.histogram2d(parts, row, bins=(16, 16), range=((0, 16), (-0.5, 0.5)))[0]
            counts = counts[counts.sum(axis=1) > 0]
            expected = counts.sum(axis=1, keepdims=True) / 16
            assert np.sum((counts - expected) ** 2 / expected) < counts.size + 5 * np.sqrt(2 * counts.size)


def test_rounding_bits_are_those_of_murmurhash3():
    """fmix32 in Python integers, as published (Appleby, MurmurHash3.cpp)."""
    for word in [0, 1, 0x12345678, 0xFFFFFFFF, *RNG.integers(0, 2**32, 50).tolist()]:
        h = word ^ (word >> 16)
        h = h * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        h ^= h >> 16
        assert [int(x) for x in bits.rounding_pair(jnp.uint32(word))] == [h >> 16, h & 0xFFFF]


def test_cut12_products_are_exact():
    wide = (RNG.normal(size=10**5) * 10.0 ** RNG.integers(-8, 8, 10**5) for _ in range(2))
    a, b = (np.asarray(bits.cut12(jnp.asarray(x, jnp.float32))) for x in wide)
    np.testing.assert_array_equal((a * b).astype(np.float64), a.astype(np.float64) * b.astype(np.float64))
    assert float(bits.cut12(jnp.float32(-3.14159274))) == -3.140625
