"""``zo2jax bench ablation``: what each part of the stream is worth, and what codes and low-rank directions add."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from zo2jax.bench.process import measured, new_file
from zo2jax.bench.report import ablation_table, save, title
from zo2jax.bench.throughput import NO_PREALLOCATION, Setting, measure

_CODES = "  int8 codes instead"
_LOWRANK = "  low-rank directions instead"
_BOTH = "  low-rank, and int8 codes and products"
_REFRESH = 8
"""Steps between two folds of dense directions over codes; 4 to 16 are usual."""


class Row(NamedTuple):
    """A setting, and what it is compared with.

    >>> Row("+ fused kernels", Setting("tiny"), "+ overlapped write-back").against
    '+ overlapped write-back'
    """

    name: str
    """What has changed."""
    setting: Setting
    against: str | None
    """The name of the row from which it differs by this change alone."""


def rows(setting: Setting) -> list[Row]:
    """None of the parts, then one more in each row, up to the setting itself; then changes of what moves.

    Of a dense bfloat16 setting these are int8 codes, low-rank directions, and both with int8 products, which are all
    that there is.

    Raises:
        ValueError: if nothing is streamed, or nothing uploaded ahead.

    >>> [row.name.strip() for row in rows(Setting("tiny"))][5:]
    ['int8 codes instead', 'low-rank directions instead', 'low-rank, and int8 codes and products']
    """
    if setting.tier == "device" or setting.prefetch == 0:
        raise ValueError(f"tier {setting.tier} with prefetch {setting.prefetch}: expected host or disk, and 1 or more")
    parts: dict[str, dict[str, Any]] = {
        "+ page-locked memory": {"pinned": True},
        f"+ prefetch of {setting.prefetch}": {"prefetch": setting.prefetch},
        "+ overlapped write-back": {"overlap": True},
        "+ fused kernels": {"kernels": True},
    }
    bare = replace(setting, pinned=False, prefetch=0, overlap=False, kernels=False)
    found = [Row("pageable memory", bare, None)]
    for name, part in parts.items():
        found.append(Row(name, replace(found[-1].setting, **part), found[-1].name))
    if setting.mode != "dense" or setting.format is not None:
        return found
    codes = replace(setting, format="int8", refresh=_REFRESH)
    lowrank = Row(_LOWRANK, replace(setting, mode="factored"), found[-1].name)
    both = Row(_BOTH, replace(lowrank.setting, format="int8", compute="int8"), _LOWRANK)
    return [*found, Row(_CODES, codes, found[-1].name), lowrank, both]


def ablation(setting: Setting, json: str | Path | None = None) -> dict[str, Any]:
    """Measures each row in a process of its own, prints a table, and writes all numbers to ``json`` if it is given.

    Rows are printed, and written, as soon as they are measured.

    Raises:
        ValueError: for a setting without a stream, or a file that cannot be written.
        RuntimeError: if a measurement fails.

    >>> ablation(Setting("tiny", tier="device"))
    Traceback (most recent call last):
    ValueError: tier device with prefetch 1: expected host or disk, and 1 or more
    """
    path, found = new_file(json), []
    shared, result, console = ("device", "versions", "parameters"), dict[str, Any](), Console()
    for name, one, against in rows(setting):
        row = {"name": name, "against": against}
        found.append(row | measured(name, measure, one, False, env=NO_PREALLOCATION))
        console.print(f"{name}: {found[-1]['ms']:.1f} ms")
        result = {"setting": asdict(setting)} | {key: found[-1][key] for key in shared}
        result["rows"] = [{key: value for key, value in row.items() if key not in shared} for row in found]
        save(result, path)
    console.print(ablation_table(found, title(found[-1] | result)))
    return result
