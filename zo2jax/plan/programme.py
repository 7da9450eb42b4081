"""The integer programme behind ``tier="auto"``: tiers and formats of blocks with the least expected time of a step.

Blocks that are alike are counted, not named, so that a model of a trillion parameters has some twenty unknowns. With
n[g, t, f] blocks of group g in tier t and format f, one way of work c (members at once) and the step's time T:

    minimise    T + a little of the time of transfers
    such that   T >= time of the device, T >= bytes / rate of the link, T >= bytes / rate of files,
                sum over t, f of n[g, t, f] = blocks of g,
                bytes on the device + window of streamed blocks + what way c takes <= device memory,
                bytes in host memory <= host memory,  bytes of page files <= disk space.

Windows and folds make it an estimate; `zo2jax.plan.schedule` then simulates what was found, beside all blocks in host
memory, and the faster one is taken.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from zo2jax.formats import Format
from zo2jax.plan.demand import Demand
from zo2jax.plan.machine import Machine
from zo2jax.plan.planned import Plan, Tier
from zo2jax.stores import STAGING

_GIB = 2**30
_TIERS: tuple[Tier, ...] = ("device", "host", "disk")
_LITTLE = 0.02
"""Of the time of transfers, beside the step's: of two equal steps the one that moves less is the better one."""
_AS_FAST = 1.005
_PARTS = (1, 2, 4, 8, 16, 32, 64)
_ROUNDS = 4
_FIGURES = ("sizes", "kept", "seconds")


class Room(NamedTuple):
    """Bytes that there are; 0 sets no limit.

    >>> Room(device=24 * 10**9).host
    0
    """

    device: int = 0
    host: int = 0
    disk: int = 0


