"""``zo2jax bench throughput``: a step of a run with its blocks in a tier, beside the floor of link and disk."""

import importlib
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import jax

from pallas_kernels.implementations import choose
from zo2jax.bench.process import machine, memory
from zo2jax.bench.rates import disk_rate, floor_ms, product_rate, sample
from zo2jax.bench.report import ratio
from zo2jax.bench.shapes import SHAPES, Work, random_model
from zo2jax.directions import dense, lowrank
from zo2jax.estimators import Estimator, two_point
from zo2jax.formats import named
from zo2jax.marks import mark
from zo2jax.models.model import Model
from zo2jax.models.traced import traced_for
from zo2jax.optimizers import sgd
from zo2jax.pages import Layout
from zo2jax.plan import Plan, Tier, plan
from zo2jax.plan.measure import link_rates, this_machine
from zo2jax.run import Run
from zo2jax.stream import Stream

MODES = ("dense", "factored")
"""How z is drawn: dense, a normal number for each weight; factored, of low rank, for weights that are only read."""

_PERIOD = 7
"""Steps between two folds while a factored step is timed; the figure is for the period that was asked for. Dense steps
over codes take longer from one to the next, so that theirs is timed as it is."""

_MOST_TERMS = 64
"""Steps between two folds of dense directions over codes, each of which adds to the time of the next."""

WARM_UPS = 3
"""Steps that are not timed, after the first, unless a setting says otherwise."""

