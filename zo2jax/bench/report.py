"""Tables of what was measured, and files of all its numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Numbers = Mapping[str, Any]


def save(found: Numbers, path: Path | None) -> None:
    """Writes one JSON object, if there is a path.

    >>> save({}, None)
    """
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


def number(value: float | None, digits: int = 2) -> str:
    """A figure of a table, "-" for what does not apply.

    >>> number(3.14159), number(None)
    ('3.14', '-')
    """
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(a: float | None, b: float | None) -> float | None:
    """How many times b goes into a; None if one is not there, or b is 0.

    >>> ratio(3.0, 2.0), ratio(None, 2.0)
    (1.5, None)
    """
    return a / b if a is not None and b else None


_EXAMPLE: dict[str, Any] = {
    "setting": {"model": "tiny", "layers": 2, "rows": 1, "tokens": 8, "mode": "dense", "tier": "host", "prefetch": 1}
    | {"device_memory": "4GiB", "steps": 10},
    "parameters": 5 * 10**8,
    "device": "cpu",
    "versions": {"jax": "0.11.2"},
}
"""What every measurement says of itself, of one that was not made."""


def title(found: Numbers) -> str:
    """What was measured, and where.

    >>> title(_EXAMPLE)
    'tiny (0.50 G parameters, cut to 2 layers), 1 x 8 tokens, dense, tier host within 4GiB, prefetch 1; cpu, jax 0.11.2'
    """
    setting = found["setting"]
    cut = "" if setting["layers"] is None else f", cut to {setting['layers']} layers"
    budget = "" if setting["device_memory"] is None else f" within {setting['device_memory']}"
    kept = setting["mode"]
    if setting.get("format"):
        group = f" in groups of {setting['group']}" if setting["group"] else ""
        kept += f", {setting['format']}{group} in {setting['compute']} products"
    return (
        f"{setting['model']} ({found['parameters'] / 1e9:.2f} G parameters{cut}), "
        f"{setting['rows']} x {setting['tokens']} tokens, {kept}, tier {setting['tier']}{budget}, "
        f"prefetch {setting['prefetch']}; {found['device']}, jax {found['versions']['jax']}"
    )


_LINES = (  # what it is called, the figures, digits, and the figures of a peer that stand beside them
    ("step, ms", ("ms",), 1, "ms"),
    ("  without folds / a fold on top", ("plain_ms", "fold_ms"), 1, None),
    ("  expected by the plan / in units of the step", ("expected_ms", "ms_expected_ratio"), 2, None),
    ("tokens/s", ("tokens_per_s",), 0, "tokens_per_s"),
    ("first step with compilation, s", ("first_step_s",), 1, "first_step_s"),
    ("load, s", ("load_s",), 1, "load_s"),
    ("peak device memory, GiB", ("peak_device_gib",), 2, "peak_device_gib"),
    ("  expected by the plan / in it", ("expected_peak_device_gib", "peak_device_gib_expected_ratio"), 2, None),
    ("  reserved by the peer's allocator", (), 2, "reserved_gib"),
    ("  NVML, the process", ("nvml_process_gib",), 2, "nvml_process_gib"),
    ("  NVML, the whole device", ("nvml_device_gib",), 2, None),
    ("peak host memory, GiB", ("peak_host_gib",), 2, "peak_host_gib"),
    ("  expected by the plan / in it", ("expected_peak_host_gib", "peak_host_gib_expected_ratio"), 2, None),
    ("up / down a step, GiB", ("up_gib", "down_gib"), 2, None),
    ("up / down, GiB/s", ("up_gib_s", "down_gib_s"), 1, None),
    ("link up / down / both at once, GiB/s", ("link_up_gib_s", "link_down_gib_s", "link_both_gib_s"), 1, None),
    ("floor of the link, ms", ("link_floor_ms",), 1, None),
    ("  step / floor", ("link_ratio",), 2, None),
    ("disk, read and written, GiB/s", ("disk_both_gib_s",), 2, None),
    ("disk, read, GiB/s", ("disk_read_gib_s",), 2, None),
    ("floor of the disk, ms", ("disk_floor_ms",), 1, None),
    ("  step / floor", ("disk_ratio",), 2, None),
    ("products, TFLOP/s", ("compute_tflops",), 1, None),
    ("floor of the products, ms", ("compute_floor_ms",), 1, None),
    ("  step / floor", ("compute_ratio",), 2, None),
    ("step / the highest floor", ("floor_ratio",), 2, None),
)


def figures_table(found: Numbers, lines: Sequence[tuple[str, Sequence[str], int]], of: str | None = None) -> Table:
    """A line for each label whose figures, of these names and so many digits, were measured; ``of`` is its title.

    >>> figures_table(_EXAMPLE | {"ms": 2.0}, [("step, ms", ("ms",), 1), ("load, s", ("load_s",), 1)]).row_count
    1
    """
    table = Table(title=title(found) if of is None else of, show_header=False)
    for label, names, digits in lines:
        figures = [found.get(name) for name in names]
        if any(figure is not None for figure in figures):
            table.add_row(label, " / ".join(number(figure, digits) for figure in figures))
    return table


def throughput_table(found: Numbers) -> Table:
    """One figure a line, and a peer's beside it with the ratio of the two, if there is one.

    >>> throughput_table(_EXAMPLE | {"ms": 2.0}).row_count
    1
    """
    peer = found.get("peer") or {}
    shown = bool(peer) and "error" not in peer
    caption = f"median of {found['setting']['steps']} steps, each with its loss; probes by {found.get('kernels', '-')}"
    table = Table(title=title(found), caption=caption)
    table.add_column("", no_wrap=True)
    table.add_column("zo2jax", justify="right")
    if shown:
        table.add_column(f"{peer['name']}, {peer['dtype']}", justify="right")
        table.add_column(f"{peer['name']} / zo2jax", justify="right")
    for label, names, digits, beside in _LINES:
        figures = [found.get(name) for name in names]
        theirs = peer.get(beside) if shown and beside else None
        if theirs is None and all(figure is None for figure in figures):
            continue
        cells = [" / ".join(number(figure, digits) for figure in figures) or "-"]
        if shown:
            ours = figures[0] if figures else found.get("peak_device_gib")
            cells += [number(theirs, digits), number(ratio(theirs, ours))]
        table.add_row(label, *cells)
    return table


def ablation_table(rows: Sequence[Numbers], of: str) -> Table:
    """A line for each row: its time, how many times faster it is than that without its change and the first, memory.

    >>> ablation_table([{"name": "a", "ms": 4.0}, {"name": "b", "ms": 2.0, "against": "a"}], "title").row_count
    2
    """
    table, by_name = Table(title=of), {row["name"]: row for row in rows}
    for column in ("", "ms", "x without", "x first", "peak GiB", "probes by"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        without = by_name.get(row.get("against"), {})
        gains = [number(ratio(before.get("ms"), row["ms"])) for before in (without, rows[0])]
        table.add_row(
            row["name"], number(row["ms"], 1), *gains, number(row.get("peak_device_gib")), row.get("kernels", "-")
        )
    return table