@dataclass(frozen=True)
class _Group:
    """Blocks that are alike in each format: their names, and by format bytes of pages, of what is kept, and seconds."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    kept: tuple[int, ...]
    seconds: tuple[float, ...]


def choose(
    demands: Mapping[Format | None, Demand],
    room: Room,
    machine: Machine,
    *,
    own: Format | None = None,
    overlap: bool = True,
) -> Plan:
    """The plan with the least expected time of a step.

    Args:
        demands: what the model takes in each format that blocks may have.
        room: what there is.
        machine: its rates.
        own: the format that the model has.
        overlap: see `Plan`.

    Raises:
        ValueError: if nothing fits, naming device memory, or host memory or disk space, that would do.
    """
    single = [{format: demand} for format, demand in demands.items()] if len(demands) > 1 else []
    every = [ways for among in (*single, dict(demands)) for ways in _ways(among)]
    plans = []
    for ways in every:  # the first one that fits has the most members at once
        found = (_best(way, room, machine, own, overlap) for way in ways)
        plans += list(islice((plan for plan in found if plan is not None), 1))
    if not plans:  # the programme takes room in host memory for what it is, not for what passes while blocks are read
        files = (_streamed(way, "disk", room, own, overlap) for ways in every for way in ways)
        plans = [plan for plan in files if plan is not None]
    if not plans:
        raise _refusal(demands, room)
    return _preferred(plans, machine)


def _ways(demands: Mapping[Format | None, Demand]) -> Iterator[list[dict[Format | None, Demand]]]:
    """For each number of blocks that may be uploaded ahead, the same with ever fewer members at once.

    Where somebody has asked for a number of members, with that alone.
    """
    first = next(iter(demands.values()))
    chunks: list[int | None] = [first.chunk]
    if first.chunk is None:
        chunks += dict.fromkeys(first.in_parts(n) for n in _PARTS if 1 < n < first.at_once)
        chunks += [1] * (chunks[-1] != 1 and first.at_once > 1)
    for prefetch in dict.fromkeys((first.prefetch, first.prefetch + 1, 0)):
        yield [{f: replace(x, chunk=chunk, prefetch=prefetch) for f, x in demands.items()} for chunk in chunks]


def _best(
    demands: Mapping[Format | None, Demand], room: Room, machine: Machine, own: Format | None, overlap: bool
) -> Plan | None:
    """What the programme finds for one way of work, or all blocks in host memory, whichever is faster."""
    plans = _solved(demands, room, machine, own, overlap), _streamed(demands, "host", room, own, overlap)
    found = [plan for plan in plans if plan is not None]
    return _preferred(found, machine) if found else None


def _preferred(plans: Sequence[Plan], machine: Machine) -> Plan:
    """Of those that are as fast as any, but for half a per cent, the one that moves the least."""
    seconds = [plan.expected(machine) for plan in plans]
    fast = [(plan, s) for plan, s in zip(plans, seconds, strict=True) if s <= _AS_FAST * min(seconds)]
    return min(fast, key=lambda one: (sum(one[0].moved().values()), one[1]))[0]


def _groups(demands: Mapping[Format | None, Demand], machine: Machine) -> list[_Group]:
    """Blocks that may be moved, by what they take."""
    budgets = [demand.budget([False] * len(demand.sizes)) for demand in demands.values()]
    found: dict[tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]], list[str]] = {}
    for i, name in enumerate(budgets[0].sizes):
        if name not in budgets[0].stays:
            works = [budget.works[i] for budget in budgets]
            sizes = tuple(work.size for work in works)
            seconds = tuple(work.seconds(machine) for work in works)
            found.setdefault((sizes, tuple(budget.kept(name) for budget in budgets), seconds), []).append(name)
    return [_Group(tuple(names), *key) for key, names in found.items()]


def _solved(
    demands: Mapping[Format | None, Demand], room: Room, machine: Machine, own: Format | None, overlap: bool
) -> Plan | None:
    """The best plan of one way of work; None if nothing fits."""
    first = next(iter(demands.values()))
    here = _made(demands, dict.fromkeys(first.sizes, "device"), {}, own, overlap)
    if _fits(here, room):
        return here
    groups, found = _groups(demands, machine), None
    if not groups:
        return None
    budgets = [demand.budget([False] * len(demand.sizes)) for demand in demands.values()]
    used = max(budget.peak for budget in budgets)
    always = sum(work.seconds(machine) for work in budgets[0].works if work.name in budgets[0].stays)
    largest = max(budget.piece(name) for budget in budgets for name in budget.sizes)
    for files in (False, True):
        host = budgets[0].process + (STAGING * largest if files else 0)
        for _ in range(_ROUNDS):  # what streamed blocks take together depends on which of them stay
            left = Room(*(max(1, n - m) if n else 0 for n, m in zip(room, (used, host, 0), strict=True)))
            counts = _counts(groups, left, machine, first.read_only, always, files)
            if counts is None:
                break
            plan = _made(demands, *_placed(groups, counts, first.sizes, list(demands)), own, overlap)
            assert plan.budget is not None
            if _fits(plan, room) and (found is None or plan.expected(machine) < found.expected(machine)):
                found = plan
            used += plan.budget.peak - room.device if room.device else 0
            host += max(0, plan.host() - room.host) if room.host else 0
        if found is not None:
            break
    return found


def _placed(
    groups: Sequence[_Group], counts: np.ndarray, names: Iterable[str], formats: Sequence[Format | None]
) -> tuple[dict[str, Tier], dict[str, Format | None]]:
    """(tier, format) of blocks by name."""
    tiers: dict[str, Tier] = dict.fromkeys(names, "device")
    kept: dict[str, Format | None] = {}
    for group, count in zip(groups, counts, strict=True):
        for name, (tier, format) in zip(group.names, _dealt(count), strict=True):
            tiers[name], kept[name] = _TIERS[tier], formats[format]
    return tiers, kept


def _streamed(
    demands: Mapping[Format | None, Demand], tier: Tier, room: Room, own: Format | None, overlap: bool
) -> Plan | None:
    """All blocks in one tier, if they fit there."""
    names = next(iter(demands.values())).sizes
    plan = _made(demands, dict.fromkeys(names, tier), {}, own, overlap)
    return plan if _fits(plan, room) else None


def _fits(plan: Plan, room: Room) -> bool:
    assert plan.budget is not None
    takes = (plan.budget.peak, room.device), (plan.host(), room.host), (plan.files(), room.disk)
    return all(not limit or used <= limit for used, limit in takes)


def _dealt(count: np.ndarray) -> list[tuple[int, int]]:
    """(tier, format) of each block of a group in order, evenly mixed.

    >>> _dealt(np.array([[2], [2]]))
    [(0, 0), (1, 0), (0, 0), (1, 0)]
    """
    total, dealt = int(count.sum()), np.zeros(count.shape)
    out = []
    for i in range(total):
        tier, format = np.unravel_index(np.argmax(count * (i + 1) / total - dealt), count.shape)
        dealt[tier, format] += 1
        out.append((int(tier), int(format)))
    return out


def _made(
    demands: Mapping[Format | None, Demand],
    tiers: Mapping[str, Tier],
    kept: Mapping[str, Format | None],
    own: Format | None,
    overlap: bool,
) -> Plan:
    """The plan of these tiers and formats; blocks that are not named are in the model's own format, if they may be."""
    usual = own if own in demands else next(iter(demands))
    formats = {name: kept.get(name, usual) for name in tiers}
    demand = replace(
        demands[usual],
        sizes={name: demands[format].sizes[name] for name, format in formats.items()},
        needs=[demands[format].needs[i] for i, format in enumerate(formats.values())],
        matrices={name: demands[format].matrices[name] for name, format in formats.items()},
        masters={name: demands[format].masters[name] for name, format in formats.items()},
        int8=any(demand.int8 for demand in demands.values()),
    )
    budget = demand.budget([tier == "device" for tier in tiers.values()])
    there: dict[str, Tier] = {n: "device" if n in budget.stays else tier for n, tier in tiers.items()}
    others = {} if set(formats.values()) == {own} else formats
    return Plan(there, demand.prefetch, overlap, probe_batch=demand.chunk, formats=others, budget=budget)


