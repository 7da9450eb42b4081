"""``zo2jax profile``: where the time of a config's step goes, in parts that add up to it; and what link and compute do.

The parts are those of `zo2jax.bench.timeline.parts`; docs/profile.md says what they mean.
"""

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from zo2jax.bench.planes import Operation, operations
from zo2jax.bench.process import machine, measured, new_file
from zo2jax.bench.report import number, ratio, save
from zo2jax.bench.throughput import NO_PREALLOCATION, WARM_UPS, timed_step
from zo2jax.bench.timeline import COMPUTE, PARTS, Event, Window, busy, parts
from zo2jax.config import Config
from zo2jax.config_files import load_config
from zo2jax.marks import STEP
from zo2jax.models.model import Model
from zo2jax.objectives import Generated
from zo2jax.plan.measure import this_machine
from zo2jax.run import Run
from zo2jax.stream import Stream
from zo2jax.tasks.prepare import Prepared
from zo2jax.train import open_elsewhere

LANES = ("upload", "write-back", "link", "disk", "compute")
"""What works at the same time; link is upload and write-back together, where there is much of both."""

_BOTH = 0.05
"""What the smaller one of the two is of the larger one then, at least."""

_LARGEST = 10
"""Operations of each part that the numbers name."""

_NAMED = "--xla_gpu_enable_command_buffer="
"""Kernels are launched one by one: those of a CUDA graph have no names in a trace."""

_DONE = PARTS[: PARTS.index("wait")]
"""Parts that have operations."""


def _environment() -> dict[str, str]:
    """Of the process that is traced; a program of the cache that was traced elsewhere has other scopes."""
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_NAMED}".strip()}
    return NO_PREALLOCATION | {"JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY": "true"} | flags


class _Steps(NamedTuple):
    """Which steps are measured, and what each counts for in an average step."""

    number: int
    refresh: int | None
    """Of the config that is measured; its own one may be longer."""
    weights: tuple[float, ...]
    """They add up to 1."""


