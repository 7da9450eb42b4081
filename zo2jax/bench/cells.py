"""The cells of ``zo2jax bench suite``: what each measures, what it needs, and the command that repeats it."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax

from zo2jax.bench.baselines import METHODS, Baseline, measure_baseline
from zo2jax.bench.goal import METHODS as WAYS
from zo2jax.bench.goal import Goal, measure_goal
from zo2jax.bench.peers import Peer, measure_peer
from zo2jax.bench.process import machine, measured
from zo2jax.bench.throughput import NO_PREALLOCATION, Setting, measure
from zo2jax.link import available_memory
from zo2jax.stores import STAGING

_GIB = 2**30
_PROCESS = {"gpu": 5 * _GIB}
"""Host memory of a process with JAX and a GPU, beside weights; see docs/LOG.md. Elsewhere 1 GiB."""

_FIRST = (
    "opt-13b/dense/host/1",
    "opt-13b/factored/host/1",
    "opt-13b/factored-int4/host/1",
    "opt-13b/factored-int8/host/1",
    "opt-30b/dense/host/1",
    "opt-6.7b/dense/host/1",
    "opt-1.3b/dense/host/1",
    "opt-30b/factored-int4/host/1",
)
_THEN = (
    "opt-13b/dense/host/4",
    "opt-13b/factored-int8/host/4",
    "opt-13b/dense/device/1",
    "opt-13b/factored-int8/device/1",
    "opt-6.7b/factored-int8/host/1",
    "opt-1.3b/dense/device/1",
    "opt-6.7b/factored/host/4",
    "opt-1.3b/dense/disk/1",
    "opt-30b/factored-int4/disk/4",
    "opt-13b/dense-int8/host/1",
    "opt-6.7b/factored-int4/disk/1",
    "opt-6.7b/dense/device/4",
    "opt-1.3b/factored/device/16",
    "opt-13b/factored-int4/host/16",
    "opt-30b/factored-int8/device/4",
    "opt-30b/factored/host/16",
)
_COMPARED = ("opt-6.7b", "opt-1.3b")
_FOLDED = 50
_DENSE_FOLDED = 8
_EVERY = {False: 20, True: 1}
"""Steps between evaluations; under True of Adam, which is there soon."""
STEPS = 5
"""That are timed in each cell, unless another number is given."""


@dataclass(frozen=True)
class Cell:
    """One measurement of the suite.

    >>> Cell("opt-tiny/dense/host/1", Setting("opt-tiny")).command
    'zo2jax bench throughput --model opt-tiny --batch 1 --tokens 2048 --mode dense --tier host --steps 10'
    """

    name: str
    what: Setting | Baseline | Goal | None
    missing: str = ""
    """What has to be given before it can be measured."""
    peer: Peer | None = None
    """Which is run in the place of ``what``, with its sizes."""
    flags: tuple[str, ...] = ()
    """Of ``zo2jax bench suite``, that its command needs."""

    @property
    def setting(self) -> Any:
        """Of what is measured, as JSON has it."""
        given = {} if self.what is None else asdict(self.what)
        return json.loads(json.dumps(given if self.peer is None else given | {"peer": asdict(self.peer)}))

    @property
    def command(self) -> str:
        """What measures just this."""
        if isinstance(self.what, Setting) and self.peer is None:
            return f"zo2jax bench throughput {shlex.join(flags_of(self.what))}"
        return f"zo2jax bench suite {shlex.join(['--only', self.name, *self.flags])}"

    def measure(self, scratch: Path, env: Mapping[str, str], limit_s: float) -> dict[str, Any]:
        """Measures it in a process of its own, with its temporary files in ``scratch``.

        Raises:
            RuntimeError: if it fails, or takes too long.
        """
        if self.peer is not None:
            assert isinstance(self.what, Setting)
            return measure_peer(self.peer, self.what, limit_s) | {"setting": self.setting}
        env = NO_PREALLOCATION | {"TMPDIR": str(scratch)} | dict(env)
        functions: dict[type, Any] = {Setting: measure, Baseline: measure_baseline, Goal: measure_goal}
        function = functions[type(self.what)]
        found: dict[str, Any] = measured(self.name, function, self.what, env=env, limit_s=limit_s)
        return found


def flags_of(setting: Setting) -> list[str]:
    """The flags of ``zo2jax bench throughput`` for a setting.

    >>> flags_of(Setting("tiny", tokens=8, format="int8", mode="factored"))[6:]
    ['--mode', 'factored', '--tier', 'host', '--steps', '10', '--format', 'int8']
    """
    default, found = Setting("tiny"), list[str]()
    always = {"model": "model", "rows": "batch", "tokens": "tokens", "mode": "mode", "tier": "tier", "steps": "steps"}
    for name, flag in always.items():
        found += [f"--{flag}", str(getattr(setting, name))]
    for field in fields(Setting):
        value = getattr(setting, field.name)
        if field.name not in always and value != getattr(default, field.name):
            flag = f"--{field.name.replace('_', '-')}"
            found += ["--no-kernels"] if field.name == "kernels" else [flag, str(value)]
    return found


def setting_of(name: str, steps: int = STEPS) -> Setting:
    """What a cell's name says: SHAPE/MODE[-FORMAT]/TIER/ROWS.

    Factored int8 has int8 products. Matrices of low-rank directions are folded every 50 steps; never from the disk, nor
    codes of 30B, whose masters take 120 GB.

    Raises:
        ValueError: for anything else.

    >>> setting_of("opt-30b/factored-int4/disk/4").refresh
    0
    """
    try:
        model, how, tier, rows = name.split("/")
        mode, _, format = how.partition("-")
        options: dict[str, Any] = {"mode": mode, "format": format or None, "tier": tier, "rows": int(rows)}
        never = tier == "disk" or (format and model == "opt-30b")
        if mode == "factored":
            options |= {"refresh": 0 if never else _FOLDED, "compute": "int8" if format == "int8" else "bf16"}
        elif format:
            options["refresh"] = _DENSE_FOLDED
        return Setting(model, steps=steps, warm_ups=1 if tier == "disk" else 3, **options)
    except ValueError as error:
        raise ValueError(f"cell {name!r}: {error}; expected SHAPE/MODE[-FORMAT]/TIER/ROWS") from error


def all_cells(steps: int = STEPS, data: str | None = None, peer: Peer | None = None) -> list[Cell]:
    """The suite, the most telling cells first.

    Args:
        steps: that are timed in each.
        data: a folder with models/stories260K and text/tinyshakespeare.txt.
        peer: a checkout of the PyTorch ZO2.

    >>> [cell.name for cell in all_cells()][0]
    'opt-13b/dense/host/1'
    """
    flags = () if steps == STEPS else ("--steps", str(steps))
    first, then = ([Cell(name, setting_of(name, steps)) for name in names] for names in (_FIRST, _THEN))
    compared = []
    for model in _COMPARED:
        for method in METHODS:
            compared.append(Cell(f"baseline/{model}/{method}", Baseline(model, method, steps=steps), flags=flags))
        missing, of_peer = "no --peer zo2=FOLDER was given", list[str]()
        if peer is not None:
            missing, of_peer = "", ["--peer", f"zo2={peer.folder}", "--peer-python", peer.python]
            of_peer += ["--peer-dtype", peer.dtype]
        compared.append(Cell(f"baseline/{model}/zo2", Setting(model, steps=steps), missing, peer, (*flags, *of_peer)))
    return [*first, *compared, *then, *_goals(data)]


def _goals(data: str | None) -> list[Cell]:
    """Shakespeare's plays where there are the data; the package's own model on the code of Python's library."""
    cells = []
    for method in WAYS:
        name, folder = f"loss/shakespeare/{method}", Path(data or "").expanduser()
        files = folder / "models" / "stories260K", folder / "text" / "tinyshakespeare.txt"
        missing = "no --data FOLDER with models/stories260K and text/tinyshakespeare.txt was given"
        if data is None or not all(file.exists() for file in files):
            missing = missing if data is None else f"{folder} lacks models/stories260K or text/tinyshakespeare.txt"
            cells.append(Cell(name, None, missing))
        else:
            goal = Goal(method, str(files[0]), str(files[1]), fall=1.0, every=_EVERY[method == "adam"])
            cells.append(Cell(name, goal, flags=("--data", str(folder))))
    return cells + [Cell(f"loss/code/{way}", Goal(way, every=_EVERY[way == "adam"])) for way in WAYS]


