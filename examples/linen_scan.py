"""Flax Linen: many steps inside one `jax.lax.scan`, compiled once and run without going back to Python.

    python examples/linen_scan.py

A small Linen module learns a sine wave. The state of a run is a pytree of arrays, so it is an ordinary scan carry.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import zo2jax as zo


class Wave(nn.Module):
    """One number in, one number out."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """X [batch, 1] -> [batch, 1]."""
        x = nn.tanh(nn.Dense(16)(x))
        return nn.Dense(1)(x)


def main(steps: int = 3000) -> tuple[float, float]:
    """Trains, prints and returns the loss before and after."""
    model = Wave()

    def loss_fn(variables: dict, x: jax.Array) -> jax.Array:
        return jnp.mean((model.apply(variables, x) - jnp.sin(x)) ** 2)

    algorithm = zo.mezo(loss_fn, zo.two_point(eps=1e-3), zo.sgd(learning_rate=1e-2))

    @jax.jit
    def train(state: zo.State, keys: jax.Array) -> tuple[zo.State, jax.Array]:
        def one_step(state: zo.State, key: jax.Array) -> tuple[zo.State, jax.Array]:
            x = jax.random.uniform(key, (64, 1), minval=-3.0, maxval=3.0)
            state, info = algorithm.step(state, x)
            return state, info.loss

        return jax.lax.scan(one_step, state, keys)

    model_key, run_key, data_key = jax.random.split(jax.random.key(0), 3)
    x = jnp.linspace(-3.0, 3.0, 200)[:, None]
    state = algorithm.init(model.init(model_key, x), run_key)
    before = float(loss_fn(state.params, x))
    state, losses = train(state, jax.random.split(data_key, steps))
    after = float(loss_fn(state.params, x))
    print(f"loss {before:.3f} -> {after:.3f} after {len(losses)} steps in one scan")
    return before, after


if __name__ == "__main__":
    main()
