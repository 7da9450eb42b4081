"""The plan: where the blocks of a model live, how they are moved, and what that takes in bytes and seconds.

What a step takes is worked out from shapes alone. Only printing a plan measures the machine.
"""

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.directions import Direction, check_targets, matrix_shape
from zo2jax.estimators import Estimator, two_point
from zo2jax.models.blocks import block_of, kinds, owned_shapes
from zo2jax.models.model import Model
from zo2jax.pages import Layout, flat, layouts_of
from zo2jax.plan.liveness import Needs, needs_of
from zo2jax.plan.machine import Machine, measure_disk, measure_machine

Tier = Literal["device", "host", "disk"]
_GIB = 2**30
_UNITS = {"": 1} | {
    f"{prefix}{kind}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for kind, base in (("B", 1000), ("iB", 1024))
}
_LIBRARIES = 64 * 2**20
"""Workspaces of cuBLAS, on a GPU: 32 MiB for each product that is under way or next (XLA's buffer assignment)."""
_AHEAD = 4
"""Carries that are there besides where the host issues visits ahead, of blocks that stay and of parts of a step: fitted
to one peak of blocks that stay (H200)."""


@dataclass(frozen=True)
class Budget:
    """What a step of a plan takes: bytes and operations, worked out from shapes.

    >>> Budget(resident=5, window=3, probes=2, activations=4, libraries=1).peak
    15
    """

    resident: int
    """Bytes of what stays on the device: its blocks' pages, and the vectors of all blocks."""
    window: int
    """The most bytes of streamed blocks on the device at once."""
    probes: int
    """Of the copies of the largest matrix, or of a slab of a vocabulary, of members that are evaluated at once; one
    copy if they share it."""
    activations: int
    """Of members that are evaluated at once, and the carries of all that wait."""
    libraries: int
    limit: int | None = None
    """The device memory that was asked for."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each block's pages."""
    stays: frozenset[str] = frozenset()
    """The blocks that stay on the device."""
    members: int = 2
    """Of the population, counted for each batch of a step."""
    parts: int = 1
    """In which these are evaluated: a block's matrices are read once for each."""
    operations: float = 0.0
    """Floating-point operations of a step's products."""
    read_only: bool = False
    """Whether pages are only read (`zo2jax.Direction.read_only`); what a fold moves is left out then."""

    @property
    def peak(self) -> int:
        """The most device memory that a step is expected to take, in bytes: meant as an upper bound, not proven."""
        return self.resident + self.window + self.probes + self.activations + self.libraries