@dataclass(frozen=True)
class Needs:
    """Bytes that a cell needs of a machine, or that a machine has.

    >>> Needs(2 * 2**30, 0, 0).lacking(Needs(2**30, 0, 0))
    'needs 2.0 GiB of device memory, and 1.0 GiB are there'
    """

    device: int
    host: int
    disk: int

    def lacking(self, there: "Needs") -> str:
        """Why a machine cannot hold it; empty if it can."""
        for name, what in (("device", "device memory"), ("host", "host memory"), ("disk", "disk")):
            needed, free = getattr(self, name), getattr(there, name)
            if needed > free:
                return f"needs {needed / _GIB:.1f} GiB of {what}, and {free / _GIB:.1f} GiB are there"
        return ""


def needs_of(what: Setting | Baseline | Goal | None) -> Needs:
    """What a measurement is expected to take, by `zo2jax.plan.plan` and the sizes of shapes; reads no arrays.

    >>> needs_of(Setting("opt-tiny", tokens=8, tier="disk")).disk > 0
    True
    """
    on_cpu = jax.default_backend() == "cpu"
    device, disk = 0, 0
    host = _PROCESS.get(jax.default_backend(), _GIB)
    if isinstance(what, Baseline):
        device, more = what.needs()
        host += more
    elif isinstance(what, Setting):
        plan = what.expected(what.random_model)
        assert plan.budget is not None
        device, disk = plan.budget.peak, plan.files()
        host += sum(plan.budget.kept(name) for name, tier in plan.tiers.items() if tier == "host")
        host += STAGING * max(plan.budget.sizes.values()) * (what.tier == "disk")
    return Needs(0, host + device, disk) if on_cpu else Needs(device, host, disk)


def look(cells: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """What a machine is and has, and what cells of these names need, of their environment too.

    For a process that ends before cells begin: that of the suite itself must not hold the device.

    >>> sorted(look([]))
    ['device', 'env', 'has', 'needs', 'versions']
    """
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    has = Needs(limit or available_memory(), available_memory(), 0)
    env = {name: what.environment() for name, what in cells if isinstance(what, Baseline)}
    return machine() | {"has": asdict(has), "needs": {name: asdict(needs_of(what)) for name, what in cells}, "env": env}


def chosen_cells(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose names match a pattern (`fnmatch`); all without one.

    Raises:
        ValueError: for a pattern that matches none.

    >>> [cell.name for cell in chosen_cells(all_cells(), ["opt-30b/*/disk/*"])]
    ['opt-30b/factored-int4/disk/4']
    """
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            raise ValueError(f"--only {pattern!r} names no cell, such as {cells[0].name} or 'opt-13b/*': see --list")
    return [cell for cell in cells if not patterns or any(fnmatchcase(cell.name, pattern) for pattern in patterns)]
