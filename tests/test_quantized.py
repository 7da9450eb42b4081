"""int8 and int4 codes: against NumPy in every bit, kernels against XLA, and lowered for CUDA."""

import importlib
import itertools
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from kernel_marks import DTYPES, KERNELS, NEEDS_KERNELS, ON_GPU, each_implementation

from pallas_kernels import implementations, quantized_reference, specs
from pallas_kernels import quantized as q
from pallas_kernels.quantized import Codes

RNG = np.random.default_rng(20251207)
QMAX = {8: 127, 4: 7}
each_kernel = pytest.mark.parametrize("implementation", KERNELS)


def weights(shape, dtype=jnp.float32, scale=0.02):
    return jnp.asarray(RNG.normal(size=shape) * scale, dtype)


def random_codes(bits, shape, group):
    """Any codes, -128 and -8 among them, and scales of every size."""
    rows, columns = shape
    values = RNG.integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8)
    scale = 10.0 ** RNG.uniform(-9, 3, (rows, columns // (group or columns)))
    return Codes(jnp.asarray(values.view(np.int8) if bits == 8 else values), jnp.asarray(scale, jnp.float32))


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_array_equal(*(np.asarray(v).view(f"u{v.dtype.itemsize}") for v in (x, y)))


# --- the definition, in NumPy -----------------------------------------------------------------------------------------


def expected_codes(w, bits, group):
    """Codes (int64, unpacked) and scales: quotients by float64, rounded where the definition says so."""
    w = np.asarray(w, np.float64)
    groups = w.reshape(w.shape[0], -1, group or w.shape[1])
    absmax = np.abs(groups).max(axis=2)
    scale = (absmax * float(np.float32(1 / QMAX[bits]))).astype(np.float32)
    scale[scale < 2.0**-100] = 1
    inverse = (1 / scale.astype(np.float64)).astype(np.float32).astype(np.float64)
    codes = np.rint((groups * inverse[:, :, None]).astype(np.float32)).astype(np.int64)
    assert np.abs(codes).max(initial=0) <= QMAX[bits]
    return codes.reshape(w.shape), scale


def unpacked(codes):
    """The codes of a `Codes`, int64 [n_out, n_in], a byte at a time."""
    values = np.asarray(codes.codes)
    if values.dtype == np.int8:
        return values.astype(np.int64)
    nibbles = [[[b & 15, b >> 4] for b in row] for row in values.tolist()]
    signed = np.array(nibbles, np.int64).reshape(*values.shape, 2)
    signed -= 16 * (signed > 7)
    return np.concatenate([signed[..., 0], signed[..., 1]], axis=1)


def expected_matrix(codes, dtype):
    values, scale = unpacked(codes), np.asarray(codes.scale)
    repeated = np.repeat(scale, values.shape[1] // scale.shape[1], axis=1).astype(np.float64)
    with np.errstate(over="ignore"):
        return (values * repeated).astype(np.float32).astype(dtype)


quantize = jax.jit(q.quantize, static_argnums=(1, 2))
decode = jax.jit(q.decode, static_argnums=1, static_argnames="implementation")
quantize_rows = jax.jit(q.quantize_rows, static_argnames=("members", "implementation"))


@pytest.mark.parametrize(
    ("bits", "group", "dtype"),
    [
        (8, None, jnp.float32),
        (8, None, jnp.bfloat16),
        (8, 32, jnp.bfloat16),
        (8, 6, jnp.float16),
        (8, 192, jnp.float32),
        (4, None, jnp.float16),
        (4, 64, jnp.float32),
        (4, 64, jnp.bfloat16),
        (4, 2, jnp.float16),
        (4, 1, jnp.float32),
    ],
)
def test_codes_and_scales_against_float64(bits, group, dtype):
    w = weights((5, 192), dtype, scale=10.0 ** RNG.uniform(-4, 1, (5, 1)))
    codes = quantize(w, bits, group)
    values, scale = expected_codes(w, bits, group)
    assert (codes.bits, codes.shape, codes.group) == (bits, (5, 192), group or 192)
    assert codes.codes.dtype == (jnp.int8 if bits == 8 else jnp.uint8)
    np.testing.assert_array_equal(unpacked(codes), values)
    np.testing.assert_array_equal(np.asarray(codes.scale), scale)
    exact = np.abs(np.asarray(w, np.float64)).reshape(5, -1, group or 192).max(axis=2) / QMAX[bits]
    np.testing.assert_allclose(scale, exact, rtol=2e-7)
    # Weights are within half a step, and the rounding to their own dtype, of what is decoded.
    decoded = decode(codes, dtype)
    assert_same_bits(decoded, expected_matrix(codes, dtype))
    back = np.asarray(decoded, np.float64)
    step = np.repeat(scale.astype(np.float64), codes.group, axis=1)
    rounding = np.spacing(np.abs(back).astype(dtype)).astype(np.float64) / 2
    error = np.abs(np.asarray(w, np.float64) - back)
    assert (error <= step * (0.5 + 2e-5) + rounding).all() and (error > 0.4 * step).any() == (group != 1)


@each_implementation
def test_halves_go_to_the_even_code(implementation):
    x = np.zeros((1, 128), np.float32)
    x[0, :9] = 127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5
    even = [127, 0, 2, 2, 0, -2, -2, 126, -126]
    rows = quantize_rows(jnp.asarray(x), implementation=implementation)
    assert rows.codes[0, :9].tolist() == even and rows.scale.tolist() == [[1.0]]
    codes = quantize(jnp.asarray([[7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7]]), 4, None)
    assert unpacked(codes).tolist() == [[7, 0, 2, 2, 0, -2, -2, -7]] and codes.scale.tolist() == [[1.0]]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_decoded_weights_again_changes_no_code(bits):
    codes = quantize(weights((4, 128)), bits, 32)
    again = quantize(decode(codes, jnp.float32), bits, 32)
    np.testing.assert_array_equal(*(np.asarray(x.codes) for x in (codes, again)))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(bits, dtype):
    largest, smallest = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).smallest_subnormal)
    rows = np.zeros((8, 8))
    rows[1] = -0.0
    rows[2, 3] = -largest  # a huge outlier, among weights that vanish beside it
    rows[2, :3] = 0.01, -0.02, 1
    rows[3] = smallest
    rows[4] = -1, 1, -1, 0.5, 0.25, -0.5, 0.75, -0.75
    rows[5] = 1e-5 * np.arange(8)  # subnormal in float16
    rows[6, 0] = largest / 2
    rows[7] = 2.0 ** -np.arange(8)
    w = jnp.asarray(rows, dtype)
    codes = quantize(w, bits, None)
    values = unpacked(codes)
    assert np.isfinite(np.asarray(codes.scale)).all() and (np.asarray(codes.scale) > 0).all()
    for zeros in (0, 1, *([] if dtype == jnp.float16 else [3])):  # float16's smallest is a normal float32
        assert codes.scale[zeros, 0] == 1 and not values[zeros].any()
    assert values[2].tolist() == [0, 0, 0, -QMAX[bits], 0, 0, 0, 0]
    assert values[4][:3].tolist() == [-QMAX[bits], QMAX[bits], -QMAX[bits]]
    if dtype == jnp.float16:
        assert (values[3] == QMAX[bits]).all()
    expected, scale = expected_codes(w, bits, None)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(np.asarray(codes.scale), scale)
    back = np.asarray(decode(codes, dtype), np.float64)
    np.testing.assert_allclose(back[[4, 6], 0], np.asarray(w, np.float64)[[4, 6], 0], rtol=2e-7)


@each_implementation
@pytest.mark.parametrize("poison", [jnp.nan, -jnp.inf])
def test_what_is_not_finite_does_not_become_finite(implementation, poison):
    x = weights((3, 128)).at[1, 5].set(poison)
    codes = quantize_rows(x, implementation=implementation)
    back = np.asarray(decode(codes, jnp.float32))
    assert not np.isfinite(back[1]).any() and np.isfinite(back[[0, 2]]).all()


# --- the reciprocal ---------------------------------------------------------------------------------------------------


def test_reciprocals_are_rounded_correctly_for_every_mantissa():
    x = (np.arange(1 << 23, dtype=np.uint32) | np.uint32(0x3F800000)).view(np.float32)
    np.testing.assert_array_equal(
        np.asarray(jax.jit(quantized_reference.reciprocal)(jnp.asarray(x))), np.float32(1) / x
    )


def test_reciprocals_are_rounded_correctly_for_every_exponent():
    x = np.ldexp(RNG.uniform(1, 2, (246, 8)), np.arange(-120, 126)[:, None]).astype(np.float32)
    x[:, 0] = np.ldexp(1.0, np.arange(-120, 126))
    x[:, 1] = np.nextafter(x[:, 0], np.float32(0))
    inverse = (1 / x.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(jax.jit(quantized_reference.reciprocal)(jnp.asarray(x))), inverse)


@pytest.mark.parametrize("units", [-2, -1, 1, 2])
def test_an_inexact_division_does_not_show(monkeypatch, units):
    """GPUs divide to within two units in the last place."""

    def inexact(one, x):
        return lax.bitcast_convert_type(lax.bitcast_convert_type(lax.div(one, x), jnp.int32) + units, jnp.float32)

    x = jnp.concatenate([jnp.asarray(RNG.uniform(1, 2, 10000), jnp.float32), jnp.array([1, 1 + 2**-23, 2 - 2**-23])])
    exact = np.float32(1) / np.asarray(x)
    operations = types.SimpleNamespace(div=inexact, bitcast_convert_type=lax.bitcast_convert_type)
    monkeypatch.setattr(quantized_reference, "lax", operations)
    np.testing.assert_array_equal(np.asarray(quantized_reference.reciprocal(x)), exact)


# --- decoding ---------------------------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("bits", [8, 4])
def test_every_byte(implementation, bits):
    """Each of the 256 bytes at each place of a vector: the nibbles lie half a row apart."""
    values = np.stack([np.roll(np.arange(256), shift) for shift in range(8)]).astype(np.uint8)
    codes = Codes(jnp.asarray(values.view(np.int8) if bits == 8 else values), jnp.ones((8, 1)))
    matrix = np.asarray(decode(codes, jnp.float32, implementation=implementation))
    if bits == 8:
        np.testing.assert_array_equal(matrix, values.view(np.int8))
    else:
        nibbles = [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]
        assert matrix[0, :256].tolist() == nibbles * 16  # column j: the low nibble of byte j
        assert matrix[0, 256:].tolist() == np.repeat(nibbles, 16).tolist()  # column 256 + j: its high one
        np.testing.assert_array_equal(matrix, expected_matrix(codes, np.float32))


@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (4, 256)])
def test_packing(shape):
    codes = jnp.asarray(RNG.integers(-8, 8, shape), jnp.int8)
    packed = quantized_reference.pack(codes)
    assert packed.dtype == jnp.uint8 and packed.shape == (shape[0], shape[1] // 2)
    np.testing.assert_array_equal(unpacked(Codes(packed, jnp.ones((shape[0], 1)))), codes)
    assert_same_bits(quantized_reference.unpack(packed), codes)


# Bits, shape, group: one program and several; vectors of 8, 4 and 2 codes; tiles along rows, groups and columns.
MATRICES = [
    (8, (4, 256), None),
    (8, (12, 2816), None),
    (8, (4, 512), 128),
    (8, (16, 1024), 32),
    (8, (8, 64), None),
    (4, (4, 512), None),
    (4, (8, 2816), None),
    (4, (8, 1024), 128),
    (4, (4, 3072), 64),
    (4, (20, 512), 32),
    (4, (4, 128), None),
]


@each_kernel
@pytest.mark.parametrize(
    ("matrix", "dtype"), [(m, d) for i, m in enumerate(MATRICES) for j, d in enumerate(DTYPES) if (i + j) % 3 == 1]
)
def test_kernel_equals_xla_in_every_bit(implementation, matrix, dtype):
    codes = random_codes(*matrix)
    decoded = decode(codes, dtype, implementation=implementation)
    assert_same_bits(decoded, decode(codes, dtype, implementation="xla"))
    assert_same_bits(decoded, expected_matrix(codes, dtype))


@pytest.mark.parametrize(
    ("bits", "shape", "group", "reason"),
    [
        (8, (5, 256), None, "n_out in multiples of 4"),
        (4, (7, 26), 2, "n_out in multiples of 4"),
        (4, (4, 96), 32, "whole groups in each half"),
        (8, (4, 130), None, "fill whole warps"),
        (8, (4, 36), 12, "fill whole warps"),
        (4, (4, 30), None, "fill whole warps"),
    ],
)
def test_ragged_matrices_go_by_xla(bits, shape, group, reason):
    codes = random_codes(bits, shape, group)
    assert_same_bits(decode(codes, jnp.bfloat16), expected_matrix(codes, jnp.bfloat16))
    if implementations.problem("interpret") is None:
        with pytest.raises(NotImplementedError, match=f"decode by 'interpret': .*{reason}"):
            q.decode(codes, jnp.bfloat16, implementation="interpret")


@pytest.mark.parametrize("model", specs.MODELS)
def test_the_matrices_of_real_models_have_a_kernel(model):
    matrices = [shape for shape in specs.MODELS[model].block.values() if len(shape) == 2]
    for (rows, columns), bits, group in itertools.product(matrices, (8, 4), (None, 32, 64, 128)):
        values = jax.ShapeDtypeStruct((rows, columns * bits // 8), jnp.int8 if bits == 8 else jnp.uint8)
        scale = jax.ShapeDtypeStruct((rows, columns // (group or columns)), jnp.float32)
        plan = q._plan(Codes(values, scale), jnp.bfloat16)
        assert not isinstance(plan, str), plan
        assert plan.vector >= 4 and all(n % t == 0 for n, t in zip(plan.view, plan.tile, strict=True))
        assert np.prod(plan.tile) % (128 * plan.vector) == 0 and np.prod(plan.view) == rows * columns // plan.halves


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@each_kernel
@pytest.mark.parametrize("name", ["opt-1.3b.fc1", "opt-2.7b.fc1", "opt-13b.fc2", "llama-7b.down"])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 128), (4, None), (4, 32), (4, 64)])
def test_kernel_equals_xla_on_real_matrices(implementation, name, bits, group):
    shape = specs.shape_of(name)
    w = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    codes = jax.jit(q.quantize, static_argnums=(1, 2))(w, bits, group)
    for dtype in DTYPES:
        assert_same_bits(*(q.decode(codes, dtype, implementation=i) for i in (implementation, "xla")))
    if shape[1] <= 20480:
        assert_same_bits(*(q.quantize_rows(w, implementation=i) for i in (implementation, "xla")))


# --- activations ------------------------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 128), jnp.bfloat16),
        ((3, 384), jnp.float32),
        ((2, 1024), jnp.bfloat16),
        ((2, 1024), jnp.float16),
        ((1, 2560), jnp.float32),
    ],
)
def test_rows_against_float64(implementation, shape, dtype):
    x = weights(shape, dtype, scale=10.0 ** RNG.uniform(-4, 2, (shape[0], 1))).at[0].set(0)
    rows = quantize_rows(x, implementation=implementation)
    values, scale = expected_codes(x, 8, None)
    assert rows.codes.dtype == jnp.int8 and rows.scale.shape == (shape[0], 1)
    np.testing.assert_array_equal(np.asarray(rows.codes), values)
    np.testing.assert_array_equal(np.asarray(rows.scale), scale)