def _steps(config: Config, steps: int) -> _Steps:
    """So many steps, or as many more as make whole periods; of low-rank directions, whose steps are alike, short ones.

    A period's last step has the fold. It counts for as much as it does in the config's own periods.

    >>> _steps(Config(model="m", direction="lowrank", refresh=50), 4)
    _Steps(number=4, refresh=4, weights=(0.32666666666666666, 0.32666666666666666, 0.32666666666666666, 0.02))
    """
    direction = config.make_direction()
    if direction.refresh is None:
        return _Steps(steps, None, (1 / steps,) * steps)
    period = min(direction.refresh, max(steps, 2)) if direction.rank else direction.refresh
    periods = -(-steps // period)
    of_fold = 1 / direction.refresh / periods
    of_others = (1 - 1 / direction.refresh) / max(1, periods * (period - 1))
    return _Steps(periods * period, period, (*(of_others,) * (period - 1), of_fold) * periods)


def traced(target: str, overrides: Sequence[str], steps: int, folder: str | None) -> dict[str, Any]:
    """What `profile` shows of a config: traces some of its steps, after others that are not traced.

    ``folder`` keeps the trace; None does not. Times end in _ms, and are those of an average step; rates in _s.

    >>> traced("demo", ["direction=lora", "rank=0"], 2, None)
    Traceback (most recent call last):
    zo2jax.config.ConfigError: rank is 0, expected 1 to 64 (1 to 8 are usual)
    """
    config = replace(load_config(target, overrides), replay_within=float("inf"), tensorboard=False)
    chosen = _steps(config, steps)
    if chosen.refresh is not None:
        config = replace(config, refresh=chosen.refresh)
    with ExitStack() as stack:
        directory, scratch = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
        run, data = open_elsewhere(config, directory)
        with run:
            found = _measured(run, data, config, chosen, Path(folder or scratch), keep=folder is not None)
    del run  # which holds what is on the device
    rates = this_machine()
    ceilings = {"upload": rates.up, "write-back": rates.down, "link": rates.both}
    ceilings["disk"] = rates.disk if "link" in found["lanes"] else rates.disk_read
    ceilings["compute"] = rates.int8_products if config.compute == "int8" else rates.products
    for lane, figures in found["lanes"].items():
        figures["ceiling_s"] = ceilings[lane] if ceilings[lane] < float("inf") else None
    return machine() | {"target": target, "overrides": list(overrides)} | found


def _measured(run: Run, data: Prepared, config: Config, steps: _Steps, folder: Path, keep: bool) -> dict[str, Any]:
    """Warms up, times the steps, and traces them."""
    stream, model = run.model.source, run.model
    assert isinstance(stream, Stream)
    batches = [data.batches[i % len(data.batches)] for i in range(steps.number)]
    timed_step(run, batches[0])  # a fold comes before the first step of a period: before the last one of these
    for i in range(max(steps.number, WARM_UPS) if steps.refresh is None else steps.number):
        timed_step(run, batches[i % steps.number])
    untraced = [timed_step(run, batch) * 1e3 for batch in batches]
    stream.wait()
    moved: list[tuple[int, int]] = []
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it notes each call, which takes time of the step
    with jax.profiler.trace(folder, create_perfetto_trace=keep, profiler_options=options):
        for batch in batches[: steps.refresh or 1]:  # under a trace XLA launches kernels in another way
            timed_step(run, batch)
        for i, batch in enumerate(batches):
            before = stream.bytes_up, stream.bytes_down
            with jax.profiler.StepTraceAnnotation(STEP, step_num=i):
                timed_step(run, batch)
            moved.append((stream.bytes_up - before[0], stream.bytes_down - before[1]))
        stream.arrive()  # what the last step asked for ahead is counted with it
    file = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    found = summary(operations(file), steps.weights)
    operations_of = [_operations_of(config, model, data, batch) for batch in batches]
    up, down = (_average([step[way] for step in moved], steps.weights) for way in (0, 1))
    amounts: dict[str, float | None] = {"upload": up, "write-back": down, "link": up + down}
    amounts["compute"] = None if None in operations_of else _average(operations_of, steps.weights)
    for lane, amount in amounts.items():
        found["lanes"][lane]["amount"] = amount
    if min(up, down) < _BOTH * max(up, down):
        del found["lanes"]["link"]
    tiers = list(stream.tiers.values())
    return found | {
        "data": data.summary,
        "parameters": model.parameter_count,
        "blocks": {tier: tiers.count(tier) for tier in ("device", "host", "disk") if tier in tiers},
        "steps": steps.number,
        "untraced_ms": _average(untraced, steps.weights),
        "trace": str(file.parent) if keep else None,
    }


def _average(values: Sequence[Any], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True))


def _operations_of(config: Config, model: Model, data: Prepared, batch: Any) -> float | None:
    """Floating-point operations of a step's products; None where tokens are generated, or steps differ."""
    if isinstance(data.loss, Generated) or config.estimator == "svrg":
        return None
    first = batch[0] if isinstance(batch, list) else batch
    resident = replace(config, tier="device", device_memory="")  # where blocks are changes nothing of it
    budget = resident.make_plan(model if data.loss is None else model.with_loss(data.loss), first).budget
    return None if budget is None else budget.operations


def summary(happened: Sequence[Operation], weights: Sequence[float]) -> dict[str, Any]:
    """Milliseconds of an average step: in parts, by lane, and of the operations that take the most in each part.

    Args:
        happened: with a mark for each step.
        weights: of the steps, in their order.

    Raises:
        ValueError: for another number of steps.

    >>> step, work = Operation(STEP, 0.0, 4.0, STEP), Operation("forward", 1.0, 2.0, "fusion.1")
    >>> summary([step, work], [1.0])["parts_ms"]["forward"]
    2.0
    """
    windows = [Window(mark.start, mark.start + mark.duration) for mark in happened if mark.part == STEP]
    if len(windows) != len(weights):
        raise ValueError(f"the trace shows {len(windows)} steps, expected {len(weights)}: it lacks some of its events")
    work = [operation for operation in happened if operation.part != STEP]
    found: dict[str, Any] = {"ms": 0.0, "parts_ms": dict.fromkeys(PARTS, 0.0)}
    lanes: dict[str, dict[str, Any]] = {lane: {"busy_ms": 0.0, "amount": 0.0} for lane in LANES}
    largest: dict[str, dict[tuple[str, str], list[float]]] = {part: defaultdict(lambda: [0.0, 0.0]) for part in _DONE}
    begins = [window.start for window in windows]
    for window, weight, then in zip(windows, weights, [*begins[1:], float("inf")], strict=True):
        length = window.end - window.start
        here = [o for o in work if o.start < window.end and o.start + o.duration > window.start]
        events = [operation.event for operation in here]
        found["ms"] += weight * length
        for part, ms in parts(events, window).items():
            found["parts_ms"][part] += weight * ms
        for lane in LANES:
            lanes[lane]["busy_ms"] += weight * length * busy(_in_lane(events, lane), lane, window)
        for operation, event in zip(here, events, strict=True):
            if event.start >= window.start and event.lane in largest:
                figures = largest[event.lane][operation.name, operation.scope]
                figures[0] += weight * operation.duration
                figures[1] += weight
        begun = (o for o in work if window.start <= o.start < then)  # what goes on into the next step counts once
        lanes["disk"]["amount"] += weight * sum(o.nbytes for o in begun if o.part.startswith("disk"))
    return found | {"lanes": lanes, "operations": {part: _largest(of_part) for part, of_part in largest.items()}}


