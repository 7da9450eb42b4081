"""Any Flax model, streamed from host memory: an MLP-Mixer learns to sort digits.

    python examples/stream_any_model.py

`zo.blocks` makes a list of stages into a model: NNX modules, Linen modules with their parameters, or plain functions.
Then `zo.Run` keeps each stage where the plan says, and brings it to the device for its turn. Where that is changes no
bit of the weights: the same steps are done with all stages on the device, and in host memory.
"""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import zo2jax as zo

DIGITS, LENGTH, SIZE, LAYERS = 4, 6, 32, 2


class Mixer(nnx.Module):
    """A layer of an MLP-Mixer (arXiv 2105.01601): one MLP across the positions, and one across the channels."""

    def __init__(self, rngs: nnx.Rngs):
        """Draws the weights."""
        self.norm1, self.norm2 = nnx.LayerNorm(SIZE, rngs=rngs), nnx.LayerNorm(SIZE, rngs=rngs)
        self.across = nnx.List([nnx.Linear(LENGTH, SIZE, rngs=rngs), nnx.Linear(SIZE, LENGTH, rngs=rngs)])
        self.along = nnx.List([nnx.Linear(SIZE, SIZE, rngs=rngs), nnx.Linear(SIZE, SIZE, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [batch, time, size] -> the same shape."""
        up, down = self.across
        x = x + down(nnx.gelu(up(self.norm1(x).swapaxes(1, 2)))).swapaxes(1, 2)
        up, down = self.along
        return x + down(nnx.gelu(up(self.norm2(x))))


def embed(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    """The first stage takes the batch; this one is a plain function of its parameters."""
    return params["digits"][batch["digits"]] + params["positions"]


def loss_fn(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Cross-entropy of each example, float32 [batch]: the digits of a row in their order."""
    target = jnp.sort(batch["digits"], axis=1)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, :, None], axis=2)
    return -log_probs.mean(axis=(1, 2))


def make_model(seed: int) -> zo.Model:
    """The stages: a function, NNX modules, and a Linen module."""
    rng, head = np.random.default_rng(seed), linen.Dense(DIGITS)
    shapes = {"digits": (DIGITS, SIZE), "positions": (LENGTH, SIZE)}
    tables = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    stages = {
        "embed": (embed, tables),
        **{f"layer.{i}": Mixer(nnx.Rngs(i)) for i in range(LAYERS)},
        "head": (head, head.init(jax.random.key(seed), jnp.ones((1, SIZE)))["params"]),
    }
    return zo.blocks(stages, loss=loss_fn)


def draw_batches(count: int) -> list[dict[str, np.ndarray]]:
    """Rows of random digits."""
    rng = np.random.default_rng(1)
    return [{"digits": rng.integers(0, DIGITS, (64, LENGTH), np.int32)} for _ in range(count)]


def train(plan: zo.Plan, batches: list[dict[str, np.ndarray]]) -> tuple[float, float, zo.State]:
    """(loss before, loss after, state), with the stages where the plan says."""
    test = draw_batches(1)
    model, estimator, optimizer = make_model(0), zo.two_point(eps=1e-3), zo.sgd(4e-3)
    with (
        tempfile.TemporaryDirectory() as folder,
        zo.Run(model, estimator, optimizer, directory=folder, key=jax.random.key(0), plan=plan) as run,
    ):
        before = run.evaluate(test)
        for batch in batches:
            run.step(batch)
        return before, run.evaluate(test), run.state


def main(steps: int = 500) -> tuple[float, float]:
    """Trains from host memory, prints and returns the loss before and after; compares a few steps on the device."""
    batches = draw_batches(steps)
    streamed = zo.Plan(dict.fromkeys(make_model(0).source, "host"))
    before, after, _ = train(streamed, batches)
    print(f"loss {before:.3f} -> {after:.3f} after {steps} steps from host memory")

    *_, host = train(streamed, batches[:10])
    *_, device = train(zo.Plan(), batches[:10])
    same = jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), host.params, device.params)
    assert all(jax.tree.leaves(same))
    print(f"all {len(jax.tree.leaves(same))} arrays have the same bits when they stay on the device")
    return before, after


if __name__ == "__main__":
    main()