@each_implementation
@pytest.mark.parametrize(("members", "shape", "dtype"), [(2, (4, 384), jnp.bfloat16), (3, (3, 8192), jnp.float32)])
def test_members_are_their_difference_from_the_first(implementation, members, shape, dtype):
    first = weights((1, shape[0] // members, shape[1])).astype(np.float32)
    x = (first + 1e-3 * weights((members, *first.shape[1:])).astype(np.float32)).astype(dtype)
    apart = x.astype(jnp.float32).at[1:].add(-x[0].astype(jnp.float32))
    rows = quantize_rows(x.reshape(shape), members=members, implementation=implementation)
    values, scale = expected_codes(apart.reshape(shape), 8, None)
    np.testing.assert_array_equal(np.asarray(rows.codes), values)
    np.testing.assert_array_equal(np.asarray(rows.scale), scale)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((3, 130), jnp.bfloat16, "multiple of 128"),
        ((2, 10368), jnp.float32, "up to 10240"),
        ((0, 128), jnp.bfloat16, "1 to 2"),
    ],
)
def test_ragged_rows_go_by_xla(shape, dtype, reason):
    x = weights(shape, dtype)
    values = expected_codes(x, 8, shape[1])[0] if x.size else np.zeros(shape)
    np.testing.assert_array_equal(np.asarray(quantize_rows(x).codes), values)
    if implementations.problem("interpret") is None:
        with pytest.raises(NotImplementedError, match=f"quantize_rows by 'interpret': .*{reason}"):
            q.quantize_rows(x, implementation="interpret")


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_codes_against_integers(dtype):
    x, w = (RNG.integers(-127, 128, shape) for shape in ((5, 300), (7, 300)))
    x[0], w[0] = 127, -127  # the largest sum, above 2**22
    scales = [10.0 ** RNG.uniform(-4, -2, (n, 1)) for n in (5, 7)]
    xs, ws = (np.asarray(s, np.float32) for s in scales)
    exact = (x @ w.T).astype(np.float32) * (xs * ws.T)
    y = q.matmul_int8(*(jnp.asarray(a) for a in (x.astype(np.int8), xs, w.astype(np.int8), ws)), dtype)
    assert y.dtype == dtype
    np.testing.assert_array_equal(np.asarray(y), exact.astype(dtype))


