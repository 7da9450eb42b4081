"""What an estimator makes of its forward passes: held-out loss after equally many of them, over several seeds.

    python examples/compare_estimators.py --model stories260K --data tinyshakespeare.txt --output estimators.png

Without a model and a text: the small model that comes with the package, and the documentation of Python's library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

import zo2jax as zo
from zo2jax.demo import load_text_or_docstrings, model_folder
from zo2jax.tasks.text import HeldOut, TextBatches, TextData

EPS = 1e-3
ESTIMATORS: dict[str, tuple[Callable[[], zo.Estimator], float]] = {
    "two_point": (lambda: zo.two_point(EPS), 1e-4),
    "averaged(two_point, 4)": (lambda: zo.averaged(zo.two_point(EPS), 4), 5e-4),
    "leave_one_out(8)": (lambda: zo.leave_one_out(8, EPS), 1e-3),
    "one_sided(8)": (lambda: zo.one_sided(8, EPS), 3e-3),
}
"""How each is made, and its learning rate: the best of those in docs/LOG.md for stories260K on Shakespeare's plays."""
POINTS = 10
"""Evaluations of a run."""


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    model: zo.Model
    text: TextData
    batch: int

    @property
    def held_out(self) -> dict[str, np.ndarray]:
        """64 rows, for one program."""
        return next(iter(HeldOut(self.text.held_out, 64)))


def curves(setting: Setting, estimator: zo.Estimator, rate: float, passes: int, seeds: list[int]) -> np.ndarray:
    """Held-out losses, [seeds, POINTS + 1]: at first, and after each tenth of the passes. All seeds go together."""
    model, members = setting.model, len(estimator.probes)
    steps = max(passes // members // POINTS, 1)
    algorithm = zo.mezo(model.loss, estimator, zo.sgd(rate))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    state = jax.vmap(partial(algorithm.init, model.params))(keys)
    look = jax.jit(jax.vmap(lambda state: model.loss(state.params, setting.held_out)))
    train = jax.jit(jax.vmap(lambda state, batches: jax.lax.scan(algorithm.step, state, batches)[0]), donate_argnums=0)
    data = [TextBatches(setting.text.train, setting.batch, steps * POINTS, seed) for seed in seeds]
    losses = [look(state)]
    for point in range(POINTS):
        chosen = [_stacked([one[i] for i in range(point * steps, (point + 1) * steps)]) for one in data]
        state = train(state, _stacked(chosen))
        losses.append(look(state))
    return np.stack(losses, axis=1)


def _stacked(trees: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def draw(found: dict[str, np.ndarray], passes: int, output: Path) -> None:
    """The mean over the seeds of each, and from the lowest to the highest."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, at = figure.subplots(), np.linspace(0, passes, POINTS + 1)
    for name, losses in found.items():
        (line,) = axes.plot(at, losses.mean(axis=0), "o-", markersize=3, label=f"{name}: {losses[:, -1].mean():.3f}")
        axes.fill_between(at, losses.min(axis=0), losses.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="forward passes of a batch", ylabel="held-out loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)


def main(
    model: str = "",
    data: str = "",
    passes: int = 2000,
    seeds: int = 3,
    batch: int = 16,
    tokens: int = 64,
    output: Path = Path("estimators.png"),
) -> dict[str, np.ndarray]:
    """Trains, prints and draws; gives the losses, [seeds, POINTS + 1] of each estimator."""
    loaded = zo.load(model or model_folder(), dtype="float32")
    setting = Setting(loaded, load_text_or_docstrings(loaded, data, tokens=tokens, batch=batch), batch)
    found = {}
    for name, (make, rate) in ESTIMATORS.items():
        losses = found[name] = curves(setting, make(), rate, passes, list(range(seeds)))
        each = "  ".join(f"{loss:.4f}" for loss in losses[:, -1])
        print(f"{name:24} {losses[0, 0]:.4f} -> {losses[:, -1].mean():.4f} ({each}), rate {rate:g}", flush=True)
    draw(found, passes, output)
    return found


if __name__ == "__main__":
    tyro.cli(main)