@dataclass(frozen=True)
class Plan:
    """Where each block lives, and how it is moved: pure data. ``print(plan)`` says what a step takes.

    >>> Plan({"head": "host"}).prefetch
    1
    """

    tiers: Mapping[str, Tier] = field(default_factory=dict)
    """By block; those that are not named, and those whose leaves another block shares, stay on the device."""
    prefetch: int = 1
    """Blocks whose upload is begun before the present one is computed."""
    overlap: bool = True
    """Whether write-backs go on while the next block is computed."""
    pinned: bool = True
    """Whether host memory is page-locked."""
    probe_batch: int | None = None
    """Members of the population that a block evaluates at once; None: all. Of a run that goes on, its first plan's."""
    budget: Budget | None = field(default=None, compare=False, repr=False)
    """What a step takes, if `plan` made this."""

    def __post_init__(self) -> None:
        """Raises ValueError for what is no tier, a negative prefetch, or no members at once."""
        if wrong := {name: tier for name, tier in self.tiers.items() if tier not in get_args(Tier)}:
            raise ValueError(f"tiers {wrong}: expected 'device', 'host' or 'disk'")
        if self.prefetch < 0:
            raise ValueError(f"prefetch is {self.prefetch}, expected an integer of at least 0")
        if self.probe_batch is not None and self.probe_batch < 1:
            raise ValueError(f"probe_batch is {self.probe_batch}, expected an integer of at least 1, or None for all")

    def check(self, blocks: Collection[str]) -> None:
        """Raises ValueError if the plan names blocks that are not among these.

        >>> Plan({"haed": "host"}).check(["embed", "head"])
        Traceback (most recent call last):
        ValueError: the plan names 'haed', which the model lacks: did you mean 'head'?
        """
        if unknown := [name for name in self.tiers if name not in blocks]:
            near = difflib.get_close_matches(unknown[0], blocks, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the blocks are {', '.join(blocks)}"
            raise ValueError(f"the plan names {', '.join(map(repr, unknown))}, which the model lacks: {hint}")

    def moved(self) -> dict[Tier, int]:
        """Bytes that a step moves each way, by the tier that they come from."""
        sizes = self.budget.sizes if self.budget else {}
        tiers: tuple[Tier, ...] = ("host", "disk")
        return {t: sum(sizes.get(name, 0) for name, tier in self.tiers.items() if tier == t) for t in tiers}

    def seconds(self, machine: Machine, disk: float = math.inf) -> dict[str, float]:
        """Expected seconds of a step on a machine, by what takes them: compute, link, disk.

        Compute is products, and weights that are read and, unless they are only read, changed and made into probes; the
        link carries what comes from the disk too. ``disk`` is in bytes a second, read and written together.
        """
        if self.budget is None:
            return {}
        read_only = self.budget.read_only
        changed = 0 if read_only else 1 + 2 * self.budget.members
        traffic = (self.budget.parts + changed) * sum(self.budget.sizes.values())
        moved = self.moved()
        link, ways = (machine.up, 1) if read_only else (machine.both, 2)
        return {
            "compute": self.budget.operations / machine.products + traffic / machine.memory,
            "link": ways * sum(moved.values()) / link,
            "disk": ways * moved["disk"] / disk,
        }

    @property
    def summary(self) -> str:
        """One line: how many blocks are where, and the device memory that is expected; measures nothing."""
        where = {"device": "on the device", "host": "in host memory", "disk": "on the disk"}
        counts = {tier: list(self.tiers.values()).count(tier) for tier in get_args(Tier)}
        line = ", ".join(f"{n} block{'s' * (n != 1)} {where[tier]}" for tier, n in counts.items() if n)
        if self.budget is None:
            return f"{line}, all others on the device" if line else "all blocks on the device"
        limit = "" if self.budget.limit is None else f" of {_gib(self.budget.limit)}"
        return f"{line}; {_gib(self.budget.peak)}{limit} GiB of device memory expected"

    def __str__(self) -> str:
        """A table of bytes, rates and seconds; the rates are measured the first time."""
        if (budget := self.budget) is None:
            return self.summary
        lines = [f"{'tier':<8}{'blocks':>8}{'GiB':>10}"]
        for tier in get_args(Tier):
            names = [name for name, there in self.tiers.items() if there == tier]
            if names:
                lines.append(f"{tier:<8}{len(names):>8}{_gib(sum(budget.sizes[name] for name in names)):>10}")
        limit = "" if budget.limit is None else f" of {_gib(budget.limit)}"
        parts = {"resident": budget.resident, "streamed blocks at a time": budget.window, "probes": budget.probes}
        parts |= {"activations": budget.activations, "libraries": budget.libraries}
        lines.append(f"device memory: {_gib(budget.peak)}{limit} GiB expected")
        lines += [f"  {_gib(nbytes):>8} {name}" for name, nbytes in parts.items()]
        return "\n".join([*lines, *self._expected()])

    def _expected(self) -> list[str]:
        """What a step moves and computes, and how long that takes here."""
        assert self.budget is not None
        machine, moved = measure_machine(), self.moved()
        disk = measure_disk() if moved["disk"] else math.inf
        up = _gib(sum(moved.values()))
        down = _gib(0) if self.budget.read_only else up
        rates = f"link {_gib(machine.up)} GiB/s up, {_gib(machine.down)} down, {_gib(machine.both)} both at once"
        rates += f", products {machine.products / 1e12:.3g} TFLOP/s, device memory {_gib(machine.memory)} GiB/s"
        rates += f", disk {_gib(disk)} GiB/s" if moved["disk"] else ""
        seconds = self.seconds(machine, disk)
        together = max if self.prefetch and self.overlap else sum
        bound = max(seconds, key=lambda part: seconds[part])
        parts = ", ".join(f"{part} {s:.3g}" for part, s in seconds.items() if s)
        return [
            f"a step: {up} GiB up, {down} GiB down, {self.budget.operations / 1e12:.3g} TFLOP",
            f"measured: {rates}",
            f"expected: {together(seconds.values()):.3g} s a step, bound by the {bound} ({parts})",
        ]


def _gib(nbytes: float) -> str:
    return f"{nbytes / _GIB:.2f}"


def parse_size(text: str | int) -> int:
    """Bytes of a size such as "4GiB" (2^30 each), "24GB" (10^9 each), "900MiB" or "1.5 GiB"; an int is bytes.

    Raises:
        ValueError: for anything else, or what is not positive.

    >>> parse_size("4GiB"), parse_size("1.5 MB"), parse_size(4096)
    (4294967296, 1500000, 4096)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([KMGT]i?B|B?)", str(text).strip(), re.IGNORECASE)
    if match is not None:
        known = {unit.lower(): factor for unit, factor in (_UNITS | {"B": 1}).items()}
        if (size := int(float(match[1]) * known[match[2].lower()])) > 0:
            return size
    raise ValueError(f"size {text!r}: expected a positive number of bytes with a unit, such as 4GiB, 24GB or 900MiB")


def plan(
    model: Model,
    estimator: Estimator | None = None,
    *,
    tokens: int = 2048,
    rows: int = 1,
    batch: Any = None,
    batches: int = 1,
    tier: Tier = "host",
    device_memory: int | str | None = None,
    probe_batch: int | None = None,
    prefetch: int = 1,
    overlap: bool = True,
) -> Plan:
    """Where each block goes, and what a training step takes then; reads shapes only, and no array.

    Without ``device_memory`` all blocks go to ``tier``. With it, as many bytes as fit stay on the device, spread
    evenly among the streamed ones, so that uploads go on while resident blocks are computed. Blocks whose leaves
    another one shares, and those without a matrix of their own, always stay on the device. If not even two blocks fit
    beside what all members of the population take, these are evaluated in parts, the fewest with which they do.
    The keys and values that generation keeps come on top.

    Args:
        model: its blocks are looked at.
        estimator: how many members there are, of `zo2jax.svrg` in its largest step; `zo2jax.two_point` if None.
        tokens: of a row.
        rows: of a batch.
        batch: a batch, or the shapes of one, in place of rows of tokens with a target for each.
        batches: of a step (see `zo2jax.Run.step`), each as large.
        tier: of the blocks that do not stay on the device; with "device" all stay.
        device_memory: the budget, in bytes or as `parse_size` reads it.
        probe_batch: see `Plan`; as many as fit if None.
        prefetch: see `Plan`.
        overlap: see `Plan`.

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
    if tier not in get_args(Tier):
        raise ValueError(f"tier={tier!r}: expected 'device', 'host' or 'disk'")
    limit = None if device_memory is None else parse_size(device_memory)
    if batch is None:
        if model.config is None:
            raise ValueError("a model of zo2jax.blocks has batches of its own kind: give batch=, or the shapes of one")
        ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
        batch = {"ids": ids, "targets": ids}
    estimator = estimator or two_point(1e-3)
    check_targets(owned_shapes(model.blocks), estimator.direction)
    work = _Work.of(model, estimator, batch, prefetch)
    work = replace(work, batches=batches, limit=limit, chunk=probe_batch)
    sizes = list(work.sizes.values())
    stays = tier == "device"
    if probe_batch is None and limit is not None:
        work = work.fitting([stays] * len(sizes))
    streamed, chosen = (work.budget([there] * len(sizes)) for there in (False, stays))
    if limit is not None and not stays:
        budgets = [work.budget(_spread(sizes, i / (4 * len(sizes)))) for i in range(4 * len(sizes) + 1)]
        chosen = max((b for b in budgets if b.peak <= limit), key=lambda b: b.resident, default=streamed)
    if limit is not None and chosen.peak > limit:
        other = f" with all blocks on the device: give that, or tier='host', which needs {_enough(streamed)}"
        if not stays:
            other = ": give that, or take fewer rows or tokens" + ", or prefetch=0" * (prefetch > 0)
            other += ", or a smaller probe_batch" * (probe_batch is not None and probe_batch > 1)
        raise _refusal(batch, limit, f"{_enough(chosen)} at least{other}")
    tiers: dict[str, Tier] = {name: "device" if name in chosen.stays else tier for name in work.sizes}
    return Plan(tiers, prefetch, overlap, probe_batch=work.chunk, budget=chosen)


def _refusal(batch: Any, limit: int, needed: str) -> ValueError:
    what = " x ".join(map(str, jax.tree.leaves(batch)[0].shape))
    return ValueError(f"device_memory is {limit / _GIB:.3g} GiB, and a batch of {what} needs {needed}")


def _enough(budget: Budget) -> str:
    """A size that is large enough, as `parse_size` reads it."""
    return f"{math.ceil(budget.peak / _GIB * 100) / 100:.2f} GiB"


@dataclass(frozen=True)
class _Work:
    """What the blocks take, wherever they live."""

    sizes: dict[str, int]
    """Bytes of pages, by block in order."""
    vectors: int
    """Bytes of leaves that are in no page, and of what stays beside matrices."""
    owners: set[str]
    """Blocks whose leaves another one shares."""
    needs: list[Needs]
    members: int
    at_once: int
    """The most of them that are ever evaluated at once."""
    shared: bool
    """Whether all members share a matrix, as with low-rank directions."""
    prefetch: int
    read_only: bool
    batches: int = 1
    limit: int | None = None
    chunk: int | None = None
    """Members at once; None: all."""

    @classmethod
    def of(cls, model: Model, estimator: Estimator, batch: Any, prefetch: int) -> "_Work":
        """Looks at each kind of block once."""
        shapes = owned_shapes(model.blocks)
        layouts = layouts_of(model.blocks, model.format)
        vectors = sum(_nbytes(flat(shapes[name])[leaf]) for name, layout in layouts.items() for leaf in layout.rest)
        vectors += _beside(layouts, estimator.direction)
        vectors *= 1 if estimator.full is None else 2  # an anchor has vectors, and an empty P, of its own
        owners = {block_of(owner, shapes) for block in model.blocks for owner in block.aliases.values()}
        shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), batch)
        known: dict[Any, tuple[Needs, Any]] = {}
        needs, carry = [], None
        for block, kind in zip(model.blocks, kinds(model.blocks), strict=True):
            came = (kind, jax.tree.structure(carry), *((x.shape, str(x.dtype)) for x in jax.tree.leaves(carry)))
            if came not in known:
                known[came] = needs_of(block, carry, shaped)
            one, carry = known[came]
            needs.append(one)
        sizes = {name: layout.nbytes for name, layout in layouts.items()}
        direction = estimator.direction
        how = direction.rank > 0, prefetch, direction.read_only
        return cls(sizes, vectors, owners, needs, estimator.members, len(estimator.probes), *how)

    def fitting(self, stays: Sequence[bool]) -> "_Work":
        """With the members in the fewest parts with which a step fits; in single ones if it never does."""
        for parts in range(1, self.at_once + 1):
            chunk = -(-self.at_once // parts)
            chunk += chunk % 2 if chunk > 1 and self.at_once % 2 == 0 else 0  # pairs share their directions
            work = replace(self, chunk=None if parts == 1 else chunk)
            assert self.limit is not None
            if work.budget(stays).peak <= self.limit or chunk == 1:
                break
        return work

    def budget(self, stays: Sequence[bool]) -> Budget:
        """What a step takes if these blocks stay on the device, with those that own shared leaves or have no pages."""
        pairs = zip(stays, self.sizes.items(), strict=True)
        here = [stay or not size or name in self.owners for stay, (name, size) in pairs]
        streamed = [size for size, stay in zip(self.sizes.values(), here, strict=True) if not stay]
        chunk, members = min(self.chunk or self.at_once, self.at_once), self.members * self.batches
        waiting = (members - chunk) * max(n.carry for n in self.needs)
        parts = -(-self.members // chunk) * self.batches
        ahead = min(_AHEAD, max(parts * _longest_run(here), parts - 1)) * max(n.carry for n in self.needs)
        return Budget(
            resident=sum(self.sizes.values()) - sum(streamed) + self.vectors,
            window=room(streamed, self.prefetch),
            probes=(1 if self.shared else chunk) * max(n.weight for n in self.needs),
            activations=chunk * (max(n.activations for n in self.needs) + ahead) + waiting,
            libraries=_LIBRARIES if jax.default_backend() == "gpu" else 0,
            limit=self.limit,
            sizes=self.sizes,
            stays=frozenset(name for stay, name in zip(here, self.sizes, strict=True) if stay),
            members=members,
            parts=parts,
            operations=members * sum(n.operations for n in self.needs),
            read_only=self.read_only,
        )


def _beside(layouts: Mapping[str, Layout], direction: Direction) -> int:
    """Bytes of what low-rank updates add up to, P or an adapter, which stays on the device; without momentum."""
    total = 0
    for block, layout in layouts.items():
        for name, place in layout.matrices:
            if direction.rank and direction.trains(f"{block}.{name}"):
                rows, columns = matrix_shape(place.shape)
                total += 4 * direction.rank * (rows if direction.adapter is None else rows + columns)
    return total


def _nbytes(shape: Any) -> int:
    return math.prod(shape.shape) * jnp.dtype(shape.dtype).itemsize


def room(sizes: Sequence[int], prefetch: int) -> int:
    """Bytes of streamed blocks that may be on the device at once, for blocks of these sizes, visited in a cycle.

    Enough for any block that is computed and those that are uploaded meanwhile, and for one more that is written back
    where most blocks are; beside the largest (an embedding, a head) that one has to be gone.

    >>> room([50, 4, 8, 4, 8, 4, 8, 50], 1), room([4, 8, 4, 8], 1), room([5, 1], 1)
    (104, 20, 6)
    """

    def sums(count: int) -> list[int]:
        return sorted(sum(sizes[(i + j) % len(sizes)] for j in range(count)) for i in range(len(sizes)))

    if len(sizes) <= prefetch + 2:
        return sum(sizes)
    return max(sums(prefetch + 1)[-1], sums(prefetch + 2)[len(sizes) * 3 // 4])


def following(streamed: Sequence[bool], count: int) -> list[tuple[int, ...]]:
    """For each block the next ``count`` others that are streamed, in a cycle.

    >>> following([True, False, True, True], 1)
    [(2,), (2,), (3,), (0,)]
    """
    total = len(streamed)
    return [tuple([j % total for j in range(i + 1, i + total) if streamed[j % total]][:count]) for i in range(total)]


def _longest_run(stays: Sequence[bool]) -> int:
    """The most blocks in a row that stay, in a cycle; 0 without any.

    >>> _longest_run([True, False, True, True]), _longest_run([True, True])
    (3, 2)
    """
    longest = run = 0
    for here in [*stays, *stays]:
        run = run + 1 if here else 0
        longest = max(longest, run)
    return min(longest, len(stays))


def _spread(sizes: Sequence[int], fraction: float) -> list[bool]:
    """Which of blocks of these sizes stay, so that this fraction of the bytes does, evenly spread.

    >>> _spread([2, 2, 2, 2], 0.5)
    [True, False, True, False]
    """
    stays, owed = [], 0.0
    for size in sizes:
        owed += fraction * size
        stays.append(owed >= size / 2)
        owed -= size if stays[-1] else 0
    return stays