def test_quantised_product_is_near_the_exact_one():
    """The error of the product of two rounded vectors: steps of 1 / 12 of variance each."""
    x, w = weights((16, 512), scale=1.0), weights((24, 512))
    (xc, xs), (wc, ws) = quantize_rows(x), quantize(w, 8, None)
    y = np.asarray(q.matmul_int8(xc, xs, wc, ws, jnp.float32), np.float64)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    expected = np.sqrt(512 / 12 * (np.asarray(xs) ** 2 * 0.02**2 + np.asarray(ws).T ** 2))
    assert 0.9 < np.sqrt(np.mean(((y - exact) / expected) ** 2)) < 1.1


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group", "dtype"), [(8, None, jnp.bfloat16), (4, 32, jnp.float32)])
def test_jit_equals_eager_in_every_bit(bits, group, dtype):
    w = weights((64, 256), dtype, scale=10.0 ** RNG.uniform(-6, 2, (64, 256)))
    codes = q.quantize(w, bits, group)
    assert_same_bits(jax.jit(lambda w: q.quantize(w, bits, group))(w), codes)
    assert_same_bits(jax.jit(lambda: q.quantize(w, bits, group))(), codes)
    assert_same_bits(jax.jit(lambda codes: q.decode(codes, dtype))(codes), q.decode(codes, dtype))
    fused = jax.jit(lambda w: q.decode(q.quantize(w, bits, group), dtype))
    assert_same_bits(fused(w), q.decode(codes, dtype))
    rows = q.quantize_rows(w)
    assert_same_bits(jax.jit(q.quantize_rows)(w), rows)
    eight = q.quantize(w, 8)
    product = partial(q.matmul_int8, dtype=dtype)
    assert_same_bits(jax.jit(product)(*rows, *eight), product(*rows, *eight))
    assert_same_bits(jax.jit(lambda: product(*rows, *eight))(), product(*rows, *eight))


