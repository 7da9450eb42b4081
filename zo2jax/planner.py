"""``zo2jax plan`` and ``zo2jax machine``: what a config's run will need and take, on this machine or on others."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from zo2jax.config import Config
from zo2jax.formats import Format, named
from zo2jax.models.hub import load
from zo2jax.models.model import Model
from zo2jax.plan import Machine, Plan, Tier, plan
from zo2jax.plan.machine import cache_file, find, known
from zo2jax.plan.measure import forget, this_machine
from zo2jax.shapes import shaped
from zo2jax.trained import begun

_GIB = 2**30
_USUAL = ("rtx4090", "h100", "h200")
"""GPUs of 24, 80 and 141 GB, for which plans are made where there is no GPU."""
_COLOURS = {"device": "#009e73", "host": "#0072b2", "disk": "#d55e00"}
_LANES = {"read": "#d55e00", "upload": "#0072b2", "compute": "#e69f00", "write-back": "#009e73", "write": "#cc79a7"}
_SHOWN = 24
"""Blocks whose spans a picture's timeline shows, from the middle of a step."""


@dataclass(frozen=True)
class Asked:
    """What a plan is made for, beside the config.

    >>> Asked(machines=("h200",)).formats
    ()
    """

    machines: tuple[str, ...] = ()
    """Names or files (`zo2jax.plan.machine.find`); () for this machine, or the usual GPUs where there is none."""
    device_memory: str = ""
    """In place of what the config or the machine says."""
    host_memory: str = ""
    disk_space: str = ""
    formats: tuple[str, ...] = ()
    """Of blocks: "bf16", "int8", "int4", of which the plan may mix the first with one other; () for the config's."""


@dataclass(frozen=True)
class Outlook:
    """A plan on a machine, or why there is none."""

    machine: Machine
    plan: Plan | None
    tokens: int
    """Of a step."""
    micro_batches: int = 1
    refused: str = ""

    def as_json(self) -> dict[str, Any]:
        """All numbers, with seconds and bytes."""
        about = {"machine": {k: v for k, v in asdict(self.machine).items() if v != math.inf}}
        if self.plan is None:
            return about | {"refused": self.refused}
        made, budget = self.plan, self.plan.budget
        assert budget is not None
        timeline = made.timeline(self.machine)
        return about | {
            "tiers": dict(made.tiers),
            "formats": {name: "bf16" if format is None else str(format) for name, format in made.formats.items()},
            "prefetch": made.prefetch,
            "probe_batch": made.probe_batch,
            "micro_batches": self.micro_batches,
            "seconds": made.expected(self.machine),
            "tokens_per_s": self.tokens / made.expected(self.machine),
            "fold_seconds": made.fold(self.machine),
            "bound": timeline.bound,
            "busy": timeline.busy(),
            "device_bytes": budget.peak,
            "host_bytes": made.host(),
            "file_bytes": made.files(),
            "bytes_by_tier": {tier: self.bytes_in(tier) for tier in get_args(Tier)},
        }

    def bytes_in(self, tier: Tier) -> int:
        """Bytes of blocks there, with what folds touch."""
        assert self.plan is not None and self.plan.budget is not None
        return sum(self.plan.budget.kept(name) for name, there in self.plan.tiers.items() if there == tier)


def model_of(config: Config) -> Model:
    """The model of a config, from its shapes alone: a folder needs no weights.

    >>> model_of(Config(model="shape:1t", dtype="bfloat16")).parameter_count > 10**12
    True
    """
    made = shaped(config.model, config.dtype) or load(config.model, dtype=config.dtype or None, weights=False)
    return begun(config, made.with_format(config.make_format(made.format)))


def outlooks(config: Config, asked: Asked) -> list[Outlook]:
    """A plan for each machine, from the config alone; rows have the config's number of tokens.

    Of micro-batches the plan takes those of the config, or the fewest more with which a step fits.

    Raises:
        ValueError: for a machine or a format that is not known.
    """
    model, codes = model_of(config), [_codes(config, name) for name in asked.formats if name != "bf16"]
    if len(codes) > 1:
        raise ValueError(f"formats {', '.join(asked.formats)}: expected bf16, one of int8 and int4, or both")
    formats: tuple[Format | None, ...] = (*(None for name in asked.formats if name == "bf16"), *codes)
    if asked.machines:
        machines = [find(name) for name in asked.machines]
    else:
        machines = [this_machine()] if jax.default_backend() == "gpu" else [known(name) for name in _USUAL]
    return [_outlook(config, asked, model, formats, machine) for machine in machines]


