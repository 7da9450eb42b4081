"""What an estimator makes of its forward passes, and of its steps: held-out losses over several seeds.

    python examples/compare_estimators.py --model stories260K --data tinyshakespeare.txt --output estimators.png

Where a model streams and the bus is the bottleneck, a step takes about as long with many forward passes as with two, as
all members share what is uploaded: the second panel has the time of equal steps of such a model, by the two times of
``--streamed-ms``, of a step of 2 and of one of 40 members (`zo2jax bench population`). Without a model and a text: the
small model that comes with the package, and the documentation of Python's library.
"""

import tempfile
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
from zo2jax.demo import model_folder
from zo2jax.tasks.stdlib import docstrings
from zo2jax.tasks.text import HeldOut, TextBatches, TextData, load_text

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


def _stacked(trees: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def draw(found: dict[str, np.ndarray], steps: int, streamed_ms: tuple[float, float], output: Path) -> None:
    """The mean over the seeds of each, and from the lowest to the highest: by passes, and by time of a stream."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    (passes, time), done = figure.subplots(1, 2, sharey=True), np.linspace(0, steps, POINTS + 1)
    few, many = streamed_ms
    for name, losses in found.items():
        members = len(ESTIMATORS[name][0]().probes)
        ms = few + (many - few) * (members - 2) / 38
        within = done * members <= 2 * steps
        for axes, at, shown in ((passes, done * members, within), (time, done * ms / 1e3, done >= 0)):
            mean, label = losses.mean(axis=0)[shown], f"{name}: {losses.mean(axis=0)[shown][-1]:.3f}"
            (line,) = axes.plot(at[shown], mean, label=label)
            span = losses.min(axis=0)[shown], losses.max(axis=0)[shown]
            axes.fill_between(at[shown], *span, color=line.get_color(), alpha=0.2, linewidth=0)
    passes.set(xlabel="forward passes of a batch", ylabel="held-out loss, nats per token")
    time.set(xlabel=f"seconds, if a step streams: {few:g} ms with 2 members, {many:g} with 40")
    for axes in (passes, time):
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
    streamed_ms: tuple[float, float] = (244.0, 272.0),
    output: Path = Path("estimators.png"),
) -> dict[str, np.ndarray]:
    """Trains, prints and draws; gives the losses, [seeds, POINTS + 1] of each estimator."""
    loaded = zo.load(model or model_folder(), dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        if not data:
            data = str(Path(folder) / "docstrings.txt")
            Path(data).write_text(docstrings(), encoding="utf-8")
        setting = Setting(loaded, load_text(loaded, data, tokens=tokens, batch=batch), batch)
    found = {}
    for name, (make, rate) in ESTIMATORS.items():
        losses = found[name] = curves(setting, make(), rate, steps, list(range(seeds)))
        each = "  ".join(f"{loss:.4f}" for loss in losses[:, -1])
        print(f"{name:24} {losses[0, 0]:.4f} -> {losses[:, -1].mean():.4f} ({each}), rate {rate:g}", flush=True)
    draw(found, steps, streamed_ms, output)
    return found


if __name__ == "__main__":
    tyro.cli(main)