@each_implementation
def test_vmap_equals_a_loop(implementation):
    members = [random_codes(4, (4, 512), 128) for _ in range(2)]
    stacked = Codes(jnp.stack([m.codes for m in members]), members[0].scale)
    one = jax.jit(partial(q.decode, dtype=jnp.bfloat16, implementation=implementation))
    batched = jax.vmap(one, in_axes=(Codes(0, None),))(stacked)
    for i, member in enumerate(members):
        assert_same_bits(batched[i], one(member._replace(scale=members[0].scale)))
    x = weights((2, 3, 128))
    rows = jax.vmap(partial(quantize_rows, implementation=implementation))(x)
    for i in range(2):
        assert_same_bits(jax.tree.map(lambda leaf, i=i: leaf[i], rows), quantize_rows(x[i]))


# --- errors -----------------------------------------------------------------------------------------------------------

W, X8, S8 = jnp.zeros((4, 6)), jnp.zeros((4, 6), jnp.int8), jnp.ones((4, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: q.quantize(W, 5), "to 5 bits: expected 8 or 4"),
        (lambda: q.quantize(jnp.zeros((4, 7)), 4), r"w\[4, 7\] to 4 bits: expected an even n_in; pad"),
        (lambda: q.quantize(W, 8, 4), "groups of 4: expected a divisor of n_in = 6, such as 2"),
        (lambda: q.quantize(W, 8, 0), "groups of 0: expected a divisor"),
        (lambda: q.quantize(W, 8, -2), "groups of -2: expected a divisor"),
        (lambda: q.quantize(W, 8, 2.0), "groups of 2.0: expected a divisor"),
        (lambda: q.quantize(X8, 8), r"w int8\[4, 6\]: expected \[n_out, n_in\] of float32"),
        (lambda: q.quantize(jnp.zeros((2, 4, 6)), 8), r"w float32\[2, 4, 6\]: expected \[n_out, n_in\]"),
        (lambda: q.quantize(jnp.zeros((4, 0)), 8), "at least one column"),
        (lambda: q.quantize_rows(jnp.zeros((3, 8)), members=2), r"x\[3, 8\] of 2 members: expected a divisor"),
        (lambda: q.quantize_rows(jnp.zeros(6)), r"x float32\[6\]: expected \[rows, n\]"),
        (lambda: q.decode(Codes(X8, S8), jnp.int8), "to int8: expected float32, bfloat16 or float16"),
        (lambda: q.decode(Codes(W, S8), jnp.float32), r"codes float32\[4, 6\] with scale float32\[4, 1\]: expected"),
        (lambda: q.decode(Codes(X8, jnp.ones((4, 4))), jnp.float32), r"scale float32\[4, 4\]: expected int8"),
        (lambda: q.decode(Codes(X8, jnp.ones((4, 0))), jnp.float32), r"scale float32\[4, 0\]: expected int8"),
        (lambda: q.decode(Codes(X8, jnp.ones((3, 1))), jnp.float32), r"scale float32\[3, 1\]: expected int8"),
        (lambda: q.decode(Codes(X8, jnp.ones((4, 1), jnp.bfloat16)), jnp.float32), "scale bfloat16"),
        (lambda: q.decode(Codes(X8[:, :0], S8), jnp.float32), r"codes int8\[4, 0\]"),
        (lambda: q.matmul_int8(X8, S8, X8.astype(jnp.uint8), S8, jnp.float32), "uint8.*: expected int8 both; decode"),
        (lambda: q.matmul_int8(X8, S8, X8[:, :5], S8, jnp.float32), r"int8\[4, 5\]: expected \[rows, n_in\] and"),
        (lambda: q.matmul_int8(X8, S8, X8, jnp.ones((4, 3)), jnp.float32), r"scale float32\[4, 3\]: .*without groups"),
        (lambda: q.matmul_int8(X8, jnp.ones(4), X8, S8, jnp.float32), r"x_scale float32\[4\]: expected float32\[4, 1"),
        (lambda: q.matmul_int8(X8, S8, X8, S8, jnp.int32), "matmul_int8 to int32: expected float32"),
        (lambda: q.matmul_int8(X8, S8, X8, S8, jnp.float32, members=3), r"x_codes\[4, .*of 3 members: expected a div"),
        (lambda: q.decode(Codes(X8, S8), jnp.float32, implementation="cuda"), "'cuda', expected None or one of"),
    ],
)
def test_arguments_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sums_that_could_overflow_are_refused():
    wide = jnp.zeros((1, 1 << 17), jnp.int8)
    with pytest.raises(ValueError, match=r"n_in below 2\*\*17"):
        q.matmul_int8(wide, S8[:1], wide, S8[:1], jnp.float32)


