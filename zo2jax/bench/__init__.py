"""``zo2jax bench``: what steps cost, on random weights of the shape of real models.

Kernels alone are measured by ``python -m pallas_kernels.bench``.
"""

from zo2jax.bench.shapes import DEFAULT as DEFAULT
from zo2jax.bench.shapes import SHAPES as SHAPES
from zo2jax.bench.shapes import Work as Work
from zo2jax.bench.shapes import random_model as random_model
