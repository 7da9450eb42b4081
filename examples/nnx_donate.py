"""Flax NNX: the module's state as the pytree, bfloat16 matrices, and a step that updates the weights in place.

    python examples/nnx_donate.py

`nnx.split` gives the structure of a module and its arrays, and the arrays are what is trained. Because the state is
donated, the step may write the new weights into the memory of the old ones. Stochastic rounding keeps, on average,
the updates that are too small for bfloat16.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import zo2jax as zo


class Network(nnx.Module):
    """A network with one hidden layer; it computes in float32, whatever the dtype of its matrices."""

    def __init__(self, rngs: nnx.Rngs):
        """Draws the weights."""
        self.hidden = nnx.Linear(8, 64, dtype=jnp.float32, rngs=rngs)
        self.out = nnx.Linear(64, 1, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [batch, 8] -> [batch, 1]."""
        return self.out(nnx.tanh(self.hidden(x)))


def main(steps: int = 1000) -> tuple[float, float]:
    """Trains, prints and returns the loss before and after."""
    graphdef, params = nnx.split(Network(nnx.Rngs(0)))
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16) if w.ndim >= 2 else w, params)

    def loss_fn(params: nnx.State, x: jax.Array) -> jax.Array:
        target = jnp.sin(x.sum(axis=1, keepdims=True))
        return jnp.mean((nnx.merge(graphdef, params)(x) - target) ** 2)

    # eps is not the usual 1e-3, because bfloat16 weights of about 0.3 are spaced by 1e-3 to 2e-3 themselves
    algorithm = zo.mezo(loss_fn, zo.two_point(eps=1e-2), zo.sgd(learning_rate=5e-3), rounding=zo.stochastic)
    step = jax.jit(algorithm.step, donate_argnums=0)

    x = jax.random.normal(jax.random.key(1), (256, 8)) / 4
    before = float(loss_fn(params, x))
    state = algorithm.init(params, jax.random.key(0))
    for _ in range(steps):
        state, _ = step(state, x)  # the arrays of the old state, and with them `params`, are gone
    after = float(loss_fn(state.params, x))

    trained = nnx.merge(graphdef, state.params)
    print(f"loss {before:.3f} -> {after:.3f} after {steps} steps, matrices in {trained.hidden.kernel.dtype}")
    return before, after


if __name__ == "__main__":
    main()