@pytest.mark.skipif(ON_GPU, reason="a GPU has them")
@pytest.mark.parametrize("name", ["mosaic", "mosaic_portable"])
def test_a_kernel_asked_for_by_name_is_refused_with_the_reason(name):
    reason = "an NVIDIA GPU.* is .*cpu" if implementations.problem("interpret") is None else "jax 0.11.1"
    rows = jnp.zeros((4, 512))
    for operation, call in (
        ("decode", lambda: q.decode(q.quantize(rows, 8), jnp.float32, implementation=name)),
        ("quantize_rows", lambda: q.quantize_rows(rows, implementation=name)),
    ):
        with pytest.raises(NotImplementedError, match=f"{operation} by '{name}'.*({reason})"):
            call()


@NEEDS_KERNELS
def test_operations_without_a_kernel_say_so():
    with pytest.raises(NotImplementedError, match="quantize by 'interpret': there is no kernel"):
        q.quantize(W, 8, implementation="interpret")
    with pytest.raises(NotImplementedError, match="matmul_int8 by 'interpret': there is no kernel"):
        q.matmul_int8(X8, S8, X8, S8, jnp.float32, implementation="interpret")


# --- without a GPU ----------------------------------------------------------------------------------------------------


def lowered(monkeypatch, operation, *arguments):
    monkeypatch.setattr(importlib.import_module("pallas_kernels.quantized"), "choose", lambda *_: "mosaic")
    program = jax.jit(operation).trace(*arguments).lower(lowering_platforms=("cuda",))
    return program.as_text()


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("matrix", "dtype"),
    [(m, d) for i, m in enumerate([*MATRICES, (4, (64, 11008), 128)]) for j, d in enumerate(DTYPES) if (i + j) % 3 < 2],
)
def test_decoding_lowers_for_cuda(monkeypatch, matrix, dtype):
    text = lowered(monkeypatch, partial(q.decode, dtype=dtype, implementation="mosaic"), random_codes(*matrix))
    assert text.count("mosaic_gpu") >= 1


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 128), (3, 384), (2, 5120), (2, 10240)])
def test_rows_lower_for_cuda(monkeypatch, dtype, shape):
    text = lowered(monkeypatch, partial(q.quantize_rows, implementation="mosaic"), jnp.zeros(shape, dtype))
    assert text.count("mosaic_gpu") >= 1


@NEEDS_KERNELS
@pytest.mark.parametrize("columns", [384, 20480])
def test_rows_of_members_lower_for_cuda(monkeypatch, columns):
    function = partial(q.quantize_rows, members=2, implementation="mosaic")
    assert lowered(monkeypatch, function, jnp.zeros((4, columns), jnp.bfloat16)).count("mosaic_gpu") >= 1


@NEEDS_KERNELS
def test_the_kernel_is_chosen_where_the_program_runs(monkeypatch):
    """Without a name: the kernel for CUDA, XLA elsewhere in the same program."""
    codes = random_codes(8, (4, 256), None)
    assert lowered(monkeypatch, partial(q.decode, dtype=jnp.bfloat16), codes).count("mosaic_gpu") >= 1
    assert_same_bits(decode(codes, jnp.bfloat16), expected_matrix(codes, jnp.bfloat16))
