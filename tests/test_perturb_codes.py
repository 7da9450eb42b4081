"""Probes of codes with pending terms: against NumPy float64, kernels against XLA in every bit, and lowered for CUDA."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_marks import DTYPES, KERNELS, NEEDS_KERNELS, ON_GPU, each_implementation
from test_kernels import PAIRS, assert_same_bits, coefficients, keys, noise, random_probes, weights
from test_quantized import expected_matrix, random_codes

from pallas_kernels import bits, implementations, specs
from pallas_kernels.perturb import perturb
from pallas_kernels.perturb_codes import perturb_codes
from pallas_kernels.quantized import Codes, decode, quantize
from pallas_kernels.quantized_reference import Pending
from pallas_kernels.reference import Probes, Terms

RNG = np.random.default_rng(20260114)
run = jax.jit(perturb_codes, static_argnames=("dtype", "pair", "implementation"))


def random_pending(length, count, gone=0.01):
    return Pending(keys(length), coefficients(length), jnp.int32(count), bits.cut12(jnp.float32(gone)))


def small_codes(bits_, shape, group=None):
    return quantize(weights(shape), bits_, group)


def matrix(kind, shape):
    return small_codes(8, shape) if kind == "int8" else weights(shape, jnp.bfloat16)


@each_implementation
@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "pair", "count"),
    [
        ("int8", (4, 256), jnp.float32, bits.normal_pair, 3),
        ("array", (8, 384), jnp.float16, bits.rademacher_pair, 0),
    ],
)
def test_against_float64(implementation, kind, shape, dtype, pair, count):
    """Terms from ``count`` on are not there, whatever their coefficients."""
    w, pending, probes = matrix(kind, shape), random_pending(4, count), random_probes(3, 2)
    exact = np.asarray(expected_matrix(w, np.float32) if kind == "int8" else w, np.float64)
    exact = exact * (1 - float(pending.gone))
    for t in range(count):
        exact = exact + float(pending.coefs[t]) * noise(pair, pending.keys[t], shape)
    zs = np.stack([noise(pair, key, shape) for key in probes.keys])
    members = exact + np.tensordot(np.asarray(probes.matrix, np.float64), zs, 1)
    for given, expected in ((None, exact), (probes, members)):
        ours = run(w, pending, given, dtype=dtype, pair=pair, implementation=implementation)
        assert ours.dtype == dtype and ours.shape == expected.shape
        unit = np.spacing(np.abs(expected).astype(dtype)).astype(np.float64)
        assert (np.abs(np.asarray(ours, np.float64) - expected) <= 0.505 * unit + 2e-8).all()


def test_decoded_weights_are_those_of_decode():
    codes = random_codes(8, (8, 256), None)
    assert_same_bits(run(codes, None, None, dtype=jnp.float32), decode(codes, jnp.float32))
    nothing = random_pending(2, 0, gone=0.0)
    assert_same_bits(run(codes, nothing, None, dtype=jnp.float32), decode(codes, jnp.float32))


@pytest.mark.parametrize(("bits_", "group"), [(8, 2), (4, 6)])
def test_probes_are_those_of_the_decoded_matrix(bits_, group):
    """Of any shape and format: those that `perturb` makes of a float32 matrix after one update of as many terms."""
    codes, probes, pending = small_codes(bits_, (5, 18), group), random_probes(2, 3), random_pending(3, 3)
    terms = Terms(pending.keys[None], pending.coefs[None], pending.gone[None])
    pair = {"pair": bits.rademacher_pair}
    moved, members = jax.jit(partial(perturb, **pair))(decode(codes, jnp.float32), terms, probes)
    assert_same_bits(run(codes, pending, None, dtype=jnp.float32, **pair), moved)
    assert_same_bits(run(codes, pending, probes, dtype=jnp.float32, **pair), members)


# Kind, shape, members, directions: one program and several; vectors of 8 and 4; tiles along rows and along columns.
CASES = [
    ("array", (20, 640), 2, 1),
    ("int8", (8, 512), 9, 3),
    ("int8", (4, 1280), 2, 1),
    ("int8", (16, 128), 0, 0),
]


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(("case", "dtype", "pair"), [(c, DTYPES[i % 3], PAIRS[i % 2]) for i, c in enumerate(CASES)])
def test_kernel_equals_xla_in_every_bit(implementation, case, dtype, pair):
    kind, shape, members, directions = case
    arguments = matrix(kind, shape), random_pending(3, 2), random_probes(members, directions) if members else None
    rows = jnp.asarray(RNG.integers(0, 2**32, shape[0], dtype=np.uint32))
    made = [run(*arguments, dtype=dtype, pair=pair, rows=rows, implementation=i) for i in (implementation, "xla")]
    assert_same_bits(*made)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("implementation", ["mosaic", "mosaic_portable"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", ["opt-1.3b.fc1", "opt-13b.fc2", "llama-7b.down"])
def test_kernel_equals_xla_on_real_matrices(implementation, pair, name):
    codes, pending, probes = small_codes(8, specs.shape_of(name)), random_pending(8, 3), random_probes(2, 1)
    made = [
        run(codes, pending, probes, dtype=jnp.bfloat16, pair=pair, implementation=i) for i in (implementation, "xla")
    ]
    assert_same_bits(*made)


@each_implementation
def test_rows_are_those_of_the_whole(implementation):
    """A slab at a traced row, and rows in any order."""
    codes, pending, probes = small_codes(8, (24, 256)), random_pending(2, 2), random_probes(2, 1)
    how = {"dtype": jnp.bfloat16, "pair": bits.rademacher_pair, "implementation": implementation}
    whole = run(codes, pending, probes, **how)
    for rows in (np.arange(8, 12), np.array([23, 0, 7, 7])):
        part = Codes(codes.codes[rows], codes.scale[rows])
        assert_same_bits(run(part, pending, probes, rows=jnp.asarray(rows, jnp.uint32), **how), whole[:, rows])


@each_implementation
def test_vmap_equals_a_loop(implementation):
    codes, pending = small_codes(8, (4, 128)), random_pending(2, 1)
    probes = [random_probes(2, 1) for _ in range(3)]
    how = {"dtype": jnp.bfloat16, "pair": bits.rademacher_pair, "implementation": implementation}
    one = partial(run, codes, pending, **how)
    stacked = jax.vmap(one)(jax.tree.map(lambda *x: jnp.stack(x), *probes))
    for i, p in enumerate(probes):
        assert_same_bits(stacked[i], one(p))


def test_jit_equals_eager_and_constants_in_every_bit():
    arguments = small_codes(8, (6, 20)), random_pending(2, 1), random_probes(2, 1), jnp.float32
    one = partial(perturb_codes, *arguments, pair=bits.rademacher_pair)
    assert_same_bits(run(*arguments, pair=bits.rademacher_pair), one())
    assert_same_bits(jax.jit(one)(), one())


C, P = Codes(jnp.zeros((4, 8), jnp.int8), jnp.ones((4, 1))), random_pending(2, 1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((jnp.zeros((4, 8), jnp.int32), None, None, jnp.float32), {}, r"of \[4, 8\] int32: expected Codes, or"),
        ((jnp.zeros(8), None, None, jnp.float32), {}, r"of \[8\] float32: expected Codes"),
        ((C, None, None, jnp.int8), {}, "to int8: expected float32"),
        (
            (C, P._replace(keys=keys(3)), None, jnp.float32),
            {},
            r"\[\[3, 2\], \[2\], \[\], \[\]\]: expected",
        ),
        ((C, P._replace(gone=jnp.zeros(1)), None, jnp.float32), {}, r"\[1\]\]: expected keys"),
        ((C, None, Probes(keys(2), jnp.ones((2, 1))), jnp.float32), {}, r"keys\[2, 2\], matrix\[2, 1\]: expected"),
        ((C, None, None, jnp.float32), {"rows": jnp.zeros(3, jnp.uint32)}, r"rows uint32\[3\]: expected uint32\[4\]"),
        ((C, None, None, jnp.float32), {"implementation": "cuda"}, "'cuda', expected None or one of"),
    ],
)
def test_arguments_that_do_not_fit(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        perturb_codes(*arguments, **options)


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        (small_codes(4, (4, 256)), "int8 codes with one scale a row"),
        (small_codes(8, (4, 256), 128), "int8 codes with one scale a row"),
        (small_codes(8, (4, 132)), "n_out in multiples of 4, and n_in of 128"),
    ],
)
def test_what_has_no_kernel_says_so(codes, reason):
    with pytest.raises(NotImplementedError, match=f"perturb_codes by 'interpret': .*{reason}"):
        perturb_codes(codes, None, None, jnp.float32, implementation="interpret")


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("name", "kind", "shape", "dtype", "pair", "counts"),
    [  # terms, members, directions
        ("mosaic", "int8", (64, 1024), jnp.bfloat16, bits.normal_pair, (8, 2, 1)),
        ("mosaic_portable", "array", (8, 384), jnp.float16, bits.rademacher_pair, (1, 9, 3)),
    ],
)
def test_kernels_lower_for_cuda(monkeypatch, name, kind, shape, dtype, pair, counts):
    terms, members, directions = counts
    probes = random_probes(members, directions) if members else None
    monkeypatch.setattr(importlib.import_module("pallas_kernels.perturb_codes"), "choose", lambda *_: name)
    program = jax.jit(partial(perturb_codes, dtype=dtype, pair=pair, implementation=name))
    lowered = program.trace(matrix(kind, shape), random_pending(terms, 1), probes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 1


@pytest.mark.skipif(ON_GPU, reason="a GPU has them")
def test_a_kernel_asked_for_by_name_is_refused_with_the_reason():
    reason = "an NVIDIA GPU.* is .*cpu" if implementations.problem("interpret") is None else "jax 0.11.1"
    with pytest.raises(NotImplementedError, match=f"perturb_codes by 'mosaic'.*({reason})"):
        perturb_codes(small_codes(8, (4, 128)), None, None, jnp.float32, implementation="mosaic")
