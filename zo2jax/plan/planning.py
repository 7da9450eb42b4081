"""From a model to a plan: where the blocks go."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from zo2jax.directions import Direction, check_targets
from zo2jax.estimators import Estimator, two_point
from zo2jax.formats import Format
from zo2jax.models.blocks import owned_shapes
from zo2jax.models.model import Model
from zo2jax.models.traced import backend, traced_for
from zo2jax.plan.demand import Demand, spread
from zo2jax.plan.machine import Machine
from zo2jax.plan.measure import this_machine
from zo2jax.plan.planned import Budget, Plan, Tier, parse_size
from zo2jax.plan.programme import Room, choose
from zo2jax.updates import Rounding, nearest

_GIB = 2**30


def plan(
    model: Model,
    estimator: Estimator | None = None,
    *,
    tokens: int = 2048,
    rows: int = 1,
    batch: Any = None,
    batches: int = 1,
    tier: Tier | Literal["auto"] = "host",
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    disk_space: int | str | None = None,
    probe_batch: int | None = None,
    prefetch: int = 1,
    overlap: bool = True,
    rounding: Rounding = nearest,
    machine: Machine | None = None,
    formats: Sequence[Format | None] = (),
) -> Plan:
    """Where each block goes, and what a training step takes then; reads shapes only, and no array.

    Without ``device_memory`` all blocks go to ``tier``. With it, as many bytes as fit stay on the device, spread
    evenly among the streamed ones, so that uploads go on while resident blocks are computed. Blocks whose leaves
    another one shares, and those without a matrix of their own, always stay on the device. If not even two blocks fit
    beside what all members of the population take, these are evaluated in parts, the fewest with which they do.
    The keys and values that generation keeps come on top.

    With the tier "auto" an integer programme (`zo2jax.plan.programme`) chooses the tier of each block, the prefetch,
    the members at once, and, of ``formats``, how each block is kept, with the least expected time of a step within what
    the machine has of device memory, host memory and disk space.

    Args:
        model: its blocks are looked at.
        estimator: how many members there are, of `zo2jax.svrg` in its largest step; `zo2jax.two_point` if None.
        tokens: of a row.
        rows: of a batch.
        batch: a batch, or the shapes of one, in place of rows of tokens with a target for each.
        batches: of a step (see `zo2jax.Run.step`), each as large.
        tier: of the blocks that do not stay on the device; with "device" all stay.
        device_memory: the budget, in bytes or as `parse_size` reads it; of "auto", the machine's if None.
        host_memory: the same of host memory, for "auto".
        disk_space: the same of page files, for "auto".
        probe_batch: see `Plan`; as many as fit if None.
        prefetch: see `Plan`.
        overlap: see `Plan`.
        rounding: of updates, which with `zo2jax.residual` keeps more beside each block.
        machine: the plan is for this one; if None, for this one here, which is measured only for "auto" and once.
        formats: for "auto", one format of codes and, if blocks may stay as they are, None; () for the model's own.

    Raises:
        ValueError: for a budget that is too small, naming the smallest that works, for values out of range, and for
            targets of the direction that name no leaf.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> plan(config.init(jax.random.key(0)), tokens=16).tiers["head"]
    'host'
    """
    if min(tokens, rows, batches) < 1:
        raise ValueError(f"tokens={tokens}, rows={rows}, batches={batches}: expected integers of at least 1")
    Plan(prefetch=prefetch, probe_batch=probe_batch)  # checks them
    if tier not in (*get_args(Tier), "auto"):
        raise ValueError(f"tier={tier!r}: expected 'device', 'host', 'disk' or 'auto'")
    if tier != "auto" and (host_memory, disk_space, formats) != (None, None, ()):
        raise ValueError(f"host_memory, disk_space or formats with tier={tier!r}: expected tier='auto' with them")
    limits = [None if size is None else parse_size(size) for size in (device_memory, host_memory, disk_space)]
    if batch is None:
        if model.config is None:
            raise ValueError("a model of zo2jax.blocks has batches of its own kind: give batch=, or the shapes of one")
        ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
        batch = {"ids": ids, "targets": ids}
    estimator = estimator or two_point(1e-3)
    check_targets(owned_shapes(model.blocks), estimator.direction)
    if tier == "auto" and machine is None:
        machine = this_machine()
    options: dict[str, Any] = {"batches": batches, "chunk": probe_batch, "rounding": rounding}
    where, kernels = (backend(), None) if machine is None else (machine.backend, machine.kernels)
    with traced_for(where, kernels):
        if tier == "auto":
            assert machine is not None
            kept = [model.with_format(format) for format in formats] or [model]
            demands = {one.format: Demand.of(one, estimator, batch, prefetch, **options) for one in kept}
            _check_formats(demands, estimator.direction)
            device, host, disk = (limit or there for limit, there in zip(limits, machine.sizes, strict=True))
            room = Room(device or (host if machine.backend == "cpu" else 0), host, disk)  # which have one memory
            return choose(demands, room, machine, own=model.format, overlap=overlap)
        demand = Demand.of(model, estimator, batch, prefetch, **options)
        return _within(replace(demand, limit=limits[0]), tier, batch, overlap)


def _check_formats(demands: Mapping[Format | None, Demand], direction: Direction) -> None:
    """Raises ValueError where codes would have to change in each step."""
    if not direction.read_only and any(demand.moving for format, demand in demands.items() if format is not None):
        raise ValueError(
            f"formats of codes with the direction {direction}: expected a direction with which matrices are only read, "
            "such as zo2jax.lowrank(2), or a refresh"
        )


def _within(work: Demand, tier: Tier, batch: Any, overlap: bool) -> Plan:
    """All blocks in a tier, but for those that fit on the device."""
    sizes, limit, asked = list(work.sizes.values()), work.limit, work.chunk
    stays = tier == "device"
    if asked is None and limit is not None:
        work = work.fitting([stays] * len(sizes))
    streamed, chosen = (work.budget([there] * len(sizes)) for there in (False, stays))
    if limit is not None and not stays:
        budgets = [work.budget(spread(sizes, i / (4 * len(sizes)))) for i in range(4 * len(sizes) + 1)]
        chosen = max((b for b in budgets if b.peak <= limit), key=lambda b: b.resident, default=streamed)
    if limit is not None and chosen.peak > limit:
        other = f" with all blocks on the device: give that, or tier='host', which needs {_enough(streamed)}"
        if not stays:
            other = ": give that, or take fewer rows or tokens" + ", or prefetch=0" * (work.prefetch > 0)
            other += ", or a smaller probe_batch" * (asked is not None and asked > 1)
        raise _refusal(batch, limit, f"{_enough(chosen)} at least{other}")
    tiers: dict[str, Tier] = {name: "device" if name in chosen.stays else tier for name in work.sizes}
    return Plan(tiers, work.prefetch, overlap, probe_batch=work.chunk, budget=chosen)


def _refusal(batch: Any, limit: int, needed: str) -> ValueError:
    what = " x ".join(map(str, jax.tree.leaves(batch)[0].shape))
    return ValueError(f"device_memory is {limit / _GIB:.3g} GiB, and a batch of {what} needs {needed}")


def _enough(budget: Budget) -> str:
    """A size that is large enough, as `parse_size` reads it."""
    return f"{math.ceil(budget.peak / _GIB * 100) / 100:.2f} GiB"
