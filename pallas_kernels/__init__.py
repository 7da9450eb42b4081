"""Counter-based noise for zeroth-order training in JAX, on which GPU kernels build.

The package imports jax and nothing of zo2jax, so that it can be used on its own.
"""
