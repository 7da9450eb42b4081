"""``zo2jax bench suite``: many measurements in one folder, each in a process of its own; the same command goes on."""

import argparse
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from zo2jax.bench.cells import STEPS, Cell, Needs, all_cells, chosen_cells, look
from zo2jax.bench.peers import DTYPES, Peer, named
from zo2jax.bench.process import measured
from zo2jax.bench.report import save
from zo2jax.bench.suite_report import line, markdown, plots
from zo2jax.bench.throughput import NO_PREALLOCATION

LIMIT_S = 600.0
"""Seconds after which a cell is ended."""

_SCRATCH = "scratch-"


def suite(
    cells: Sequence[Cell],
    directory: str | Path,
    *,
    only: Sequence[str] = (),
    limit_s: float = LIMIT_S,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures the cells that a folder lacks, and writes ``suite.json``, ``suite.md``, ``speed.png``, ``memory.png``.

    Each is written to ``cells/NAME.json`` in the folder as soon as it is measured, and is not measured again unless the
    device, a version or the cell's setting is another one. What the machine cannot hold is skipped, with the reason, as
    is what lacks something that it has to be given. Programs that cells share are compiled once, in ``compiled``.

    Args:
        cells: such as `zo2jax.bench.cells.all_cells`.
        directory: made if it is not there; page files lie in it while a cell is measured.
        only: patterns (`fnmatch`) of names; all if there are none.
        limit_s: seconds after which a cell is ended, which is a failure of this cell.
        console: where lines are printed.

    Raises:
        ValueError: for a pattern that names no cell, before anything is run.
        BlockingIOError: if another suite measures in the folder.
        RuntimeError: at the end, if cells failed; all others were measured and written.

    >>> suite(all_cells(), "no/such/folder", only=["opt-1b/*"])
    Traceback (most recent call last):
    ValueError: --only 'opt-1b/*' names no cell, such as opt-13b/dense/host/1 or 'opt-13b/*': see --list
    """
    chosen, folder = chosen_cells(cells, only), Path(directory).expanduser()
    console = console or Console(highlight=False, soft_wrap=True)
    with _alone(folder):
        found, failed = _measured(cells, chosen, folder, limit_s, console)
        plots(found, folder)
    console.print(f"{folder / 'suite.json'}, suite.md, speed.png, memory.png")
    if failed:
        names = ", ".join(failed)
        raise RuntimeError(f"{len(failed)} of {len(chosen)} cells failed: {names}; the same command tries again")
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes and locks the folder, and removes what a suite that was killed left there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another suite measures in {folder}: wait, or give another --directory") from None
        for left in folder.glob(f"{_SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _measured(
    cells: Sequence[Cell], chosen: Sequence[Cell], folder: Path, limit_s: float, console: Console
) -> tuple[dict[str, Any], list[str]]:
    """(all that is known in the end, the names of those that failed)."""
    asked = [(cell.name, cell.what) for cell in cells if cell.peer is None]
    machine = measured("machine", look, asked, env=NO_PREALLOCATION)
    outcomes = {cell.name: known for cell in cells if (known := _known(cell, folder, machine, console, cell in chosen))}
    found = _write(cells, folder, machine, outcomes)
    for cell in chosen:
        before = " (measured before)" if cell.name in outcomes else ""
        if not before:
            outcomes[cell.name] = _outcome(cell, folder, machine, limit_s)
        console.print(line(cell.name, outcomes[cell.name]) + before)
        found = _write(cells, folder, machine, outcomes)
    return found, [cell.name for cell in chosen if "error" in outcomes[cell.name]]


def _write(
    cells: Sequence[Cell], folder: Path, machine: Mapping[str, Any], outcomes: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes all that is known so far, in the order of the cells, so that a suite that is ended leaves its table."""
    about = {cell.name: {"command": cell.command, "expected": machine["needs"].get(cell.name)} for cell in cells}
    found = {"device": machine["device"], "versions": machine["versions"]}
    found["cells"] = {name: outcomes[name] | about[name] for name in about if name in outcomes}
    save(found, folder / "suite.json")
    (folder / "suite.md").write_text(markdown(found))
    return found


def _file(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _known(cell: Cell, folder: Path, machine: Mapping[str, Any], console: Console, said: bool) -> dict[str, Any] | None:
    """What was measured before, unless it is of something else; that is said if the cell is measured again."""
    try:
        known: dict[str, Any] = json.loads(_file(cell, folder).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict) or not isinstance(known.get("versions"), dict):
        return None
    if not (changes := _changes(known, cell, machine)):
        return known
    if said:
        console.print(f"{cell.name}: measured again, since {changes}")
    return None


def _changes(known: Mapping[str, Any], cell: Cell, machine: Mapping[str, Any]) -> str:
    """In what a measurement differs from what would be measured now."""
    then = {"device": known.get("device")} | dict(known.get("versions", {}))
    now = {"device": machine["device"]} | machine["versions"]
    changes = [f"{name} was {then.get(name)}, and is {value}" for name, value in now.items() if then.get(name) != value]
    was = known.get("setting", {})
    setting = was if cell.missing else cell.setting  # what is not given now was given then
    names = [name for name in {**was, **setting} if was.get(name) != setting.get(name)]
    return "; ".join(changes + [f"{name} was {was.get(name)}, and is {setting.get(name)}" for name in names])


def _outcome(cell: Cell, folder: Path, machine: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
    """What was measured, and written; {"skipped": why}; or {"error": what}."""
    if reason := cell.missing or _lacking(cell, folder, machine):
        return {"skipped": reason}
    env = {"JAX_COMPILATION_CACHE_DIR": str((folder / "compiled").resolve())} | machine["env"].get(cell.name, {})
    try:
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch:
            found = cell.measure(Path(scratch).resolve(), env, limit_s)
    except RuntimeError as error:
        return {"error": str(error)}
    found = {"device": machine["device"]} | found | {"versions": machine["versions"] | found["versions"]}
    file = _file(cell, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    save(found, file)
    return found


def _lacking(cell: Cell, folder: Path, machine: Mapping[str, Any]) -> str:
    if cell.name not in machine["needs"]:
        return ""  # a peer, which says itself what it lacks
    has = machine["has"] | {"disk": shutil.disk_usage(folder).free}
    return Needs(**machine["needs"][cell.name]).lacking(Needs(**has))


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``zo2jax bench suite``.

    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser)
    >>> parser.parse_args(["--only", "opt-13b/*", "--steps", "3"]).only
    ['opt-13b/*']
    """
    sub.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="such as 'opt-13b/*'; all if not given")
    sub.add_argument("--directory", default="suite", metavar="FOLDER", help="where all is written (suite)")
    sub.add_argument("--list", action="store_true", dest="listed", help="show the names and commands of the cells")
    sub.add_argument("--steps", type=int, default=STEPS, help="steps that are timed in a cell, each by itself")
    sub.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="of a cell, which is ended then")
    data = os.environ.get("ZO2JAX_TEST_DATA")
    sub.add_argument("--data", default=data, metavar="FOLDER", help="with stories260K and tinyshakespeare.txt")
    sub.add_argument("--peer", metavar="zo2=FOLDER", help="a checkout of the PyTorch ZO2, which is run as well")
    sub.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="a Python with its requirements")
    sub.add_argument("--peer-dtype", default="float16", choices=DTYPES, help="of its weights")


def run(arguments: argparse.Namespace) -> None:
    """Does what parsed arguments say.

    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser)
    >>> run(parser.parse_args(["--list", "--only", "opt-1.3b/dense/disk/1"]))
    opt-1.3b/dense/disk/1  zo2jax bench throughput --model opt-1.3b --batch 1 --tokens 2048 --mode dense --tier disk \
--steps 5 --warm-ups 1
    """
    peer = None
    if arguments.peer is not None:
        peer = Peer(named(arguments.peer), arguments.peer_python, arguments.peer_dtype)
    cells = all_cells(arguments.steps, arguments.data, peer)
    if not arguments.listed:
        suite(cells, arguments.directory, only=arguments.only, limit_s=arguments.limit)
        return
    chosen = chosen_cells(cells, arguments.only)
    for cell in chosen:
        print(f"{cell.name:<{max(len(cell.name) for cell in chosen)}}  {cell.missing or cell.command}")
