"""Counter-based noise (and, on it, fused GPU kernels) for zeroth-order training in JAX.

The package imports jax and nothing of zo2jax, so that it can be used on its own.
"""