def _refusal(demands: Mapping[Format | None, Demand], room: Room) -> ValueError:
    """Says what is too small, and how much would do."""
    peaks, asked = {format: _least(demand) for format, demand in demands.items()}, next(iter(demands.values())).chunk
    peak = min(peaks.values())
    if room.device and peak > room.device:
        count = "one member" if asked in (None, 1) else f"{asked} members"
        return ValueError(
            f"device memory is {room.device / _GIB:.4g} GiB, and a step needs {_up(peak)} GiB at least, with {count} "
            "at a time and nothing uploaded ahead: give that, or take fewer rows or tokens"
        )
    for_device = {f: demand for f, demand in demands.items() if not room.device or peaks[f] <= room.device}
    plans = [[_made({f: x}, dict.fromkeys(x.sizes, t), {}, f, True) for f, x in for_device.items()] for t in _TIERS[1:]]
    in_memory, in_files = (min(plan.host() for plan in of_tier) for of_tier in plans)
    files = min(plan.files() for plan in plans[1])
    return ValueError(
        f"host memory of {room.host / _GIB:.4g} GiB and {room.disk / _GIB:.4g} GiB of disk space do not hold the blocks"
        f": expected {_up(in_memory)} GiB of host memory, or {_up(files)} GiB of disk space with "
        f"{_up(in_files)} GiB of host memory; or take int8 or int4"
    )


def _least(demand: Demand) -> int:
    """Bytes of device memory with which a step can do, however it works."""
    ways = [one for way in _ways({None: demand}) for among in way for one in among.values()]
    return min(one.budget([False] * len(one.sizes)).peak for one in ways)


def _up(nbytes: float) -> str:
    """GiB, rounded up."""
    return f"{math.ceil(nbytes / _GIB * 100) / 100:.2f}"


def _counts(
    groups: Sequence[_Group], room: Room, machine: Machine, read_only: bool, always: float, files: bool
) -> np.ndarray | None:
    """How many blocks of each group, [groups, tiers, formats], within what is left; None if they do not fit.

    ``always`` are seconds of blocks that are in no group, ``files`` says whether there may be page files.
    """
    link, disk, ways = machine.transfers(read_only)
    sizes, kept, seconds = (np.array([getattr(g, x) for g in groups], float)[:, None] for x in _FIGURES)
    tier = np.arange(len(_TIERS))[None, :, None]
    shape = len(groups), len(_TIERS), sizes.shape[-1]

    def row(n: np.ndarray, time: float = 0.0) -> np.ndarray:
        return np.append(np.broadcast_to(n, shape).reshape(-1), time)

    moved, on_disk = ways * sizes * (tier > 0) / link, ways * sizes * (tier == 2) / disk
    rows, upper = [row(seconds, -1.0), row(moved, -1.0), row(on_disk, -1.0)], [-always, 0.0, 0.0]
    for limit, used in zip(room, (kept * (tier == 0), kept * (tier == 1), kept * (tier == 2)), strict=True):
        if limit:
            rows.append(row(used / _GIB))
            upper.append(limit / _GIB)
    of_group = [row(np.arange(shape[0])[:, None, None] == g) for g in range(shape[0])]
    number = [float(len(group.names)) for group in groups]
    most = np.append(np.broadcast_to((tier < 2) | files, shape).reshape(-1) * max(number), np.inf)
    constraints = [
        LinearConstraint(np.array(rows), -np.inf, np.array(upper)),
        LinearConstraint(np.array(of_group), number, number),
    ]
    found = milp(
        row(_LITTLE * (moved + on_disk), 1.0),
        constraints=constraints,
        bounds=Bounds(0, most),
        integrality=np.append(np.ones(math.prod(shape)), 0),
        options={"mip_rel_gap": 1e-3},
    )
    return None if found.x is None else np.rint(found.x[:-1]).astype(int).reshape(shape)
