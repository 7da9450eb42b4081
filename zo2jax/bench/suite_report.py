"""What the suite found: a line for each cell, a table in Markdown, and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zo2jax.bench.report import number

Outcome = Mapping[str, Any]
_GIB = 2**30
_STEPS = (
    *("cell", "ms", "tokens/s", "peak GPU, GiB", "expected", "peak host, GiB", "link", "floor, ms", "ms / floor"),
    "command",
)
_GOALS = ("cell", "held-out loss", "steps", "seconds", "ms a step", "command")


def line(name: str, found: Outcome) -> str:
    """One cell in a line.

    >>> line("opt-13b/dense/host/1", {"ms": 500.0, "tokens_per_s": 4096.0, "peak_host_gib": 29.0})
    'opt-13b/dense/host/1: 500.0 ms, 4096 tokens/s, host 29.0 GiB'
    >>> line("opt-30b/dense/device/1", {"skipped": "needs 60.0 GiB"})
    'opt-30b/dense/device/1: skipped: needs 60.0 GiB'
    """
    for what in ("skipped", "error"):
        if what in found:
            return f"{name}: {what}: {found[what]}"
    if "target" in found:
        return f"{name}: {_reached(found)}, {found['first_loss']:.3f} to {found['loss']:.3f}"
    parts = [f"{found['ms']:.1f} ms", f"{found['tokens_per_s']:.0f} tokens/s"]
    parts += [
        f"{where} {found[f'peak_{where}_gib']:.{digits}f} GiB"
        for where, digits in (("device", 2), ("host", 1))
        if found.get(f"peak_{where}_gib") is not None
    ]
    if found.get("link_share") is not None:
        parts.append(f"link {found['link_share']:.0%}")
    if found.get("floor_ratio") is not None:
        parts.append(f"{found['floor_ratio']:.2f} of the floor ({found['bound']}, {found['floor_ms']:.1f} ms)")
    return f"{name}: {', '.join(parts)}"


def _reached(found: Outcome) -> str:
    if found["seconds"] is None:
        return f"not reached in {found['curve'][-1][0]} steps"
    return f"{found['steps']} step{'s' * (found['steps'] != 1)}, {found['seconds']:.1f} s"


def markdown(found: Mapping[str, Any]) -> str:
    """Tables of steps, baselines and times to a loss, each row with its command; then what is not in them, and why.

    >>> print(markdown({"device": "d", "versions": {"jax": "1"}, "cells": {"a": {"skipped": "needs more"}}}))
    d, jax 1
    <BLANKLINE>
    - a: skipped: needs more
    <BLANKLINE>
    """
    cells: dict[str, Outcome] = found["cells"]
    done = {name: one for name, one in cells.items() if "ms" in one}
    parts = [f"{found['device']}, " + ", ".join(f"{name} {which}" for name, which in found["versions"].items())]
    goals = {name: one for name, one in done.items() if "target" in one}
    steps = {name: one for name, one in done.items() if name not in goals}
    if steps:
        parts.append(_table(_STEPS, [_row(name, one) for name, one in steps.items()]))
    if goals:
        parts.append(_table(_GOALS, [_goal_row(name, one) for name, one in goals.items()]))
    if rest := [line(name, one) for name, one in cells.items() if name not in done]:
        parts.append("\n".join(f"- {text}".replace("\n", " ") for text in rest))
    return "\n\n".join(parts) + "\n"


def _row(name: str, one: Outcome) -> list[str]:
    share, bound = one.get("link_share"), one.get("bound")
    floor = number(one.get("floor_ms"), 1) + (f" ({bound})" if bound else "")
    return [
        name,
        number(one["ms"], 1),
        number(one["tokens_per_s"], 0),
        number(one.get("peak_device_gib")),
        number(_expected(one)),
        number(one.get("peak_host_gib"), 1),
        "-" if share is None else f"{share:.0%}",
        floor,
        number(one.get("floor_ratio")),
        f"`{one['command']}`",
    ]


def _goal_row(name: str, one: Outcome) -> list[str]:
    losses = f"{one['first_loss']:.3f} to {one['loss']:.3f}"
    steps = f"not in {one['curve'][-1][0]}" if one["steps"] is None else str(one["steps"])
    return [name, losses, steps, number(one["seconds"], 1), number(one["ms"], 1), f"`{one['command']}`"]


def _expected(one: Outcome) -> float | None:
    """Device memory that was expected, GiB; None where nobody counts what is there."""
    expected = one.get("expected") or {}
    return expected["device"] / _GIB if expected.get("device") else None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def plots(found: Mapping[str, Any], folder: Path) -> None:
    """``speed.png``, tokens/s and what the floor allows; ``memory.png``, peaks and what of the device was expected.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plots({"device": "d", "cells": {"a": {"ms": 2.0, "tokens_per_s": 9.0, "floor_ms": 1.0}}}, Path(folder))
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['memory.png', 'speed.png']
    """
    cells = {name: one for name, one in found["cells"].items() if "tokens_per_s" in one}
    speed = {"measured": [one["tokens_per_s"] for one in cells.values()]}
    floors = [one.get("floor_ms") for one in cells.values()]
    allowed = [f and one["tokens_per_s"] * one["ms"] / f for f, one in zip(floors, cells.values(), strict=True)]
    where = f"tokens a second, {found['device']}"
    _bars(list(cells), speed, ("at the highest floor", allowed), where, folder / "speed.png")
    peaks = {what: [one.get(f"peak_{what}_gib") for one in cells.values()] for what in ("device", "host")}
    expected = [_expected(one) for one in cells.values()]
    _bars(list(cells), peaks, ("device, expected", expected), "peak memory, GiB", folder / "memory.png")


def _bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    marks: tuple[str, Sequence[float | None]],
    label: str,
    file: Path,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.3 * len(names)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(series)
    for i, (what, values) in enumerate(series.items()):
        at = [y - 0.4 + (i + 0.5) * height for y in range(len(names))]
        axes.barh(at, [value or 0.0 for value in values], height, label=what)
    what, values = marks
    shown = [(value, y - 0.4 + 0.5 * height) for y, value in enumerate(values) if value]  # on the first of the bars
    if shown:
        size = 16 * height
        axes.plot(*zip(*shown, strict=True), "|", color="black", markersize=size, markeredgewidth=2, label=what)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set(xlabel=label, ylim=(max(len(names), 1) - 0.5, -0.5))
    if lowest := [value for values in (*series.values(), marks[1]) for value in values if value]:
        axes.set(xscale="log", xlim=(min(lowest) / 2, None))
    axes.grid(alpha=0.3, axis="x", which="both")
    figure.legend(loc="outside upper right", ncols=3, fontsize="small")
    figure.savefig(file, dpi=120)
