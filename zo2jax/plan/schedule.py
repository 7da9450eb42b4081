"""What a step takes of a machine's time: the work of each block, and when it is uploaded, computed and written back.

The model, for block i of a cycle of blocks, in seconds:

    host      waits for compute[i-2] where blocks are streamed, then for each upload that block i asks for: for a buffer
              that is free, launch / 2; and then launch * visits
    up[j]     = max(end of the last upload, host, compute[i-1]) + bytes / link, where block i asks for j
    compute[i]= max(host, compute[i-1], up[i]) + work / rates
    down[i]   = max(compute[i], down[i-1]) + bytes / link

The link gives each way half of what both get at once where anything is written back. Files are read before uploads and
written after write-backs. It is steady after a step; a second one is what counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from zo2jax.plan.machine import Machine

_STEPS = 3
_UPLOAD = 0.5
"""Of the time in which the host issues the work of a block, is what it takes to issue its upload."""
_BOUND = {"read": "files", "write": "files", "upload": "link", "write-back": "link", "compute": "compute"}


@dataclass(frozen=True)
class Work:
    """What a step asks of the device for one block: bytes, operations, draws; for all members.

    >>> Work("head", products=1e12).seconds(Machine(1.0, 1.0, 1.0, products=1e12, memory=1.0))
    1.0
    """

    name: str
    size: int = 0
    """Bytes of its pages."""
    products: float = 0.0
    """Operations of products with matrices."""
    attention: float = 0.0
    """Operations of attention."""
    read: float = 0.0
    """Bytes of weights that products read: beside them, since whichever takes longer bounds a product."""
    traffic: float = 0.0
    """Bytes of all else that is read and written."""
    draws: float = 0.0
    """Random numbers for matrices, beside the traffic that they are drawn for."""
    drawn: float = 0.0
    """Bytes of that traffic."""
    visits: int = 1
    moves: bool = True
    """Whether updates change it, so that it is written back unless pages are only read."""
    int8: bool = False
    """Whether products are those of int8 numbers."""

    def seconds(self, machine: Machine) -> float:
        """Of the device."""
        rate = machine.int8_products if self.int8 else machine.products
        multiplied = max(self.products / rate, self.read / machine.memory)
        drawn = max(self.draws / machine.draws, self.drawn / machine.memory)
        return multiplied + self.attention / machine.attention + drawn + self.traffic / machine.memory


@dataclass(frozen=True)
class Span:
    """From when to when something is under way, in seconds.

    >>> Span("upload", "head", 1.0, 3.0).end
    3.0
    """

    lane: str
    """"read", "upload", "compute", "write-back" or "write"."""
    block: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step in the steady state.

    >>> Timeline(2.0, (Span("compute", "head", 0.5, 1.5),)).busy()
    {'compute': 0.5}
    """

    seconds: float
    spans: tuple[Span, ...]

    def busy(self) -> dict[str, float]:
        """The share of the step in which each lane is under way."""
        lanes = dict.fromkeys(span.lane for span in self.spans)
        return {lane: sum(s.end - s.start for s in self.spans if s.lane == lane) / self.seconds for lane in lanes}

    @property
    def bound(self) -> str:
        """What is at work for the longest, "compute", "link" or "files"; "host" where nothing is for half of the step.

        >>> Timeline(2.0, (Span("upload", "head", 0.0, 1.9),)).bound
        'link'
        """
        busy = self.busy()
        lane = max(busy, key=lambda lane: busy[lane])
        return _BOUND[lane] if busy[lane] > 0.5 else "host"


def simulate(
    works: Sequence[Work],
    tiers: Sequence[str],
    machine: Machine,
    *,
    read_only: bool = False,
    prefetch: int = 1,
    overlap: bool = True,
) -> Timeline:
    """When each block is uploaded, computed and written back; what a step takes once it is steady.

    Args:
        works: of the blocks in order.
        tiers: where each of them lives.
        machine: its rates.
        read_only: whether nothing is written back.
        prefetch: blocks whose upload is asked for before the present one is computed.
        overlap: whether write-backs go on while the next block is computed.

    >>> machine = Machine(up=1.0, down=1.0, both=2.0, products=1.0, memory=1.0)
    >>> works = [Work(str(i), size=2, products=1.0) for i in range(6)]
    >>> simulate(works, ["host"] * 6, machine).seconds  # of two bytes each, at a byte a second each way
    12.0
    >>> simulate(works, ["device"] * 6, machine).seconds
    6.0
    """
    lanes = _Lanes(works, tiers, machine, read_only, prefetch, overlap)
    ends = [lanes.step() for _ in range(_STEPS)]
    spans = [span for span in lanes.spans if span.end > ends[-2]]
    moved = tuple(Span(s.lane, s.block, max(0.0, s.start - ends[-2]), s.end - ends[-2]) for s in spans)
    return Timeline(ends[-1] - ends[-2], moved)


