"""Backpropagation through the last blocks, and zeroth order for the rest: held-out loss against time and steps.

    python examples/compare_hybrid.py --model stories260K --data tinyshakespeare.txt --output hybrid.png

Without a model and a text: the small model that comes with the package, and the documentation of Python's library.
"""

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

import zo2jax as zo
from zo2jax.demo import load_text_or_docstrings, model_folder
from zo2jax.tasks.text import HeldOut, TextBatches, TextData

EPS = 1e-3
Choice = tuple[float, int, float]
CHOICES: dict[str, Choice] = {
    "zeroth order": (1e-4, 0, 0.0),
    "hybrid, last_blocks(1)": (1e-4, 1, 1e-2),
    "hybrid, last_blocks(3)": (1e-4, 3, 3e-3),
    "hybrid, last_blocks(5)": (1e-4, 5, 3e-3),
    "last_blocks(3) alone": (0.0, 3, 3e-3),
}
"""The learning rate of zeroth-order leaves, that of configs/stories260k_shakespeare.py; how many of the last blocks are
first-order; and the learning rate of AdamW, the best of those in docs/LOG.md."""


@dataclass
class Curve:
    """Of one run: what its training took, without evaluations, and what it found."""

    run: zo.Run
    batches: TextBatches
    seconds: list[float] = field(default_factory=lambda: [0.0])
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def look(self, held_out: HeldOut) -> None:
        """Evaluates."""
        self.steps.append(self.run.steps_done)
        self.losses.append(self.run.evaluate(held_out))

    def train(self, until: float) -> None:
        """Steps until they have taken so many seconds in all."""
        began, before = time.perf_counter(), self.seconds[-1]
        while before + time.perf_counter() - began < until:
            self.run.step(self.batches[self.run.steps_done])
        self.run.flush()
        self.seconds.append(before + time.perf_counter() - began)


def compare(
    model: zo.Model, text: TextData, choices: dict[str, Choice], batch: int, seconds: float, points: int
) -> dict[str, Curve]:
    """All runs take turns, so that what else the machine does is the same for all of them."""
    held_out, curves = HeldOut(text.held_out, batch), {}
    with ExitStack() as stack:
        for name, (rate, blocks, adamw) in choices.items():
            how = zo.hybrid(first_order=zo.last_blocks(blocks), optimizer=optax.adamw(adamw)) if blocks else None
            directory, key = stack.enter_context(tempfile.TemporaryDirectory()), jax.random.key(0)
            options = {"directory": directory, "key": key, "hybrid": how, "replay_within": float("inf")}
            run = stack.enter_context(zo.Run(model, zo.two_point(EPS), zo.sgd(rate), **options))
            curves[name] = Curve(run, TextBatches(text.train, batch, 10**6, 0))
            curves[name].look(held_out)
            run.step(curves[name].batches[0])  # what is compiled is in nobody's time
            run.flush()
        for point in range(1, points + 1):
            for curve in curves.values():
                curve.train(seconds * point / points)
                curve.look(held_out)
    return curves


def draw(curves: dict[str, Curve], output: Path) -> None:
    """Against seconds, and against steps."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), ("seconds", "steps"), strict=True):
        for name, curve in curves.items():
            axes.plot(getattr(curve, unit), curve.losses, "o-", markersize=3, label=f"{name}: {curve.losses[-1]:.3f}")
        axes.set(xlabel=f"{unit} of training", ylabel="held-out loss, nats per token")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)


def main(
    model: str = "",
    data: str = "",
    seconds: float = 150.0,
    points: int = 15,
    batch: int = 16,
    tokens: int = 64,
    output: Path = Path("hybrid.png"),
) -> dict[str, Curve]:
    """Trains, prints and draws."""
    loaded = zo.load(model or model_folder(), dtype="float32")
    text = load_text_or_docstrings(loaded, data, tokens=tokens, batch=batch)
    curves = compare(loaded, text, CHOICES, batch, seconds, points)
    for name, curve in curves.items():
        each = 1e3 * curve.seconds[-1] / (curve.steps[-1] - 1)
        at = np.interp(min(c.steps[-1] for c in curves.values()), curve.steps, curve.losses)
        print(
            f"{name:24} {curve.losses[0]:.4f} -> {curve.losses[-1]:.4f} in {curve.seconds[-1]:.0f} s, "
            f"{curve.steps[-1]} steps of {each:.1f} ms; {at:.4f} after as many steps as the slowest",
            flush=True,
        )
    draw(curves, output)
    return curves


if __name__ == "__main__":
    tyro.cli(main)
