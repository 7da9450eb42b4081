"""What an estimator makes of its forward passes, and of its time where a model streams: held-out losses, several seeds.

    python examples/compare_estimators.py --model stories260K --data tinyshakespeare.txt --output estimators.png

The second panel gives each step the time that it would take if the model were a large one that streams through a GPU
(``--shape``, ``--machine``), where members share what is uploaded: what `zo2jax.plan` expects, or ``--seconds`` that
were measured. Without a model and a text: the small model that comes with the package, and the documentation of
Python's library.
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
from zo2jax.plan.machine import find
from zo2jax.shapes import random_model
from zo2jax.tasks.text import HeldOut, TextBatches, TextData

EPS = 1e-3
ESTIMATORS: dict[str, tuple[Callable[[], zo.Estimator], float]] = {
    "two_point": (lambda: zo.two_point(EPS), 1e-4),
    "averaged(two_point, 4)": (lambda: zo.averaged(zo.two_point(EPS), 4), 5e-4),
    "leave_one_out(8)": (lambda: zo.leave_one_out(8, EPS), 1e-3),
    "one_sided(8)": (lambda: zo.one_sided(8, EPS), 3e-3),
}
"""How each is made, and its learning rate: the best of those in docs/LOG.md for stories260K on Shakespeare's plays."""
POINTS = 40
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


def curves(setting: Setting, estimator: zo.Estimator, rate: float, steps: int, seeds: list[int]) -> np.ndarray:
    """Held-out losses, [seeds, POINTS + 1]: at first, and after each so many steps. All seeds go together."""
    model, between = setting.model, max(steps // POINTS, 1)
    algorithm = zo.mezo(model.loss, estimator, zo.sgd(rate))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    state = jax.vmap(partial(algorithm.init, model.params))(keys)
    look = jax.jit(jax.vmap(lambda state: model.loss(state.params, setting.held_out)))
    train = jax.jit(jax.vmap(lambda state, batches: jax.lax.scan(algorithm.step, state, batches)[0]), donate_argnums=0)
    data = [TextBatches(setting.text.train, setting.batch, between * POINTS, seed) for seed in seeds]
    losses = [look(state)]
    for point in range(POINTS):
        chosen = [_stacked([one[i] for i in range(point * between, (point + 1) * between)]) for one in data]
        state = train(state, _stacked(chosen))
        losses.append(look(state))
    return np.stack(losses, axis=1)


def expected(shape: str, machine: str, batch: int, tokens: int) -> list[float]:
    """Seconds of a step with each estimator where all blocks of a shape are in host memory."""
    on, model = find(machine), random_model(shape)
    given = {"rows": batch, "tokens": tokens, "tier": "host", "machine": on}
    return [zo.plan(model, make(), **given).expected(on) for make, _ in ESTIMATORS.values()]


def _stacked(trees: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def draw(found: dict[str, np.ndarray], steps: int, seconds: list[float], where: str, output: Path) -> None:
    """The mean over the seeds of each, and from the lowest to the highest: by passes, and by the time of a stream.

    Each panel ends where the first of them does.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels, done = figure.subplots(1, 2, sharey=True), np.linspace(0, steps, POINTS + 1)
    for (name, losses), each in zip(found.items(), seconds, strict=True):
        members, mean = len(ESTIMATORS[name][0]().probes), losses.mean(axis=0)
        for axes, at, end in zip(panels, (done * members, done * each), (2 * steps, min(seconds) * steps), strict=True):
            shown = at <= end * 1.001
            (line,) = axes.plot(at[shown], mean[shown], label=f"{name}: {np.interp(end, at, mean):.3f}")
            span = losses.min(axis=0)[shown], losses.max(axis=0)[shown]
            axes.fill_between(at[shown], *span, color=line.get_color(), alpha=0.2, linewidth=0)
    panels[0].set(xlabel="forward passes of a batch", ylabel="held-out loss, nats per token")
    panels[1].set(xlabel=f"seconds of steps of {where}, " + ", ".join(f"{each:.3g}" for each in seconds) + " each")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(output, dpi=110)


def main(
    model: str = "",
    data: str = "",
    steps: int = 1000,
    seeds: int = 3,
    batch: int = 16,
    tokens: int = 64,
    shape: str = "opt-13b",
    machine: str = "h200",
    seconds: tuple[float, ...] = (),
    output: Path = Path("estimators.png"),
) -> dict[str, np.ndarray]:
    """Trains, prints and draws; gives the losses, [seeds, POINTS + 1] of each estimator."""
    each = list(seconds) or expected(shape, machine, batch, tokens)
    if len(each) != len(ESTIMATORS):
        raise ValueError(f"seconds has {len(each)} numbers, expected one for each of {', '.join(ESTIMATORS)}")
    loaded = zo.load(model or model_folder(), dtype="float32")
    setting = Setting(loaded, load_text_or_docstrings(loaded, data, tokens=tokens, batch=batch), batch)
    found = {}
    for name, (make, rate) in ESTIMATORS.items():
        losses = found[name] = curves(setting, make(), rate, steps, list(range(seeds)))
        last = "  ".join(f"{loss:.4f}" for loss in losses[:, -1])
        print(f"{name:24} {losses[0, 0]:.4f} -> {losses[:, -1].mean():.4f} ({last}), rate {rate:g}", flush=True)
    draw(found, steps, each, f"{shape} on {machine}", output)
    return found


if __name__ == "__main__":
    tyro.cli(main)
