"""A plan as data: where blocks live, how they are moved, and what a step takes then in bytes and seconds.

Only printing a plan asks for the rates of the machine.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, get_args

from zo2jax.formats import Format
from zo2jax.models.model import Model
from zo2jax.plan.machine import Machine
from zo2jax.plan.measure import this_machine
from zo2jax.plan.schedule import Timeline, Work, simulate
from zo2jax.stores import STAGING

Tier = Literal["device", "host", "disk"]
_GIB = 2**30
_UNITS = {"": 1} | {
    f"{prefix}{kind}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for kind, base in (("B", 1000), ("iB", 1024))
}


@dataclass(frozen=True)
class Budget:
    """What a step of a plan takes: bytes and operations, worked out from shapes.

    >>> Budget(resident=5, window=3, probes=2, activations=4, libraries=1).peak
    15
    """

    resident: int
    """Bytes of what stays on the device: its blocks' pages, what only folds touch of them, and all blocks' vectors."""
    window: int
    """The most bytes of streamed blocks on the device at once."""
    probes: int
    """Of the copies of the largest matrix, or of a slab of a vocabulary, of members that are evaluated at once; of
    one that they share, those that codes become."""
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
    works: tuple[Work, ...] = ()
    """What a step asks of the device, by block in order."""
    read_only: bool = False
    """Whether pages are only read (`zo2jax.Direction.read_only`), but for folds."""
    masters: Mapping[str, int] = field(default_factory=dict)
    """Bytes beside each block's pages that only folds touch."""
    pieces: Mapping[str, int] = field(default_factory=dict)
    """Of each block's matrices, in which a fold goes through them."""
    refresh: int | None = None
    """Steps from one fold to the next."""
    process: int = 0
    """Bytes of host memory that a program takes without any block."""
    reads: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each block as it is read when a run begins."""
    readers: int = 1
    """Blocks that are read at once."""
    batches: int = 1
    """In which the rows of a step are computed."""

    @property
    def peak(self) -> int:
        """The most device memory that a step is expected to take, in bytes: meant as an upper bound, not proven."""
        return self.resident + self.window + self.probes + self.activations + self.libraries

    @property
    def operations(self) -> float:
        """Floating-point operations of a step's products."""
        return sum(work.products for work in self.works)

    def kept(self, name: str) -> int:
        """Bytes of a block and of what only folds touch, in its tier."""
        return self.sizes.get(name, 0) + self.masters.get(name, 0)

    def piece(self, name: str) -> int:
        """Of a block's pages and of what only folds touch, the larger one: they go through buffers one by one."""
        return max(self.sizes.get(name, 0), self.masters.get(name, 0))


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
    formats: Mapping[str, Format | None] = field(default_factory=dict)
    """Of blocks that are kept in another format than the model's, see `formatted`."""
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

    def host(self) -> int:
        """The most bytes of host memory that a run is expected to take.

        Those of its blocks, what folds touch, buffers of files, the process; and of blocks that are being read, the
        largest first, with copies of those that go on to the device.

        >>> Plan({"head": "host"}, budget=Budget(1, 1, 1, 1, 1, sizes={"head": 7}, process=3, reads={"head": 5})).host()
        15
        """
        budget = self.budget
        if budget is None:
            return 0
        order = sorted(budget.sizes, key=lambda name: -budget.sizes[name])
        tiers = {name: self.tiers.get(name, "device") for name in order}
        there = accumulate(budget.kept(name) if tiers[name] == "host" else 0 for name in order)
        copied = {name: budget.piece(name) if tiers[name] == "device" else 0 for name in order}
        coming = [budget.reads.get(name, 0) + copied[name] for name in order]
        most = max((n + sum(coming[max(0, i + 1 - budget.readers) : i + 1]) for i, n in enumerate(there)), default=0)
        buffers = STAGING * max((budget.piece(name) for name in order if tiers[name] == "disk"), default=0)
        return most + buffers + budget.process

    def files(self) -> int:
        """Bytes of page files."""
        budget = self.budget
        return 0 if budget is None else sum(budget.kept(name) for name, tier in self.tiers.items() if tier == "disk")

    def timeline(self, machine: Machine) -> Timeline:
        """When each block of a step without a fold is expected to be moved and computed on a machine.

        Raises:
            ValueError: if the plan has no budget, as those that `plan` makes have.
        """
        if self.budget is None:
            raise ValueError("the plan has no budget: expected one that zo2jax.plan made")
        tiers = [self.tiers.get(work.name, "device") for work in self.budget.works]
        read_only = self.budget.read_only
        return simulate(
            self.budget.works, tiers, machine, read_only=read_only, prefetch=self.prefetch, overlap=self.overlap
        )

    def fold(self, machine: Machine) -> float:
        """Expected seconds of a fold, in each step's share.

        It moves all that is not on the device both ways, and takes the host as long for each piece as for a visit; for
        those that stay twice as long, as programs of their own cut them out and put them back.
        """
        budget = self.budget
        if budget is None or not budget.refresh:
            return 0.0
        stays = {work.name for work in budget.works if not work.moves}
        there = {name: tier for name, tier in self.tiers.items() if name not in stays}
        moved = {tier: sum(budget.kept(n) for n, t in there.items() if t == tier) for tier in ("host", "disk")}
        issued = sum(n * (2 if there.get(name, "device") == "device" else 1) for name, n in budget.pieces.items())
        moving = max(2 * sum(moved.values()) / machine.both, 2 * moved["disk"] / machine.disk)
        return (moving + issued * machine.launch) / budget.refresh

    def expected(self, machine: Machine) -> float:
        """Expected seconds of a step on a machine, with its share of a fold."""
        return self.timeline(machine).seconds + self.fold(machine)

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Expected seconds of a step on a machine by what takes them, each as if it were alone: compute, link, disk."""
        if self.budget is None:
            return {}
        moved = self.moved()
        link, files, ways = machine.transfers(self.budget.read_only)
        return {
            "compute": sum(work.seconds(machine) for work in self.budget.works),
            "link": ways * sum(moved.values()) / link,
            "disk": ways * moved["disk"] / files,
        }

    def formatted(self, model: Model) -> Model:
        """The model with the formats of its blocks that the plan chose; itself if it chose none.

        >>> from zo2jax.models.llama import LlamaConfig
        >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
        >>> model = Model(config, config.blocks(), {})
        >>> Plan(formats={"head": Format(8, None)}).formatted(model).format.keep
        ('embed.*', 'layers.0.attn.*', 'layers.0.mlp.*')
        """
        codes = next((format for format in self.formats.values() if format is not None), None)
        if not self.formats:
            return model
        if codes is None:
            return model.with_format(None)
        plain = [f"{block.name}.*" for block in model.blocks if self.formats.get(block.name) is None]
        return model.with_format(codes.keeping(plain))

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
        machine, up = this_machine(), _gib(sum(self.moved().values()))
        down = _gib(0) if self.budget.read_only else up
        timeline, fold = self.timeline(machine), self.fold(machine)
        parts = ", ".join(f"{part} {s:.3g}" for part, s in self.seconds(machine).items() if s)
        folds = f" and {fold:.3g} for folds" if fold else ""
        return [
            f"host memory: {_gib(self.host())} GiB, page files: {_gib(self.files())} GiB",
            f"a step: {up} GiB up, {down} GiB down, {self.budget.operations / 1e12:.3g} TFLOP",
            f"expected on {machine.kind}: {timeline.seconds:.3g} s a step{folds}, bound by the {timeline.bound} "
            f"(each alone: {parts})",
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