class _Lanes:
    """The state of a simulation: until when each lane is taken."""

    def __init__(
        self,
        works: Sequence[Work],
        tiers: Sequence[str],
        machine: Machine,
        read_only: bool,
        prefetch: int,
        overlap: bool,
    ):
        self._works, self._machine = works, machine
        self._tiers = [tier if work.size else "device" for work, tier in zip(works, tiers, strict=True)]
        self._streamed = [i for i, tier in enumerate(self._tiers) if tier != "device"]
        self._read_only, self._prefetch, self._overlap = read_only, prefetch, overlap
        up, down = (sum(works[i].size * w(works[i]) for i in self._streamed) for w in (lambda _: True, self._changes))
        both = 2 * down / machine.both + (up - down) / machine.up  # while as much goes back, and what is left then
        self._up = up / both if up else machine.up
        self._down = machine.both / 2
        self._read = machine.disk if down else machine.disk_read
        self._seconds = [work.seconds(machine) for work in works]
        self._host = self._compute = self._uploaded = self._downloaded = self._files = 0.0
        self._arrived: dict[int, float] = {}  # by number in the order of uploads, over all steps
        self._left: list[float] = []  # when the buffer of each upload is free again
        self._computed: list[float] = []  # of all visits
        self.spans: list[Span] = []

    def step(self) -> float:
        """Goes through the blocks once; when the last one is computed."""
        number = len(self._left)
        for i, work in enumerate(self._works):
            streamed = self._tiers[i] != "device"
            if streamed and len(self._computed) > 1:
                self._host = max(self._host, self._computed[-2])  # blocks that run ahead would take memory
            if self._streamed:
                for other in range(number, number + min(streamed + self._prefetch, len(self._streamed))):
                    if other not in self._arrived:
                        self._upload(other)
            self._host += self._machine.launch * work.visits
            start = max(self._host, self._compute, self._arrived[number] if streamed else 0.0)
            self._compute = start + self._seconds[i]
            self._computed.append(self._compute)
            self.spans.append(Span("compute", work.name, start, self._compute))
            if streamed:
                self._left.append(self._write_back(work, self._tiers[i]) if self._changes(work) else self._compute)
                self._host = self._host if self._overlap else max(self._host, self._left[-1])
                number += 1
        self._host = max(self._host, self._compute)  # which waits for the losses
        return self._compute

    def _changes(self, work: Work) -> bool:
        return work.moves and not self._read_only

    def _upload(self, number: int) -> None:
        i = self._streamed[number % len(self._streamed)]
        work, before = self._works[i], number - self._prefetch - 2
        for earlier in (before, number - len(self._streamed)):  # it waits for room, and for the block itself
            if 0 <= earlier < len(self._left):
                self._host = max(self._host, self._left[earlier])
        self._host += _UPLOAD * self._machine.launch
        ready = max(self._host, self._compute)  # its memory waits for what was issued before
        if self._tiers[i] == "disk":
            start = max(self._files, self._host)
            self._files = start + work.size / self._read
            self.spans.append(Span("read", work.name, start, self._files))
            ready = max(ready, self._files)
        start = max(ready, self._uploaded)
        self._uploaded = self._arrived[number] = start + work.size / self._up
        self.spans.append(Span("upload", work.name, start, self._uploaded))

    def _write_back(self, work: Work, tier: str) -> float:
        start = max(self._compute, self._downloaded)
        self._downloaded = start + work.size / self._down
        self.spans.append(Span("write-back", work.name, start, self._downloaded))
        if tier == "disk":
            start = max(self._files, self._downloaded)
            self._files = start + work.size / self._read
            self.spans.append(Span("write", work.name, start, self._files))
        return self._downloaded
