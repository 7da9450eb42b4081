"""``zo2jax bench compare``: two files of numbers, cell by cell, and what has become worse."""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LOWER = (
    *("ms", "plain_ms", "replay_ms", "replay_s", "during_ms", "checkpoint_s", "apart_ms", "pairs_ms", "backward_ms"),
    *("seconds", "steps", "peak_device_gib", "peak_host_gib", "apart_peak_gib", "backward_peak_gib"),
)
"""Figures of the commands of ``zo2jax bench`` that are better when they are lower."""
HIGHER = ("tokens_per_s", "replayed_per_s")
"""Those that are better when they are higher."""
OF_MACHINE = ("link_up_gib_s", "link_both_gib_s", "disk_read_gib_s", "disk_both_gib_s", "compute_tflops")
"""Rates of the machine, which say why others differ."""

TOLERANCE = 0.05


@dataclass(frozen=True)
class Change:
    """A figure of a cell in two files.

    >>> Change("opt-13b/dense/host/1", "ms", 500.0, 550.0).worse(0.05)
    True
    """

    cell: str
    figure: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """The second in the first."""
        return self.after / self.before

    def worse(self, tolerance: float) -> bool:
        """Whether it is worse by more than a fraction of what it was; rates of the machine never are."""
        if self.figure in LOWER:
            return self.after > self.before * (1 + tolerance)
        return self.figure in HIGHER and self.after * (1 + tolerance) < self.before


@dataclass(frozen=True)
class Comparison:
    """What two files say.

    >>> Comparison((Change("a", "ms", 1.0, 2.0),), (), ()).regressions(0.05)[0].figure
    'ms'
    """

    changes: tuple[Change, ...]
    differs: tuple[str, ...]
    """Device, versions, settings that are not the same, and cells that only one of them has."""
    lost: tuple[str, ...]
    """Cells that the first has, and that failed in the second, or did not reach their loss there."""

    def regressions(self, tolerance: float) -> list[Change]:
        """What is worse."""
        return [change for change in self.changes if change.worse(tolerance)]


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Compares the numbers of two files, of the suite or of the same other command.

    Raises:
        ValueError: if they have no figure of a cell in common.

    >>> compare({"ms": 2.0, "device": "x"}, {"ms": 1.0, "device": "y"}).differs
    ("device: 'x' in the first, 'y' in the second",)
    """
    first, second = dict(_cells(a)), dict(_cells(b))
    changes = tuple(
        Change(name, figure, first[name][figure], second[name][figure])
        for name in first
        if name in second
        for figure in (*LOWER, *HIGHER, *OF_MACHINE)
        if _is_number(first[name].get(figure)) and _is_number(second[name].get(figure))
    )
    if not changes:
        raise ValueError("the files have no figure of a cell in common: expected two of one command of zo2jax bench")
    lost = tuple(name for name in first if name in second and not _failed(first[name]) and _failed(second[name]))
    return Comparison(changes, tuple(_differs(a, b, first, second)), lost)


def _failed(cell: Mapping[str, Any]) -> bool:
    return "error" in cell or ("target" in cell and cell["seconds"] is None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _cells(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """By name, those of a suite, the rows of an ablation, or all numbers of another command; skipped cells are none."""
    if "cells" in found:
        yield from ((name, cell) for name, cell in found["cells"].items() if "skipped" not in cell)
    elif "rows" in found:
        yield from ((row["name"], row) for row in found["rows"])
    else:
        yield "", found


def _differs(
    a: Mapping[str, Any], b: Mapping[str, Any], first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[str]:
    of_files = [{"device": found.get("device")} | dict(found.get("versions", {})) for found in (a, b)]
    yield from _unlike("", *of_files)
    for name in [name for name in first if name in second]:
        yield from _unlike(
            f"{name} " if name else "", *(cell.get("setting", {}) for cell in (first[name], second[name]))
        )
    for where, cells, others in (("first", first, second), ("second", second, first)):
        if only := [name for name in cells if name not in others]:
            yield f"only in the {where}: {', '.join(only)}"


def _unlike(of: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*was, *now]):
        if was.get(key) != now.get(key):
            yield f"{of}{key}: {was.get(key)!r} in the first, {now.get(key)!r} in the second"


def read(path: str | Path) -> dict[str, Any]:
    """The numbers of a file.

    Raises:
        ValueError: if it holds no JSON object, or is not there.

    >>> read("no/such.json")
    Traceback (most recent call last):
    ValueError: no/such.json cannot be read (No such file or directory): expected a JSON file of zo2jax bench
    """
    try:
        found = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be read ({said}): expected a JSON file of zo2jax bench") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, expected a JSON object of zo2jax bench")
    return found


def table(comparison: Comparison, tolerance: float) -> Table:
    """A line for each figure; what is worse is marked.

    >>> table(Comparison((Change("a", "ms", 1.0, 2.0),), (), ()), 0.05).row_count
    1
    """
    shown = Table()
    for column in ("cell", "figure", "first", "second", "second / first", ""):
        shown.add_column(column, justify="left" if column in ("cell", "figure", "") else "right", no_wrap=True)
    above = None
    for change in comparison.changes:
        marked = "worse" if change.worse(tolerance) else "(machine)" if change.figure in OF_MACHINE else ""
        figures = (f"{change.before:.4g}", f"{change.after:.4g}", f"{change.ratio:.3f}")
        shown.add_row("" if change.cell == above else change.cell, change.figure, *figures, marked)
        above = change.cell
    return shown


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``zo2jax bench compare``.

    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser)
    >>> parser.parse_args(["a.json", "b.json"]).tolerance
    0.05
    """
    sub.add_argument("files", nargs=2, metavar="FILE", help="suite.json, or what --json of another command wrote")
    sub.add_argument("--tolerance", type=float, default=TOLERANCE, help="how much worse counts, as a fraction (0.05)")


def run(arguments: argparse.Namespace) -> None:
    """Prints the comparison.

    Raises:
        RuntimeError: if something is worse in the second file.
        ValueError: for files that cannot be compared, or a negative tolerance.
    """
    if arguments.tolerance < 0:
        raise ValueError(f"tolerance is {arguments.tolerance}, expected 0 or more")
    first, second = map(read, arguments.files)
    comparison = compare(first, second)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table(comparison, arguments.tolerance))
    for text in comparison.differs:
        console.print(text)
    worse = [f"{change.cell} {change.figure}".strip() for change in comparison.regressions(arguments.tolerance)]
    if worse or comparison.lost:
        told = [f"{len(worse)} figures are worse by more than {arguments.tolerance:.0%}: {', '.join(worse)}"] * bool(
            worse
        )
        told += [f"failed in the second: {', '.join(comparison.lost)}"] * bool(comparison.lost)
        raise RuntimeError("; ".join(told))
