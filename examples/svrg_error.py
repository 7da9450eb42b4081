"""What an anchor does to the error of estimates, and to the loss: linear regression, at equal forward passes.

    python examples/svrg_error.py --output svrg.png

The steps are those of `zo.Run` with `zo.svrg`, written down for one matrix, so that many seeds go together.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

import zo2jax as zo
from zo2jax.directions import draw, step_keys

ROWS, COLUMNS, EXAMPLES, BATCH = 16, 32, 512, 16
REFRESH, DIRECTIONS = 50, 50
"""Steps of a period, and directions along which its first one looks at the anchor."""
TWO_POINT = zo.two_point(1e-2, direction=zo.lowrank(2, refresh=REFRESH))
ESTIMATORS: dict[str, tuple[zo.Estimator, tuple[float, ...]]] = {
    "two_point": (TWO_POINT, (6e-4,)),
    "averaged(two_point, 3)": (zo.averaged(TWO_POINT, 3), (2e-3,)),
    "svrg(two_point, 50)": (zo.svrg(TWO_POINT, DIRECTIONS), (1e-4, 3e-4, 1e-3)),
}
"""With learning rates; those of the first two are the best of a few."""


@dataclass(frozen=True)
class Problem:
    """The loss |x W^T - y|^2 / 2, and the lowest that there is."""

    x: jax.Array
    y: jax.Array
    best: float

    @classmethod
    def make(cls) -> "Problem":
        """Inputs of unequal scales, and noise: the gradients of batches differ where the loss is lowest, too."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(EXAMPLES, COLUMNS)) * np.linspace(1, 0.3, COLUMNS)
        y = x @ rng.normal(size=(COLUMNS, ROWS)) / np.sqrt(COLUMNS) + 0.5 * rng.normal(size=(EXAMPLES, ROWS))
        residual = x @ np.linalg.lstsq(x, y)[0] - y
        return cls(*(jnp.asarray(a, jnp.float32) for a in (x, y)), float((residual**2).sum(1).mean() / 2))

    def loss(self, w: jax.Array, rows: jax.Array | slice = slice(None)) -> jax.Array:
        """Of W [ROWS, COLUMNS] on some of the examples."""
        return jnp.mean(jnp.sum(jnp.square(self.x[rows] @ w.T - self.y[rows]), axis=1)) / 2


def passes(estimator: zo.Estimator) -> float:
    """Of a batch, in a step, on average over a period."""
    if estimator.full is None:
        return estimator.members
    return (estimator.full.members + (REFRESH - 1) * 2 * len(estimator.probes)) / REFRESH


def steps(problem: Problem, estimator: zo.Estimator, rate: float, count: int, seed: jax.Array) -> jax.Array:
    """Of each step: |estimate - gradient|^2, |gradient|^2, and by how much the loss is above the lowest. [count, 3]."""
    key, of_anchor = jax.random.key(seed), 0 if estimator.full is None else estimator.full.directions
    own, direction = estimator.directions - of_anchor, estimator.direction

    def step(carry: tuple[jax.Array, ...], t: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        w, then, found = carry
        keys = jax.random.key_data(step_keys(key, t, estimator.directions, direction, of_anchor))
        z = jax.vmap(lambda one: draw(direction, one, np.uint32(0), w.shape))(keys)
        rows = jax.random.randint(jax.random.fold_in(jax.random.fold_in(key, t), 2**31), (BATCH,), 0, EXAMPLES)

        def losses(w: jax.Array, z: jax.Array, probes: np.ndarray) -> jax.Array:
            return jax.vmap(lambda row: problem.loss(w + jnp.tensordot(row, z, 1), rows))(probes)

        def first() -> tuple[jax.Array, jax.Array]:
            assert estimator.full is not None
            return w, estimator.projected_gradient(losses(w, z[own:], estimator.full.probes), t)

        def later() -> jax.Array:
            both = [losses(one, z[:own], estimator.probes) for one in (w, then)]
            return estimator.projected_gradient(jnp.concatenate(both), t, found)

        if estimator.full is None:
            g = estimator.projected_gradient(losses(w, z, estimator.probes), t)
        else:
            begins = t % REFRESH == 0
            then, found = jax.lax.cond(begins, first, lambda: (then, found))
            g = jax.lax.cond(begins, lambda: found, later)
        estimate, gradient = jnp.tensordot(g, z, 1), jax.grad(problem.loss)(w)
        numbers = jnp.sum((estimate - gradient) ** 2), jnp.sum(gradient**2), problem.loss(w) - problem.best
        return (w - rate * estimate, then, found), jnp.stack(numbers)

    zero = jnp.zeros((ROWS, COLUMNS))
    return jax.lax.scan(step, (zero, zero, jnp.zeros(estimator.directions)), jnp.arange(count, dtype=jnp.uint32))[1]


def main(total: int = 6000, seeds: int = 40, output: Path = Path("svrg.png")) -> dict[str, np.ndarray]:
    """Runs of so many forward passes; prints, draws, and gives the errors by steps since a fold, [REFRESH]."""
    problem, found = Problem.make(), {}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    errors, losses = figure.subplots(1, 2)
    for name, (estimator, rates) in ESTIMATORS.items():
        count = max(1, round(total / passes(estimator) / REFRESH)) * REFRESH
        for rate in rates:
            run = jax.jit(jax.vmap(partial(steps, problem, estimator, rate, count)))
            mean = np.asarray(run(jnp.arange(seeds)), np.float64).mean(axis=0)
            square, gradient = mean[:, :2].reshape(-1, REFRESH, 2).sum(axis=0).T
            label = f"{name}, {passes(estimator):.3g} passes a step, rate {rate:g}"
            found[label] = square / gradient
            ends = " ".join(f"{x:.0f}" for x in found[label][[0, 1, REFRESH // 2, -1]])
            print(f"{label:62} error {ends}, loss above the lowest {mean[-1, 2]:.3f}", flush=True)
            errors.semilogy(found[label], label=label)
            losses.plot(np.arange(count) * passes(estimator), mean[:, 2])
    errors.set(xlabel="steps since a fold", ylabel="|estimate - gradient|$^2$ / |gradient|$^2$")
    losses.set(xlabel="forward passes of a batch", ylabel="loss, above the lowest")
    figure.legend(*errors.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(output, dpi=120)
    return found


if __name__ == "__main__":
    tyro.cli(main)
