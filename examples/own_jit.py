"""Plain JAX: any pytree of parameters, and the step inside your own `jax.jit`, with an optax chain.

    python examples/own_jit.py

A small network learns to tell the points inside a circle from those outside, from forward passes alone: 4 random
directions a step, averaged, and no backward pass.
"""

import jax
import jax.numpy as jnp
import optax

import zo2jax as zo


def init_params(key: jax.Array) -> dict[str, jax.Array]:
    """A network with one hidden layer, as a dict."""
    key1, key2 = jax.random.split(key)
    return {
        "w1": jax.random.normal(key1, (2, 32)),
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(key2, (32, 2)) / 6,
        "b2": jnp.zeros(2),
    }


def draw_batch(key: jax.Array) -> dict[str, jax.Array]:
    """256 points of the plane; the label says which ones are outside the unit circle."""
    x = jax.random.normal(key, (256, 2))
    return {"x": x, "label": (jnp.sum(x**2, axis=1) > 1).astype(jnp.int32)}


def loss_fn(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy, a float32 scalar: all that a loss function has to be."""
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def main(steps: int = 1000) -> tuple[float, float]:
    """Trains, prints and returns the loss before and after."""
    optimizer = optax.chain(
        optax.clip(1.0),  # bounds each projected gradient
        optax.scale_by_learning_rate(optax.linear_schedule(0.5, 0.0, steps)),
    )
    algorithm = zo.mezo(loss_fn, zo.averaged(zo.two_point(eps=1e-3), 4), optimizer)

    @jax.jit
    def train_step(state: zo.State, key: jax.Array) -> tuple[zo.State, zo.Info]:
        return algorithm.step(state, draw_batch(key))

    params_key, run_key, test_key, data_key = jax.random.split(jax.random.key(0), 4)
    state = algorithm.init(init_params(params_key), run_key)
    test = draw_batch(test_key)
    before = float(loss_fn(state.params, test))
    for key in jax.random.split(data_key, steps):
        state, _ = train_step(state, key)
    after = float(loss_fn(state.params, test))
    print(f"loss {before:.3f} -> {after:.3f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main()
