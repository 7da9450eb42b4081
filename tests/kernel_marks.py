"""What the tests of kernels are run with: every implementation that this machine has, and every dtype."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import implementations

ON_GPU = jax.default_backend() == "gpu"
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
NEEDS_KERNELS = pytest.mark.skipif(
    implementations.problem("interpret") is not None, reason=str(implementations.problem("interpret"))
)
KERNELS = [
    pytest.param("interpret", marks=[NEEDS_KERNELS, pytest.mark.skipif(ON_GPU, reason="runs on the CPU")]),
    *(
        pytest.param(name, marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")])
        for name in ("mosaic", "mosaic_portable")
    ),
]
IMPLEMENTATIONS = ["xla", *KERNELS]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