def _codes(config: Config, name: str) -> Format:
    """The format of a name, with the config's groups, and its products if they are those of int8."""
    if name not in ("int8", "int4"):
        raise ValueError(f"format {name!r}: expected bf16, int8 or int4")
    return named(name, config.group or None, compute=config.compute if name == "int8" else "bf16")


def _outlook(config: Config, asked: Asked, model: Model, formats: Sequence[Format | None], machine: Machine) -> Outlook:
    least, first = config.micro_batches, ""
    for count in (n for n in range(least, config.batch + 1) if config.batch % n == 0):
        ids = jax.ShapeDtypeStruct((config.batch // count, config.tokens), jnp.int32)
        try:
            made = plan(
                model,
                config.make_estimator(),
                batch={"ids": ids, "targets": ids},
                batches=count,
                tier="auto",
                device_memory=asked.device_memory or config.device_memory or None,
                host_memory=asked.host_memory or None,
                disk_space=asked.disk_space or None,
                probe_batch=config.probe_batch or None,
                prefetch=config.prefetch,
                rounding=config.make_rounding(),
                machine=machine,
                formats=formats,
            )
        except ValueError as error:
            first = first or str(error)
            if "device memory" not in str(error):
                break
            continue
        return Outlook(machine, made, config.batch * config.tokens, count)
    return Outlook(machine, None, config.batch * config.tokens, refused=first)


def table(config: Config, found: Sequence[Outlook], model: Model) -> Table:
    """A column for each machine: bytes by tier, memory, time, and what bounds it."""
    size = f"{model.parameter_count / 1e9:,.1f} G parameters"
    kept = f"{config.direction}, {model.format or model.dtype}"
    out = Table(title=f"{config.model}: {size}, {kept}, {config.batch} x {config.tokens} tokens a step")
    out.add_column("", no_wrap=True)
    for one in found:
        memory = f", {one.machine.device_memory / _GIB:.0f} GiB" if one.machine.device_memory else ""
        out.add_column(f"{one.machine.kind}{memory}", justify="right")
    for label, cell in _rows():
        out.add_row(label, *("-" if one.plan is None else cell(one) for one in found))
    return out


def _rows() -> list[tuple[str, Any]]:
    """(label, what makes a cell of an outlook) of the table."""

    def blocks(one: Outlook) -> str:
        names = list(one.plan.tiers.values()) if one.plan else []
        return " / ".join(str(names.count(tier)) for tier in get_args(Tier))

    def gib(nbytes: float) -> str:
        return f"{nbytes / _GIB:,.1f}"

    return [
        ("blocks on device / in host memory / in files", blocks),
        ("  GiB", lambda one: " / ".join(gib(one.bytes_in(tier)) for tier in get_args(Tier))),
        ("device memory expected, GiB", lambda one: gib(one.plan.budget.peak)),
        ("host memory expected, GiB", lambda one: gib(one.plan.host())),
        (
            "blocks uploaded ahead / members at once",
            lambda one: f"{one.plan.prefetch} / {one.plan.probe_batch or 'all'}",
        ),
        ("micro-batches", lambda one: str(one.micro_batches)),
        ("blocks kept as codes", lambda one: str(sum(f is not None for f in one.plan.formats.values()) or "-")),
        ("a step, s", lambda one: f"{one.plan.expected(one.machine):,.3g}"),
        ("  of which folds", lambda one: f"{one.plan.fold(one.machine):.2g}"),
        ("tokens/s", lambda one: f"{one.tokens / one.plan.expected(one.machine):,.0f}"),
        ("bound by", lambda one: one.plan.timeline(one.machine).bound),
        ("busy", lambda one: ", ".join(f"{k} {v:.0%}" for k, v in one.plan.timeline(one.machine).busy().items())),
    ]


def draw(found: Sequence[Outlook], heading: str, file: Any) -> None:
    """Draws bytes by tier, and when blocks are moved and computed, for each machine that has a plan."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [one for one in found if one.plan is not None]
    figure = Figure(figsize=(12, 0.8 + 2.2 * max(1, len(shown))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(shown)), 2, squeeze=False, width_ratios=(1, 3))
    for one, (left, right) in zip(shown, axes, strict=True):
        _draw_bytes(one, left)
        _draw_times(one, right)
    figure.suptitle(heading, fontsize="medium")
    figure.savefig(file, dpi=130)


def _draw_bytes(one: Outlook, axes: Any) -> None:
    before = 0.0
    for tier in get_args(Tier):
        there = one.bytes_in(tier) / _GIB
        axes.barh(0, there, left=before, color=_COLOURS[tier], label=f"{tier} {there:,.1f}")
        before += there
    axes.set(yticks=[], ylim=(-0.5, 0.9), xlabel="GiB", title=one.machine.kind)
    axes.legend(fontsize="x-small", loc="upper center", ncols=3)


def _draw_times(one: Outlook, axes: Any) -> None:
    assert one.plan is not None
    timeline = one.plan.timeline(one.machine)
    computed, busy = [span for span in timeline.spans if span.lane == "compute"], timeline.busy()
    middle = computed[max(0, (len(computed) - _SHOWN) // 2) :][:_SHOWN]
    start, end = middle[0].start, middle[-1].end
    lanes = [lane for lane in _LANES if lane in busy]
    for y, lane in enumerate(lanes):
        spans = [(s.start - start, s.end - s.start) for s in timeline.spans if s.lane == lane]
        axes.broken_barh(spans, (y - 0.4, 0.8), facecolors=_LANES[lane], edgecolor="white", linewidth=0.4)
    axes.set_yticks(range(len(lanes)), [f"{lane} {busy[lane]:.0%}" for lane in lanes])
    axes.invert_yaxis()
    said = f"{one.plan.expected(one.machine):.3g} s a step, bound by the {timeline.bound}"
    axes.set(xlim=(0, end - start), xlabel=f"s, {len(middle)} of {len(computed)} blocks", title=said)


def show(config: Config, asked: Asked, *, file: str | None = None, picture: str | None = None) -> list[Outlook]:
    """Prints the table, writes JSON and a picture where asked to.

    Raises:
        ValueError: if no machine can take the model, or a file cannot be written; see `outlooks`.
    """
    for path in (file, picture):
        if path is not None and not Path(path).expanduser().parent.is_dir():
            raise ValueError(f"{path} cannot be written: expected a file in a folder that is there")
    found, console, model = outlooks(config, asked), Console(), model_of(config)
    if all(one.plan is None for one in found):
        raise ValueError("; ".join(f"{one.machine.kind}: {one.refused}" for one in found))
    console.print(table(config, found, model))
    for one in found:
        if one.plan is None:
            console.print(f"{one.machine.kind}: {one.refused}", highlight=False)
        elif one.micro_batches != config.micro_batches:
            console.print(f"{one.machine.kind}: with micro_batches={one.micro_batches}", highlight=False)
    if file is not None:
        numbers = {"config": config.as_json(), "parameters": model.parameter_count}
        text = json.dumps(numbers | {"outlooks": [one.as_json() for one in found]}, indent=1, default=str)
        Path(file).expanduser().write_text(text + "\n")
    if picture is not None:
        draw(found, f"{config.model}, {config.batch} x {config.tokens} tokens", Path(picture).expanduser())
    return found


def machine(*, again: bool = False, file: str | None = None) -> Machine:
    """Prints this machine's rates, measured once and kept; ``again`` measures them anew."""
    kept = cache_file(jax.devices()[0].device_kind)
    if again:
        forget()
    found = this_machine()
    print(found)
    print(f"kept in {kept}" if kept.is_file() else f"{kept} cannot be written: measured again each time")
    if file is not None:
        found.save(Path(file).expanduser())
    return found
