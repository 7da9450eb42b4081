"""The held-out losses of several runs in one picture.

    python examples/plot_runs.py --output losses.png --runs dense runs/dense int8 runs/int8

Each run is a label and its directory, of which metrics.jsonl is read.
"""

from pathlib import Path

import tyro
from matplotlib.figure import Figure

from zo2jax.metrics import read_metrics


def main(runs: dict[str, Path], output: Path = Path("losses.png"), title: str = "", first: int = 0) -> dict[str, float]:
    """Draws the losses from step ``first`` on; prints and gives the last one of each run."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    last = {}
    for label, directory in runs.items():
        held = [(x["step"], x["eval/loss"]) for x in read_metrics(directory) if x.get("eval/loss") is not None]
        last[label] = held[-1][1]
        shown = [(step, loss) for step, loss in held if step >= first]
        named = f"{label}: {held[0][1]:.2f} to {last[label]:.3f}"
        axes.plot(*zip(*shown, strict=True), "o-", markersize=3, linewidth=1.2, label=named)
        print(f"{label}: {held[0][1]:.4f} -> {last[label]:.4f} after {held[-1][0]} steps")
    axes.set(xlabel="step", ylabel="held-out loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)
    return last


if __name__ == "__main__":
    tyro.cli(main)
