"""The low-rank part of a product for all members: every implementation against float64, and lowered for CUDA."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_marks import KERNELS, NEEDS_KERNELS, ON_GPU, each_implementation

from pallas_kernels.lowrank import add_lowrank

RNG = np.random.default_rng(20261129)
KERNEL_SHAPES = [  # members, rows, n_in, n_out, rank, shared V, x, y
    (2, 64, 128, 192, 8, False, "bfloat16", "bfloat16"),
    (3, 128, 64, 128, 3, True, "bfloat16", "bfloat16"),
    (1, 64, 320, 64, 8, False, "bfloat16", "float16"),
]
SHAPES = [
    *KERNEL_SHAPES,
    (2, 5, 7, 3, 1, False, "float32", "float32"),
    (3, 33, 65, 127, 9, True, "bfloat16", "bfloat16"),
    (1, 64, 320, 128, 8, False, "bfloat16", "float32"),
    (2, 64, 64, 64, 8, False, "float16", "float16"),
]


def arguments(members, rows, n_in, n_out, rank, shared, x_dtype, y_dtype):
    def normal(*shape, scale=1.0, dtype="float32"):
        return jnp.asarray(RNG.normal(size=shape) * scale, dtype)

    x, y = normal(members, rows, n_in, dtype=x_dtype), normal(members, rows, n_out, dtype=y_dtype)
    v = normal(1 if shared else members, n_in, rank, scale=n_in**-0.5)
    return y, x, v, normal(members, n_out, rank), jnp.float32(0.75)


def expected(y, x, v, f, scale):
    y, x, v, f = (np.asarray(a, np.float64) for a in (y, x, v, f))
    return float(scale) * y + (x @ v) @ f.transpose(0, 2, 1)


@each_implementation
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_it_is_the_sum_rounded_once(case, implementation):
    if implementation != "xla" and case not in KERNEL_SHAPES:
        pytest.skip("the kernel does not take this shape")
    if implementation == "mosaic_portable":
        pytest.skip("there is no portable kernel")
    given = arguments(*case)
    found = jax.jit(partial(add_lowrank, implementation=implementation))(*given)
    exact = expected(*given)
    assert found.dtype == given[0].dtype
    size = np.linalg.norm(exact)
    best = np.linalg.norm(np.asarray(jnp.asarray(exact, found.dtype), np.float64) - exact) / size
    assert np.linalg.norm(np.asarray(found, np.float64) - exact) / size < 1.05 * best + 2e-5


@pytest.mark.parametrize("implementation", KERNELS)
def test_members_under_vmap_are_those_of_xla(implementation):
    if implementation == "mosaic_portable":
        pytest.skip("there is no portable kernel")
    given = [jnp.stack([a, 2 * a]) for a in arguments(*KERNEL_SHAPES[0])]
    found, plain = (jax.vmap(partial(add_lowrank, implementation=name))(*given) for name in (implementation, "xla"))
    assert bool((found == plain).all())


@pytest.mark.parametrize("implementation", KERNELS)
def test_it_has_the_derivative_of_xla(implementation):
    if implementation == "mosaic_portable":
        pytest.skip("there is no portable kernel")
    y, x, v, f, scale = arguments(*KERNEL_SHAPES[0])
    by = [
        jax.jit(jax.grad(lambda y, x, name=name: jnp.sum(add_lowrank(y, x, v, f, scale, implementation=name)), (0, 1)))
        for name in (implementation, "xla")
    ]
    for found, plain in zip(*(of(y, x) for of in by), strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(plain, np.float32))


@NEEDS_KERNELS
@pytest.mark.skipif(ON_GPU, reason="lowered on the CPU")
@pytest.mark.parametrize(("y", "kernels"), [("bfloat16", 1), ("float16", 1), ("float32", 0)])
@pytest.mark.parametrize("columns", [64, 128])
def test_the_kernel_lowers_for_cuda_and_fits_shared_memory(columns, y, kernels, monkeypatch):
    def choose(operation, name, limit):
        return "xla" if limit else "mosaic"

    monkeypatch.setattr(importlib.import_module("pallas_kernels.lowrank"), "choose", choose)
    given = arguments(2, 64, 256, columns, 8, False, "bfloat16", y)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in given]
    lowered = jax.jit(add_lowrank).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("stablehlo.custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ((2, 63, 128, 128, 8, False, "bfloat16", "bfloat16"), "63 rows a member: the kernel takes multiples of 64"),
        ((2, 64, 100, 128, 8, False, "bfloat16", "bfloat16"), "n_in 100, n_out 128: the kernel takes multiples of 64"),
        ((2, 64, 128, 128, 9, False, "bfloat16", "bfloat16"), "rank 9: the kernel takes 1 to 8"),
        ((2, 64, 128, 128, 8, False, "bfloat16", "float32"), "y of float32: the kernel takes 16 bits"),
        ((2, 64, 128, 128, 8, False, "float32", "float32"), "x of float32: the kernel takes bfloat16"),
        ((2, 64, 128, 128, 8, False, "float16", "float16"), "x of float16: the kernel takes bfloat16"),
    ],
)
@NEEDS_KERNELS
@pytest.mark.skipif(ON_GPU, reason="the kernel's own name is asked for")
def test_a_named_kernel_never_falls_back(case, message):
    with pytest.raises(NotImplementedError, match=message):
        add_lowrank(*arguments(*case), implementation="interpret")


def test_arguments_are_checked():
    y, x, v, f, _ = arguments(*SHAPES[3])
    with pytest.raises(ValueError, match=r"y\[2, 5, 3\], x\[2, 5, 7\], v\[2, 6, 1\]"):
        add_lowrank(y, x, v[:, 1:], f)
    with pytest.raises(ValueError, match="expected three axes each"):
        add_lowrank(y[0], x, v, f)
    with pytest.raises(ValueError, match="v and f float32"):
        add_lowrank(y, x, v.astype(jnp.bfloat16), f)