_OF_LANE = {"link": ("upload", "write-back"), "compute": COMPUTE}


def _in_lane(events: Iterable[Event], lane: str) -> list[Event]:
    return [event._replace(lane=lane) for event in events if event.lane in _OF_LANE.get(lane, (lane,))]


def _largest(of_part: Mapping[tuple[str, str], Sequence[float]]) -> list[dict[str, Any]]:
    most = sorted(of_part.items(), key=lambda item: -item[1][0])[:_LARGEST]
    return [{"name": name, "scope": scope, "ms": ms, "count": round(count, 2)} for (name, scope), (ms, count) in most]


def profile(
    target: str,
    overrides: Sequence[str] = (),
    *,
    steps: int = 4,
    trace: str | None = None,
    json: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Shows where the time of a config's step goes: trains some steps, in a process and a directory of their own.

    Prints tables, and returns their numbers.

    Args:
        target: a config file, its name, or the directory of a run, which is not touched.
        overrides: of the config's fields, "key=value".
        steps: that are traced; more where whole periods between folds take more.
        trace: a folder that keeps the profiler's files.
        json: a file for all numbers.
        output: a file for the picture.

    Raises:
        ValueError, FileNotFoundError: for a config that is none, no steps, or files that cannot be written, before
            anything is run.
        RuntimeError: if the run fails.

    >>> profile("demo", steps=0)
    Traceback (most recent call last):
    ValueError: steps is 0, expected 1 or more
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected 1 or more")
    load_config(target, overrides)
    path, picture = new_file(json), new_file(output)
    folder = None if trace is None else Path(trace).expanduser().absolute()
    if folder is not None and (folder.is_file() or not folder.parent.is_dir()):
        raise ValueError(f"trace is {trace}: expected a folder, or a name for one in a folder that is there")
    asked = target, list(overrides), steps, None if folder is None else str(folder)
    found: dict[str, Any] = measured("profile", traced, *asked, env=_environment())
    console = Console()
    console.print(_title(found), highlight=False)
    console.print(f"{found['ms']:.1f} ms a step in a trace of {found['steps']}, {found['untraced_ms']:.1f} without it")
    console.print(parts_table(found), lanes_table(found))
    if found["trace"] is not None:
        console.print(
            f"trace: {found['trace']}/perfetto_trace.json.gz for https://ui.perfetto.dev; or xprof --logdir {folder}",
            highlight=False,
            soft_wrap=True,
        )
    save(found, path)
    if picture is not None:
        draw(found, picture)
        console.print(f"picture: {picture}", highlight=False, soft_wrap=True)
    return found


def _title(found: Mapping[str, Any]) -> str:
    where = ", ".join(f"{count} on the {tier}" for tier, count in found["blocks"].items())
    asked = " ".join([found["target"], *found["overrides"]])
    return (
        f"{asked} ({found['parameters'] / 1e9:.3g} G parameters, blocks: {where}); "
        f"{found['device']}, jax {found['versions']['jax']}"
    )


def parts_table(found: Mapping[str, Any]) -> Table:
    """A line for each part of a step, in milliseconds and its share."""
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("part", "ms", "%"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, ms in found["parts_ms"].items():
        if ms or part != "disk":
            table.add_row(part, number(ms), number(100 * ms / found["ms"], 1))
    table.add_section()
    total = sum(found["parts_ms"].values())
    table.add_row("all", number(total), number(100 * total / found["ms"], 1))
    return table


def lanes_table(found: Mapping[str, Any]) -> Table:
    """A line for each lane: how long it is busy, what it does, and how that compares with what it can do.

    The floor is the time that a step's bytes or operations take at the measured rate.
    """
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("at once", "busy, ms", "busy, %", "a step", "while busy", "% of rate", "floor, %"):
        table.add_column(column, justify="left" if column == "at once" else "right", no_wrap=True)
    for lane, figures in found["lanes"].items():
        if figures["busy_ms"]:
            share = number(100 * figures["busy_ms"] / found["ms"], 1)
            table.add_row(lane, number(figures["busy_ms"]), share, *_rates(lane, figures, found["ms"]))
    return table


def _rates(lane: str, figures: Mapping[str, Any], ms: float) -> list[str]:
    amount, ceiling = figures["amount"], figures.get("ceiling_s")
    if amount is None:
        return ["-"] * 4
    busy, all = (amount / time * 1e3 for time in (figures["busy_ms"], ms))
    unit = "FLOP" if lane == "compute" else "B"
    cells = [_scaled(amount, unit), f"{_scaled(busy, unit)}/s"]
    return cells + [number(None if x is None else 100 * x, 1) for x in (ratio(busy, ceiling), ratio(all, ceiling))]


def _scaled(amount: float, unit: str) -> str:
    """Bytes by powers of 1024, operations by those of 1000.

    >>> _scaled(3 * 2**29, "B"), _scaled(2.5e13, "FLOP"), _scaled(0, "B")
    ('1.5 GiB', '25 TFLOP', '0 B')
    """
    base, prefixes = (1024, ("", "Ki", "Mi", "Gi", "Ti")) if unit == "B" else (1000, ("", "k", "M", "G", "T", "P"))
    power = max((p for p in range(len(prefixes)) if amount >= base**p), default=0)
    value = amount / base**power
    return f"{value:{'.0f' if value >= 1000 else '.3g'}} {prefixes[power]}{unit}"


_COLOURS = {"forward": "#e69f00", "perturb": "#d55e00", "update": "#cc79a7", "upload": "#0072b2", "link": "#0072b2"}
_COLOURS |= {"write-back": "#009e73", "disk": "#56b4e9", "wait": "0.8", "Python": "0.5", "compute": "#e69f00"}


def draw(found: Mapping[str, Any], file: Any) -> None:
    """Draws the parts of a step as one bar, and below it the lanes: busy, and what of all they could do they did."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lanes = {lane: figures for lane, figures in found["lanes"].items() if figures["busy_ms"]}
    figure = Figure(figsize=(12, 2.6 + 0.45 * len(lanes)), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(2.2, 0.6 + len(lanes)))
    left = 0.0
    for part, ms in found["parts_ms"].items():
        share = ms / found["ms"]
        label = f"{part} {ms:.1f} ms, {share:.0%}"
        above.barh(0, ms, left=left, color=_COLOURS[part], label=label if ms else None)
        if share > 0.04:
            above.text(left + ms / 2, 0, f"{ms:.3g} ms\n{share:.0%}", ha="center", va="center", fontsize="small")
        left += ms
    above.set(xlim=(0, found["ms"]), xlabel="ms", yticks=[], title="\n".join(wrap(_title(found), 110)))
    above.title.set_fontsize("medium")
    above.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize="small", frameon=False)
    for y, (lane, figures) in enumerate(lanes.items()):
        rate, ceiling = ratio(figures["amount"], found["ms"] / 1e3), figures.get("ceiling_s")
        share = ratio(rate, ceiling)
        below.barh(y, 100 * figures["busy_ms"] / found["ms"], color=_COLOURS[lane], alpha=0.4)
        below.barh(y, 100 * (share or 0.0), height=0.4, color=_COLOURS[lane])
        said = f"{figures['busy_ms'] / found['ms']:.0%} busy" + ("" if share is None else f", floor {share:.0%}")
        below.text(101, y, said, va="center", fontsize="small", clip_on=False)
    below.set_yticks(range(len(lanes)), list(lanes))
    below.invert_yaxis()
    below.set(xlim=(0, 100), xlabel="% of the step: busy (light); floor: what it takes at the measured rate (dark)")
    figure.savefig(file, dpi=150)
