"""``zo2jax bench ablation``: what each part of the stream is worth, added one after the other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from zo2jax.bench.process import measured, new_file
from zo2jax.bench.report import ablation_table, save, title
from zo2jax.bench.throughput import NO_PREALLOCATION, Setting, measure


def rows(setting: Setting) -> list[tuple[str, Setting]]:
    """Settings by name: none of the parts, then one more in each row, up to the setting itself.

    Raises:
        ValueError: if nothing is streamed, or nothing uploaded ahead.

    >>> [name for name, _ in rows(Setting("tiny"))][:2]
    ['pageable memory', '+ page-locked memory']
    """
    if setting.tier == "device" or setting.prefetch == 0:
        raise ValueError(f"tier {setting.tier} with prefetch {setting.prefetch}: expected host or disk, and 1 or more")
    parts: dict[str, dict[str, Any]] = {
        "+ page-locked memory": {"pinned": True},
        f"+ prefetch of {setting.prefetch}": {"prefetch": setting.prefetch},
        "+ overlapped write-back": {"overlap": True},
        "+ fused kernels": {"kernels": True},
    }
    settings = [replace(setting, pinned=False, prefetch=0, overlap=False, kernels=False)]
    for part in parts.values():
        settings.append(replace(settings[-1], **part))
    return list(zip(("pageable memory", *parts), settings, strict=True))


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
    for name, one in rows(setting):
        found.append({"name": name} | measured(name, measure, one, False, env=NO_PREALLOCATION))
        console.print(f"{name}: {found[-1]['ms']:.1f} ms")
        result = {key: found[-1][key] for key in ("setting", *shared)}
        result["rows"] = [{key: value for key, value in row.items() if key not in shared} for row in found]
        save(result, path)
    console.print(ablation_table(found, title(found[-1])))
    return result