NO_PREALLOCATION = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""The environment in which NVML counts what a run needs, and not what JAX sets aside."""


@dataclass(frozen=True)
class Setting:
    """A run to measure: a shape with random weights, its batch, and where its blocks live.

    Raises:
        ValueError: for an unknown shape, mode or tier, or a number that is too small.

    >>> Setting("opt-13b", tier="disk").tokens
    2048
    """

    model: str
    layers: int | None = None
    """Cuts the model to so many."""
    rows: int = 1
    tokens: int = 2048
    mode: str = "dense"
    rank: int = 2
    """Of directions in the factored mode."""
    refresh: int = 50
    """Steps from one fold to the next, in the factored mode or with a format; 0: there is none in the factored mode,
    whose matrices never change then."""
    format: str | None = None
    """Of the matrices: "int8" or "int4"; bfloat16 if None. In the dense mode 4 to 16 steps to a fold are usual."""
    group: int | None = None
    """Columns that share a scale of codes."""
    compute: str = "bf16"
    """How products with codes are made: "bf16" or "int8"."""
    tier: Tier = "host"
    prefetch: int = 1
    device_memory: str | None = None
    """A budget such as "4GiB", within which blocks stay on the device; if None, all blocks are in the tier."""
    steps: int = 10
    """That are timed, each by itself."""
    warm_ups: int = WARM_UPS
    """Steps that are not timed, after the first; where there are folds, those of a period."""
    directory: str | None = None
    """Where page files are made; the system's temporary folder if None."""
    overlap: bool = True
    pinned: bool = True
    kernels: bool = True
    """Whether updates and probes may be made by the fused kernels; else by XLA."""

    def __post_init__(self) -> None:
        """Checks all that can be checked before anything is measured."""
        tiers = get_args(Tier)
        known_of = {"model": sorted(SHAPES), "mode": MODES, "tier": tiers, "format": ("int8", "int4")}
        for name, known in known_of.items():
            if getattr(self, name) not in (known if name != "format" else (None, *known)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name, least in (
            ("layers", 1),
            ("rows", 1),
            ("tokens", 2),
            ("steps", 1),
            ("warm_ups", 0),
            ("prefetch", 0),
            ("rank", 1),
            ("refresh", 0),
            ("group", 1),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}, expected {least} or more")
        if self.format is not None and self.mode == "dense" and not 0 < self.refresh <= _MOST_TERMS:
            raise ValueError(f"refresh is {self.refresh} in the mode dense with a format: expected 1 to {_MOST_TERMS}")
        if self.directory is not None and not Path(self.directory).is_dir():
            raise ValueError(f"directory is {self.directory}, expected a folder that is there")

    @property
    def estimator(self) -> Estimator:
        """Two-point, in the setting's mode."""
        if self.mode == "factored":
            return two_point(1e-3, direction=lowrank(self.rank, refresh=self.period))
        return two_point(1e-3, direction=dense("normal", refresh=self.period))

    @property
    def period(self) -> int | None:
        """Steps from one fold to the next while the setting is timed; None if there are no folds."""
        if self.mode == "factored":
            return _PERIOD if self.refresh else None
        return self.refresh if self.format else None

    @property
    def random_model(self) -> Model:
        """Of the setting's shape and format."""
        format = None if self.format is None else named(self.format, self.group, compute=self.compute)
        return random_model(self.model, self.layers, format=format)

    def expected(self, model: Model) -> Plan:
        """What `zo2jax.plan.plan` makes of the setting: its tiers, and the bytes and operations of a step.

        >>> Setting("opt-tiny", tokens=8).expected(random_model("opt-tiny", 1)).budget.operations > 1e6
        True
        """
        sizes: dict[str, Any] = {"tokens": self.tokens, "rows": self.rows, "prefetch": self.prefetch}
        with traced_for(None, None if self.kernels else False):
            return plan(model, self.estimator, tier=self.tier, device_memory=self.device_memory, **sizes)

    def plan(self, model: Model) -> Plan:
        """Where the blocks live.

        >>> Setting("opt-tiny", prefetch=2).plan(random_model("opt-tiny", 1)).tiers["head"]
        'host'
        """
        if self.device_memory is None:
            made = Plan(dict.fromkeys((block.name for block in model.blocks), self.tier), self.prefetch)
        else:
            made = self.expected(model)
        return replace(made, overlap=self.overlap, pinned=self.pinned)


@contextmanager
def running(setting: Setting, estimator: Estimator | None = None) -> Iterator[tuple[Run, dict[str, jax.Array]]]:
    """A run of the setting, perhaps with another estimator than its own, and its batch.

    >>> with running(Setting("opt-tiny", layers=1, tokens=4)) as (run, batch):
    ...     batch["ids"].shape
    (1, 4)
    """
    model = setting.random_model
    model.check_tokens(setting.tokens)
    batch = Work(tokens=setting.tokens, rows=setting.rows).batch(model.config.vocabulary)
    options: dict[str, Any] = {"key": jax.random.key(0), "plan": setting.plan(model), "replay_within": math.inf}
    with (
        nullcontext() if setting.kernels else _without_kernels(),
        tempfile.TemporaryDirectory(dir=setting.directory) as directory,
        Run(model, estimator or setting.estimator, sgd(1e-6), directory=directory, **options) as run,
    ):
        del model
        yield run, batch


def timed_step(run: Run, batch: Any) -> float:
    """Seconds of a step, up to its loss in host memory.

    >>> from types import SimpleNamespace
    >>> timed_step(SimpleNamespace(step=lambda batch: SimpleNamespace(loss=2.5)), {}) > 0
    True
    """
    start = time.perf_counter()
    info = run.step(batch)
    with mark("wait"):
        float(info.loss)
    return time.perf_counter() - start


def measure(setting: Setting, rates: bool = True) -> dict[str, Any]:
    """Times a step; counts its bytes and peak memory; with ``rates``, measures what link, disk, products could do.

    Times end in _s or _ms, GiB in _gib, GiB per second in _gib_s; what does not apply is None. A floor is the bytes of
    a step by the rate at which the same pages move both ways, or only up if they are only read, without any
    computation; or the operations of its products by the rate of a large one. A ratio is a step's time in it.
    ``floor_ms`` is the highest, and ``bound`` its name; ``link_share`` the rate of a step's bytes in what the link can.

    >>> measure(Setting("opt-tiny", tokens=4096))
    Traceback (most recent call last):
    ValueError: 4096 tokens do not fit the model's context of 2048: shorten them
    """
    start = time.perf_counter()
    with running(setting) as (run, batch):
        found: dict[str, Any] = machine() | {"setting": asdict(setting), "load_s": time.perf_counter() - start}
        layouts, on_disk = _moved(run)
        found |= {"parameters": run.model.parameter_count, "kernels": "xla"}
        if setting.kernels:
            found["kernels"] = choose("perturb", None)
        found["first_step_s"] = timed_step(run, batch)
        period = setting.period
        for _ in range(period or setting.warm_ups):  # with the first fold, whose program is compiled then
            timed_step(run, batch)
        count = -(-setting.steps // period) * period if period else setting.steps
        found["times_ms"] = [timed_step(run, batch) * 1e3 for _ in range(count)]
        found |= memory()
        planned = setting.expected(setting.random_model)  # as it was read; and not from a stream
    found |= _step_ms(found["times_ms"], setting)
    found |= _moving(found["ms"], layouts, down=not setting.estimator.direction.read_only)
    found["tokens_per_s"] = setting.rows * setting.tokens / found["ms"] * 1e3
    if not rates:
        return found
    assert planned.budget is not None
    found |= _floors(setting, found["ms"], layouts, on_disk, planned.budget.operations)
    return found | _beside(setting, planned, found)


def _beside(setting: Setting, planned: Plan, found: dict[str, Any]) -> dict[str, Any]:
    """What the plan expects on this machine, in the units of what was measured; a ratio is the expected in that."""
    if not (setting.overlap and setting.pinned and setting.kernels):
        return {}
    budget = planned.budget
    assert budget is not None
    refresh = budget.refresh and (setting.refresh or None)  # and not that of the folds that were timed
    planned = replace(planned, budget=replace(budget, refresh=refresh))
    expected = {"ms": planned.expected(this_machine()) * 1e3, "peak_device_gib": budget.peak / 2**30}
    expected["peak_host_gib"] = planned.host() / 2**30
    figures = {f"expected_{name}": value for name, value in expected.items()}
    return figures | {f"{name}_expected_ratio": ratio(value, found[name]) for name, value in expected.items()}


def _step_ms(times: list[float], setting: Setting) -> dict[str, float]:
    """The median step; where there are folds, the step on average over a period, with the fold that is a part of it."""
    period = setting.period
    if period is None:
        return {"ms": statistics.median(times)}
    folds = [(i + 1) % period == 0 for i in range(len(times))]  # the first step and a period were before them
    plain, folding = (
        statistics.median([t for t, f in zip(times, folds, strict=True) if f == of] or times) for of in (False, True)
    )
    if setting.mode == "dense":
        return {"ms": statistics.mean(times), "plain_ms": plain, "fold_ms": folding - plain}
    return {"ms": plain + (folding - plain) / setting.refresh, "plain_ms": plain, "fold_ms": folding - plain}


def _moved(run: Run) -> tuple[list[Layout], list[Layout]]:
    """The layouts of the blocks that a step moves, and of those among them that lie on the disk."""
    stream = run.model.source
    assert isinstance(stream, Stream)
    tiers = {block: stream.tiers[block.name] for block in stream.blocks}
    layouts = {block: stream.layouts[block.name] for block, tier in tiers.items() if tier != "device"}
    return list(layouts.values()), [layout for block, layout in layouts.items() if tiers[block] == "disk"]


def _moving(ms: float, layouts: list[Layout], *, down: bool) -> dict[str, float]:
    """What a step moves each way, and how fast; folds are left out."""
    moved = sum(layout.nbytes for layout in layouts) / 2**30
    rate = moved / ms * 1e3
    return {"up_gib": moved, "down_gib": moved * down, "up_gib_s": rate, "down_gib_s": rate * down}


def _floors(
    setting: Setting, ms: float, layouts: list[Layout], on_disk: list[Layout], operations: float
) -> dict[str, Any]:
    """What link, disk and products can do, and how near a step comes."""
    of_link = ("link_up_gib_s", "link_down_gib_s", "link_both_gib_s", "link_floor_ms", "link_ratio", "link_share")
    of_disk = ("disk_read_gib_s", "disk_both_gib_s", "disk_floor_ms", "disk_ratio")
    found: dict[str, Any] = dict.fromkeys(of_link + of_disk)
    read_only = setting.estimator.direction.read_only
    ways = 1 if read_only else 2
    if pages := sample(layouts):
        rates = link_rates(pages, pinned=setting.pinned)
        found |= {f"link_{way}_gib_s": rate / 2**30 for way, rate in rates._asdict().items()}
        found |= _against("link", ms, layouts, ways, rates.up if read_only else rates.both)
        found["link_share"] = 1 / found["link_ratio"]
    if pages := sample(on_disk):
        with tempfile.TemporaryDirectory(dir=setting.directory) as directory:
            rate = disk_rate(pages, Path(directory), read_only=read_only)
        found[f"disk_{'read' if read_only else 'both'}_gib_s"] = rate / 2**30
        found |= _against("disk", ms, on_disk, ways, rate)
    found["compute_tflops"] = (rate := product_rate(setting.compute)) / 1e12
    found["compute_floor_ms"] = floor = operations / rate * 1e3
    found["compute_ratio"] = ms / floor
    floors = {name: found[f"{name}_floor_ms"] or 0.0 for name in ("link", "disk", "compute")}
    found["bound"] = bound = max(floors, key=lambda name: floors[name])
    return found | {"floor_ms": floors[bound], "floor_ratio": ms / floors[bound]}


def _against(name: str, ms: float, layouts: list[Layout], ways: int, rate: float) -> dict[str, float]:
    floor = floor_ms(ways * sum(layout.nbytes for layout in layouts), rate)
    return {f"{name}_floor_ms": floor, f"{name}_ratio": ms / floor}


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Programs that are compiled meanwhile make their updates and probes by XLA."""
    module: Any = importlib.import_module("pallas_kernels.perturb")
    chosen = module.choose
    module.choose = lambda operation, name, limit=None: chosen(operation, name or "xla", limit)
    try:
        yield
    finally:
        module.choose = chosen
